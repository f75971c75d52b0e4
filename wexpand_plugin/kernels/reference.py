"""The truth: unpack each expert's rows and multiply, in plain torch, on any device.

Slow (a dense weight is built for every expert that has tokens) and simple enough to be believed.
Every other kernel is tested against it. It asks for the experts in use, so on a GPU it synchronises
and no CUDA graph can hold it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..format.clusters import ClusterBias
from ..format.router import choice
from ..format.rowpool import RowPool
from ..format.values import ValueCodec, codec_of
from . import LayerShape

__all__ = ["biased", "logits", "multiply", "name", "prepare", "route", "run", "unavailable"]

name = "reference"


def unavailable(device: torch.device, dtype: torch.dtype, shape: LayerShape) -> str | None:
    """Always available."""
    return None


def prepare(pool: RowPool, dtype: torch.dtype) -> list[Tensor]:
    """The checkpoint's own tensors (values, mask, row map, scales, where there are any), and three
    empty ones whose widths are `in_features` and the codec's group and bits.
    """
    device = pool.values.device
    widths = (pool.in_features, pool.codec.group, pool.codec.bits)
    sizes = [torch.empty(0, width, device=device) for width in widths]
    none = torch.empty(0, device=device)
    parts = (pool.values, pool.mask, pool.row_map, pool.scale)
    return [none if part is None else part for part in parts] + sizes


def run(
    x: Tensor,
    experts: Tensor | None,
    layout: list[Tensor],
    out_features: int,
    bias: Tensor | None = None,
    clusters: Tensor | None = None,
    cluster_bias: ClusterBias | None = None,
) -> Tensor:
    """y [tokens, out] = x [tokens, in] times each token's own expert, transposed, plus biases."""
    values, *parts, width, group, bits = layout
    mask, row_map, scale = (part if part.numel() else None for part in parts)
    if values.is_floating_point():
        how = codec_of(values.dtype)
    else:
        # not `codec`: a tensor-parallel rank's columns may begin anywhere in a group
        how = ValueCodec(f"int{bits.shape[1]}", group.shape[1])
    pool = RowPool(how, width.shape[1], values, mask, row_map, scale)
    y = multiply(x, experts, pool.expert, pool.experts, out_features)
    return biased(y, bias, None if cluster_bias is None else cluster_bias.of(clusters))


def multiply(
    x: Tensor,
    experts: Tensor | None,
    weight_of: Callable[[int], Tensor],
    number: int,
    out_features: int,
) -> Tensor:
    """Each token times the weight [out, in] of its expert, asked for once per expert in use."""
    if experts is None:
        return linear(x, weight_of(0).to(x.dtype))
    y = x.new_empty(x.shape[0], out_features)
    for expert in range(number):
        tokens = (experts == expert).nonzero().squeeze(1)
        if tokens.numel():
            y[tokens] = linear(x[tokens], weight_of(expert).to(x.dtype))
    return y


def biased(y: Tensor, *biases: Tensor | None) -> Tensor:
    """Add these, [out] or [tokens, out], to `y` [tokens, out] in place, and return it.

    They are summed first, so that their sum is rounded to the dtype of `y` with it.
    """
    there = [bias for bias in biases if bias is not None]
    return y.add_(sum(there[1:], there[0])) if there else y


def route(x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
    """Cluster of each token: `x` [tokens, in] -> int64 [tokens]."""
    return choice(logits(x, weight) + bias, parents)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [tokens, rows] = x [tokens, in] times the router's `weight` [rows, in]."""
    return linear(x.float(), weight.float())
