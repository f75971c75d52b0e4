"""Expanding a model's MLP linears once, and trying many allocations on the result.

A recipe solves, allocates and forgets; an experiment that compares allocations wants the solved
versions of every neuron kept. This walks the input groups of a model in the order in which they
run and lets the method expand each, with everything kept to choose from. The model computes in
float32, which every CPU is fast at; weights are solved and counted in bfloat16, as they would be
stored.

A later linear is calibrated on what the earlier ones, already replaced, give it (`path`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evals.paper.inputs import mlp_linears
from wexpand_plugin.compress.rows import packed, settings_for
from wexpand_plugin.format.router import StoredRouter, rows_read
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.sizes import StoredBytes
from wexpand_plugin.format.values import codec_of
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.method.allocation import allocate, neuron_values, weighted
from wexpand_plugin.method.candidates import Candidates, allocate_model
from wexpand_plugin.method.clusters import Router
from wexpand_plugin.method.group import GroupResult, expand_group
from wexpand_plugin.method.inputs import InputGroup, find_groups, record_inputs, token_rows
from wexpand_plugin.method.row_sample import RowSample
from wexpand_plugin.method.settings import Settings

__all__ = ["ExpandedLinear", "expand_network", "input_groups", "install", "reallocate", "sizes"]

BATCH = 8
DTYPE = torch.bfloat16
WEIGHS = StoredBytes(codec_of(DTYPE), DTYPE)


class ExpandedLinear(NamedTuple):
    """One linear of the network after `expand_network`."""

    name: str
    weight: Tensor
    """dense, bfloat16"""
    bias: Tensor | None
    group: GroupResult
    pool: RowPool
    """what took its place"""
    candidates: Candidates | None
    """every version that could be granted; None without a budget"""
    values: dict[str, Tensor | None]
    """what each way to allocate says of the neurons"""


class Sizes(NamedTuple):
    """Bytes over the dense bytes of the same linears."""

    stored: float
    read: float
    """by one token: the mean over calibration tokens; the router of an input group once"""
    read_weights: float
    """the same without routers and row maps"""


class _Batches(list[Tensor]):
    """Inputs that are kept, as the method reads them."""

    def identity(self, number: int, /) -> int:
        return number

    def __call__(self, numbers: Iterable[int] | None = None) -> Iterator[Tensor]:
        return iter(self) if numbers is None else (self[number] for number in numbers)


def input_groups(network: nn.Module) -> list[InputGroup]:
    """The MLP linears that read the same tensor, in the order they run."""
    ids = torch.ones(1, 2, dtype=torch.int64)
    with torch.no_grad():
        return find_groups(mlp_linears(network), [partial(network, input_ids=ids)])


@torch.no_grad()
def expand_network(
    network: Any, rows: Tensor, settings: Settings, rules: Sequence[str] = (), path: str = "full"
) -> list[ExpandedLinear]:
    """Replace the MLP linears of `network`, in place; what was found for each.

    :param rows: calibration token ids [rows, length]
    :param settings: with a `size_budget`, candidates are kept for `reallocate`
    :param rules: values of `allocate_by` to be tried
    :param path: what later linears are calibrated on: "full", every expert of an earlier linear
        with its own version, as the recipe does, or "budget", each earlier linear within the budget
    """
    network.requires_grad_(False)
    settings = replace(settings_for(DTYPE, settings), shortlist=())
    forwards = [partial(network, input_ids=batch) for batch in rows.split(BATCH)]
    expanded: list[ExpandedLinear] = []
    for group in input_groups(network):
        first = group.linears[0]
        batches = _Batches(token_rows(s[first], None) for s in record_inputs([first], forwards))
        sample = RowSample(settings.router_samples, settings.seed)
        for number, batch in enumerate(batches):
            sample.add(batch, number)
        weights = [linear.weight.to(DTYPE) for linear in group.linears]
        biases = [linear.bias for linear in group.linears]
        result = expand_group(weights, biases, batches, settings)
        for name, weight, bias, found in zip(
            group.names, weights, biases, result.linears, strict=True
        ):
            versions = found.calibrating
            if found.candidates is not None and path == "budget":
                share = settings.version_bytes(*weight.shape)
                allocation = allocate([found.candidates.problem], share)[0]
                versions = found.candidates.select(allocation.use)
            values = {r: neuron_values(r, sample.rows, weight, bias, settings.seed) for r in rules}
            pool = packed(versions, WEIGHS.codec)
            linear = ExpandedLinear(name, weight, bias, result, pool, found.candidates, values)
            install(network, linear, linear.pool)
            expanded.append(linear)
    return expanded


def install(network: nn.Module, linear: ExpandedLinear, pool: RowPool) -> RoutedLinear:
    """Put `pool` in the place of `linear`, unpacked and in float32 for speed."""
    pool = pool.to(dtype=torch.float32)
    module = RoutedLinear.from_pool(pool, _stored(linear.group.router), linear.bias)
    module.materialise()
    network.set_submodule(linear.name, module)
    return module


def reallocate(expanded: Sequence[ExpandedLinear], budget: float, rule: str) -> list[RowPool]:
    """Spend `budget` x the dense bytes on the linears together, by `rule`: their row pools.

    :raises WexpandError: the base versions, row maps and routers are larger than the budget
    """
    candidates, bytes_ = [], 0.0
    for linear in expanded:
        assert linear.candidates is not None
        errors = weighted(linear.candidates.errors, rule, linear.values[rule])
        problem = linear.candidates.problem._replace(errors=errors)
        candidates.append(replace(linear.candidates, problem=problem))
        router = linear.group.router
        fixed = WEIGHS.fixed(
            *linear.weight.shape, problem.tree.experts, parents=router.parents if router else 0
        )
        bytes_ += budget * WEIGHS.dense(*linear.weight.shape) - fixed
    blocks = [linear.name.partition(".mlp.")[0] for linear in expanded]
    order = list(dict.fromkeys(blocks))
    depth_weights = [1 - order.index(block) / len(order) for block in blocks]
    allocations = allocate_model(candidates, depth_weights, bytes_)
    chosen = zip(candidates, allocations, strict=True)
    return [packed(c.select(allocation.use), WEIGHS.codec) for c, allocation in chosen]


def sizes(expanded: Sequence[ExpandedLinear], pools: Sequence[RowPool]) -> Sizes:
    """What `pools`, stored for the linears `expanded`, weigh."""
    dense = stored = read = weights = 0.0
    groups = set()
    for linear, pool in zip(expanded, pools, strict=True):
        router = _stored(linear.group.router)
        size = once = 0
        if router is not None:
            size, rows = router.nbytes, len(router.bias)
            once = size * rows_read(router.clusters, router.parents) // rows
        dense += linear.weight.nbytes
        stored += sum(pool.stored_bytes().values()) + size
        one = pool.bytes_per_token(linear.group.tokens)
        read += one + (once if id(linear.group) not in groups else 0)
        weights += one - (pool.out_features if pool.experts > 1 else 0)
        groups.add(id(linear.group))
    return Sizes(stored / dense, read / dense, weights / dense)


def _stored(router: Router | None) -> StoredRouter | None:
    return None if router is None else StoredRouter(*router)
