"""Random pools and tokens for the tests of every kernel, and the comparison with the reference."""

import torch

from wexpand_plugin.format.clusters import ClusterBias
from wexpand_plugin.format.router import choice
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec
from wexpand_plugin.kernels import reference

__all__ = [
    "INTEGERS",
    "assert_logits_match",
    "assert_matches",
    "assert_routes_match",
    "random_biases",
    "random_case",
    "random_pool",
]

INTEGERS = [codec(name, group) for name in ("int8", "int6", "int5", "int4", "int3", "int2")
            for group in (128, 64, 32, 8, 24, 320)]
"""codecs of integers, with groups of many steps of a kernel, of one and of a part of one"""


def random_pool(experts, out, width, density, values) -> RowPool:
    """Rows shared by experts at random, of mixed density, some empty and some full; all of them
    full at a density of 1. `values` is a codec, or the dtype of float ones.
    """
    row_map = torch.randint(experts, (experts, out))
    # numbers without gaps within a neuron
    row_map = torch.stack([column.unique(return_inverse=True)[1] for column in row_map.t()], dim=1)
    versions = int((row_map.amax(dim=0) + 1).sum())
    share = torch.full((versions, 1), float(density))
    if density < 1:
        share[0::5] = 0.0
        share[1::5] = 1.0
    keep = torch.rand(versions, width) < share
    rows = torch.randn(versions, width) * keep
    if isinstance(values, torch.dtype):
        return RowPool.pack(rows.to(values), row_map, keep=keep)
    return RowPool.pack(rows, row_map, keep=keep, codec=values)


def random_case(seed, experts, out, width, density, tokens, dtype, device="cpu", values=None):
    """A random pool, x, and the chosen experts; `values` as `random_pool`'s, by default `dtype`."""
    torch.manual_seed(seed)
    pool = random_pool(experts, out, width, density, values or dtype)
    x = torch.randn(tokens, width).to(dtype).to(device)
    chosen = torch.randint(experts, (tokens,)).to(device) if experts > 1 else None
    return pool.to(device), x, chosen


def random_biases(pool, tokens, clusters, dtype, device="cpu"):
    """The arguments of a kernel's `run` that are added: bias, cluster of each token, biases of
    clusters; about as large as outputs.
    """
    bias = torch.randn(pool.out_features).to(device, dtype)
    biases = ClusterBias.pack(torch.randn(clusters, pool.out_features)).to(device)
    return bias, torch.randint(clusters, (tokens,)).to(device), biases


def assert_matches(y, pool, x, chosen, tolerance, bias=None, clusters=None, biases=None):
    """`y` against the reference in float64, which rounds nothing: shape, dtype and values.

    `tolerance` of each dtype is relative to the largest output.
    """

    def weight_of(expert):
        return pool.expert(expert).double()

    expected = reference.multiply(x.double(), chosen, weight_of, pool.experts, pool.out_features)
    if bias is not None:
        expected = expected + bias.double()
    if biases is not None:
        expected = expected + biases.decoded(torch.float64)[0 if clusters is None else clusters]
    assert y.shape == expected.shape and y.dtype == x.dtype
    if y.numel():
        scale = expected.abs().max().clamp_min(1e-30)
        assert ((y.double() - expected).abs().max() / scale).item() < tolerance[x.dtype]


def assert_routes_match(
    kernel, clusters, parents, width, tokens, dtype, weight_dtype, device="cpu"
):
    """A kernel's clusters against those of float64, and of its own logits."""
    generator = torch.Generator().manual_seed(clusters * width + tokens)
    x = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = torch.randn(parents + clusters, width, generator=generator).to(device, weight_dtype)
    bias = torch.randn(parents + clusters, generator=generator).to(device)
    found = kernel.route(x, weight, bias, parents)
    assert found.dtype == torch.int64 and found.shape == (tokens,)
    exact = x.double() @ weight.double().t() + bias.double()
    assert torch.equal(found, choice(exact, parents))
    assert torch.equal(found, choice(kernel.logits(x, weight) + bias, parents))
    return x, weight, bias, found


def assert_logits_match(kernel, experts, width, tokens, dtype, weight_dtype, device="cpu"):
    """A kernel's router logits against float64, relative to the largest."""
    generator = torch.Generator().manual_seed(experts * width + tokens)
    x = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = torch.randn(experts, width, generator=generator).to(device, weight_dtype)
    found, exact = kernel.logits(x, weight), x.double() @ weight.double().t()
    assert found.dtype == torch.float32 and found.shape == exact.shape
    if found.numel():
        assert (found - exact).abs().max() < 1e-5 * exact.abs().max().clamp_min(1e-30)
    return x, weight, found
