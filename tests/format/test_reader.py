"""A foreign reader, written from the format's page alone, reads what we write."""

import json

import numpy as np
import pytest
import torch
from reader import output, read

from wexpand_plugin.format.clusters import ClusterBias
from wexpand_plugin.format.config import GroupEntry
from wexpand_plugin.format.linear import StoredLinear
from wexpand_plugin.format.router import StoredRouter
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import CODECS, codec
from wexpand_plugin.format.writer import TensorWriter, seal
from wexpand_plugin.hf.linear import RoutedLinear


def written(path, linears):
    """A checkpoint of these linears, one input group."""
    writer = TensorWriter(path, limit=1000)
    for name, linear in linears.items():
        writer.add_linear(name, linear)
    writer.add("norm.weight", torch.ones(3))
    writer.close()
    (path / "config.json").write_text(json.dumps({"model_type": "any"}))
    group = GroupEntry.of({n: linear.entry(torch.bfloat16) for n, linear in linears.items()})
    seal(path, [group], {}, checksums=writer.checksums)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "full"])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("values", CODECS)
def test_a_foreign_reader_gets_the_same_experts(tmp_path, values, experts, sparse):
    generator = torch.Generator().manual_seed(0)
    width, how = 77, codec(values, 32)
    router = StoredRouter(torch.randn(experts, width).half(), torch.randn(experts))
    linears = {}
    for name, out in (("a.up", 5), ("a.gate", 9)):
        weight = torch.randn(experts, out, width, generator=generator)
        if sparse:
            weight[torch.rand(weight.shape, generator=generator) < 0.6] = 0
        weight[-1, ::2] = weight[0, ::2]
        pool = RowPool.pack_experts(weight)
        pool = RowPool.pack(pool.rows(), pool.row_map, keep=pool.rows() != 0, codec=how)
        bias = torch.arange(out) / 4 if name == "a.up" else None
        linears[name] = StoredLinear(pool, router if experts > 1 else None, bias)
    written(tmp_path, linears)

    found = read(tmp_path)
    assert found.keys() == linears.keys()
    for name, linear in linears.items():
        for expert in range(experts):
            ours = linear.pool.expert(expert).double()
            assert torch.equal(torch.from_numpy(found[name]["experts"][expert]), ours)
        if experts > 1:
            assert torch.equal(found[name]["router"][0], router.weight)
    assert found["a.up"]["bias"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found["a.gate"]["bias"] is None


@pytest.mark.parametrize(
    ("experts", "clusters", "parents", "with_bias"),
    [(1, 1, 0, True), (1, 6, 0, True), (3, 8, 0, True), (3, 3, 2, False), (2, 40, 7, True)],
)
def test_a_foreign_reader_gets_the_same_outputs(tmp_path, experts, clusters, parents, with_bias):
    generator = torch.Generator().manual_seed(0)
    width, out = 77, 5
    weight = torch.randn(experts, out, width, generator=generator)
    rows = parents + clusters
    router = StoredRouter(
        torch.randn(rows, width, generator=generator).half(),
        torch.randn(rows, generator=generator),
        parents,
    )
    biases = torch.randn(clusters, out, generator=generator)
    named = torch.arange(clusters).flip(0).remainder(experts).byte()
    stored = StoredLinear(
        RowPool.pack_experts(weight),
        router if clusters > 1 else None,
        torch.arange(out) / 4,
        ClusterBias.pack(biases) if with_bias else None,
        named if clusters > experts > 1 else None,
    )
    written(tmp_path, {"a.up": stored})
    found = read(tmp_path)["a.up"]
    module = RoutedLinear.from_pool(
        stored.pool, stored.router, stored.bias, cluster_bias=stored.cluster_bias,
        cluster_expert=stored.cluster_expert,
    )  # fmt: skip
    x = torch.randn(200, width, generator=generator)
    outputs, seen = zip(*(output(found, row.double().numpy()) for row in x), strict=True)
    assert len(set(seen)) >= min(clusters, 30)
    theirs = torch.tensor(np.stack(outputs))
    torch.testing.assert_close(module(x).double(), theirs, rtol=1e-4, atol=1e-4)
