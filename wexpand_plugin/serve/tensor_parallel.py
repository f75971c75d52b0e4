"""Tensor parallel: the rows or columns of a layer that one rank holds.

A column-parallel layer gives each rank some of its rows (neurons), a row-parallel one some of its
columns (inputs). Fused qkv with fewer key/value heads than ranks gives the same key/value rows to
several ranks. Numbers refer to the linear as it is in the checkpoint.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ..errors import WexpandError

__all__ = ["Shard", "columns_of", "rows_of", "shards_of"]

_KNOWN = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)


class Shard(NamedTuple):
    """One of the matrices that vLLM fuses into a layer: its rows, and those of this rank."""

    size: int
    start: int
    stop: int


def shards_of(layer: Any) -> list[Shard]:
    """The matrices of vLLM's linear `layer` and this rank's rows of each, in order."""
    if type(layer).weight_loader not in {cls.weight_loader for cls in _KNOWN}:
        raise WexpandError(
            f"{layer.prefix}: vLLM lays {type(layer).__name__} out in a way of its own, in which "
            "expanded weights cannot be served; compress the model with it under `ignore`"
        )
    if isinstance(layer, QKVParallelLinear):
        kv_rank = layer.tp_rank // layer.num_kv_head_replicas
        v_size = getattr(layer, "v_head_size", layer.head_size)
        return [
            _part(layer.total_num_heads * layer.head_size, layer.num_heads * layer.head_size,
                  layer.tp_rank),
            _part(layer.total_num_kv_heads * layer.head_size, layer.num_kv_heads * layer.head_size,
                  kv_rank),
            _part(layer.total_num_kv_heads * v_size, layer.num_kv_heads * v_size, kv_rank),
        ]  # fmt: skip
    sizes = getattr(layer, "output_sizes", [layer.output_size])
    if isinstance(layer, ColumnParallelLinear):
        return [_part(size, size // layer.tp_size, layer.tp_rank) for size in sizes]
    return [_part(size, size, 0) for size in sizes]


def _part(size: int, share: int, rank: int) -> Shard:
    return Shard(size, rank * share, (rank + 1) * share)


def columns_of(layer: torch.nn.Module) -> tuple[int, int] | None:
    """First and last + 1 column of this rank; None if the layer's ranks all read every column."""
    if not isinstance(layer, RowParallelLinear) or layer.tp_size == 1:
        return None
    share = layer.input_size_per_partition
    return layer.tp_rank * share, (layer.tp_rank + 1) * share


def rows_of(shards: list[Shard]) -> Tensor | None:
    """This rank's rows of a linear that consists of `shards`; None if it has all of them."""
    if all(shard.start == 0 and shard.stop == shard.size for shard in shards):
        return None
    rows, first = [], 0
    for shard in shards:
        rows.append(torch.arange(first + shard.start, first + shard.stop))
        first += shard.size
    return torch.cat(rows)
