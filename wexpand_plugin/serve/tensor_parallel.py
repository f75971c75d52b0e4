"""Tensor parallel: the neurons and columns of a layer that one rank holds.

A column-parallel layer gives each rank some of its rows (neurons), a row-parallel one some of its
columns (inputs). Fused qkv with fewer key/value heads than ranks gives the same key/value rows to
several ranks. None of that is computed here: vLLM's own loader is handed the numbers of the
neurons as if they were a bias, and what it leaves in place are the numbers that this rank holds.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from ..errors import WexpandError
from ..format.clusters import ClusterBias
from ..format.linear import StoredLinear
from .params import LoadedLinear

__all__ = ["cluster_biases_of", "columns_of", "neurons_of", "refuse_own_layout"]


def refuse_own_layout(layer: Any) -> None:
    """Raise if the class of vLLM's linear `layer` has a loader that is not one of vLLM's own."""
    if type(layer).weight_loader.__module__ != LinearBase.__module__:
        raise WexpandError(
            f"{layer.prefix}: vLLM lays {type(layer).__name__} out in a way of its own, in which "
            "expanded weights cannot be served; compress the model with it under `ignore`"
        )


def neurons_of(layer: Any, linears: Sequence[LoadedLinear], held: int) -> Tensor | None:
    """This rank's neurons, numbered through all `linears` of the layer: int64 [held].

    :return: None if they are all that there are, in order
    :raises WexpandError: a linear that is not of the size that vLLM wants
    """
    mine = _held(layer, linears, held)
    # the ranks together hold all of a linear if the last one holds its end
    last = copy.copy(layer)
    last.tp_rank = layer.tp_size - 1
    ends = set(_held(last, linears, held).tolist())
    total = 0
    for linear in linears:
        total += linear.stored.pool.out_features
        if total - 1 not in ends:
            raise _wrong_size(layer, linear)
    return None if torch.equal(mine, torch.arange(total)) else mine


def _held(layer: Any, linears: Sequence[LoadedLinear], held: int) -> Tensor:
    numbers = Parameter(torch.full((held,), -1), requires_grad=False)
    numbers.output_dim = 0  # type: ignore[attr-defined]
    first = 0
    for linear in linears:
        if linear.stored.pool.in_features != layer.input_size:
            raise _wrong_size(layer, linear)
        own = torch.arange(first, first + linear.stored.pool.out_features)
        first += linear.stored.pool.out_features
        shard = () if linear.shard_id is None else (linear.shard_id,)
        try:
            layer.weight_loader(numbers, own, *shard)
        except (AssertionError, RuntimeError):
            raise _wrong_size(layer, linear) from None
    if bool((numbers < 0).any()):
        names = ", ".join(linear.name for linear in linears)
        raise WexpandError(f"{layer.prefix}: vLLM wants more rows than those of {names}")
    return numbers.data


def cluster_biases_of(
    layer: Any, linears: Sequence[StoredLinear], neurons: Tensor | None
) -> dict[str, Tensor]:
    """What this rank adds for the clusters of the layer's `linears`, by kind; none for nothing.

    Where ranks share the columns, their outputs are summed: the first one adds the biases, as
    vLLM's layer does with the plain bias.

    :param neurons: from `neurons_of`
    """
    biases = ClusterBias.concat(
        [linear.cluster_bias for linear in linears],
        [linear.pool.out_features for linear in linears],
    )
    if biases is None or (columns_of(layer) is not None and layer.tp_rank > 0):
        return {}
    if neurons is not None:
        biases = biases.take(neurons)
    return {"cluster_bias": biases.values, "cluster_bias_scale": biases.scale}


def _wrong_size(layer: Any, linear: LoadedLinear) -> WexpandError:
    found = [linear.stored.pool.out_features, linear.stored.pool.in_features]
    return WexpandError(
        f"{linear.name}: {found} (out, in) by the checkpoint does not fit vLLM's {layer.prefix}, "
        f"{[layer.output_size, layer.input_size]} with all that is fused into it"
    )


def columns_of(layer: Any) -> tuple[int, int] | None:
    """First and last + 1 column of this rank; None if the layer's ranks all read every column."""
    if not isinstance(layer, RowParallelLinear) or layer.tp_size == 1:
        return None
    share = layer.input_size_per_partition
    return layer.tp_rank * share, (layer.tp_rank + 1) * share
