"""Expanding a model's MLP linears once, and trying many allocations on the result.

The recipe's pipeline solves, allocates and forgets; an experiment that compares allocations wants
the solved versions of every neuron kept. This walks the input groups of a model in the order in
which they run, with the package's own router, statistics, solver and candidates, and keeps them.
The model computes in float32, which every CPU is fast at; weights are solved and counted in
bfloat16, as they would be stored.

A later linear is calibrated on what the earlier ones, already replaced, give it (`path`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evals.paper.inputs import mlp_linears
from wexpand_plugin.format.router import Router, fit_router
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.method.allocation import allocate
from wexpand_plugin.method.candidates import (
    Candidates,
    Settings,
    allocate_model,
    dense_bytes,
    expand,
    fixed_bytes,
    propose,
    score_values,
    weigh,
)
from wexpand_plugin.method.statistics import GroupStatistics, RowSample

__all__ = [
    "ExpandedLinear",
    "Sizes",
    "expand_network",
    "input_groups",
    "install",
    "reallocate",
    "sizes",
]

BATCH = 8


@dataclass
class ExpandedLinear:
    """One linear of the network after `expand_network`."""

    name: str
    group: int
    """number of its input group"""
    block: str
    """name of its decoder block"""
    weight: Tensor
    """dense, bfloat16"""
    bias: Tensor | None
    router: Router | None
    tokens: Tensor
    """calibration tokens per expert"""
    pool: RowPool
    """what took its place"""
    candidates: Candidates | None
    """every version that could be granted, with plain errors; None without a budget"""
    values: dict[str, Tensor | None]
    """what each score says of the neurons"""


@dataclass(frozen=True)
class Sizes:
    """Bytes over the dense bytes of the same linears."""

    stored: float
    read: float
    """by one token: the mean over calibration tokens; the router of an input group once"""
    read_weights: float
    """the same without routers and row maps"""


def input_groups(network: nn.Module) -> list[list[str]]:
    """The MLP linears that read the same tensor, in the order they run."""
    groups: list[tuple[Tensor, list[str]]] = []

    def note(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if groups and groups[-1][0] is args[0]:
                groups[-1][1].append(name)
            else:
                groups.append((args[0], [name]))

        return hook

    hooks = [m.register_forward_pre_hook(note(n)) for n, m in mlp_linears(network).items()]
    with torch.no_grad():
        network(input_ids=torch.ones(1, 2, dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    return [names for _, names in groups]


class _Reached(Exception):
    """Ends a forward at the linear whose input is wanted."""


@torch.no_grad()
def _inputs(network: Any, name: str, rows: Tensor) -> Iterator[Tensor]:
    """The inputs [tokens, in] of one linear, batch by batch."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].reshape(-1, args[0].shape[-1]))
        raise _Reached

    handle = network.get_submodule(name).register_forward_pre_hook(hook)
    try:
        for batch in rows.split(BATCH):
            try:
                network(input_ids=batch)
            except _Reached:
                yield found.pop()
    finally:
        handle.remove()


def expand_network(
    network: Any, rows: Tensor, settings: Settings, scores: Sequence[str] = (), path: str = "full"
) -> list[ExpandedLinear]:
    """Replace the MLP linears of `network`, in place; what was found for each.

    :param rows: calibration token ids [rows, length]
    :param settings: with a `size_budget`, candidates are kept for `reallocate`
    :param scores: of which the neurons' values are kept
    :param path: what later linears are calibrated on: "full", every expert of an earlier linear
        with its own version, as the recipe does, or "budget", each earlier linear within the budget
    """
    network.requires_grad_(False)
    expanded: list[ExpandedLinear] = []
    for number, names in enumerate(input_groups(network)):
        linears = [network.get_submodule(name) for name in names]
        weights = [linear.weight.to(torch.bfloat16) for linear in linears]
        biases = [linear.bias for linear in linears]
        parts = list(_inputs(network, names[0], rows))
        router, sample = None, RowSample(settings.router_samples, settings.seed)
        for part in parts:
            sample.add(part)
        if settings.num_experts > 1:
            router = fit_router(
                sample.rows, settings.num_experts, restarts=settings.router_restarts,
                seed=settings.seed,
            )  # fmt: skip
        budget = settings.size_budget
        statistics = GroupStatistics(
            weights[0].shape[1], router, hold_back=budget is not None, seed=settings.seed
        )
        for part in parts:
            statistics.add(part)
        statistics.flush()
        del parts
        kept: list[Candidates | None] = [None] * len(names)
        if budget is None:
            pools = expand(weights, statistics, settings)
        else:
            found = propose(weights, biases, statistics, sample.rows, settings)
            kept, pools = list(found), []
            for weight, candidates in zip(weights, found, strict=True):
                if path == "full":
                    pools.append(candidates.full())
                    continue
                share = budget * dense_bytes(weight) - fixed_bytes(
                    *weight.shape, settings.num_experts
                )
                pools.append(candidates.select(allocate([candidates.problem], share)[0]))
        for name, weight, bias, candidates, pool in zip(
            names, weights, biases, kept, pools, strict=True
        ):
            values = {
                score: score_values(score, sample.rows, weight, bias, settings.seed)
                for score in scores
            }
            linear = ExpandedLinear(
                name,
                number,
                name.partition(".mlp.")[0],
                weight,
                bias,
                router,
                statistics.tokens,
                pool,
                candidates,
                values,
            )
            install(network, linear, pool)
            expanded.append(linear)
    return expanded


def install(network: nn.Module, linear: ExpandedLinear, pool: RowPool) -> RoutedLinear:
    """Put `pool` in the place of `linear`, unpacked and in float32 for speed."""
    module = RoutedLinear.from_pool(pool.to(dtype=torch.float32), linear.router, linear.bias)
    module.materialise()
    network.set_submodule(linear.name, module)
    return module


def reallocate(expanded: Sequence[ExpandedLinear], budget: float, score: str) -> list[RowPool]:
    """Spend `budget` x the dense bytes on the linears together, by `score`: their row pools.

    :raises WexpandError: the base versions, row maps and routers are larger than the budget
    """
    candidates, bytes_ = [], 0.0
    for linear in expanded:
        assert linear.candidates is not None
        problem = linear.candidates.problem
        errors = weigh(problem.errors, score, linear.values[score])
        candidates.append(replace(linear.candidates, problem=problem._replace(errors=errors)))
        fixed = fixed_bytes(*linear.weight.shape, problem.tree.experts)
        bytes_ += budget * dense_bytes(linear.weight) - fixed
    blocks = list(dict.fromkeys(linear.block for linear in expanded))
    reach = [1 - blocks.index(linear.block) / len(blocks) for linear in expanded]
    choices = allocate_model(candidates, reach, bytes_)
    return [c.select(choice) for c, choice in zip(candidates, choices, strict=True)]


def sizes(expanded: Sequence[ExpandedLinear], pools: Sequence[RowPool]) -> Sizes:
    """What `pools`, stored for the linears `expanded`, weigh."""
    dense = stored = read = weights = 0.0
    groups = set()
    for linear, pool in zip(expanded, pools, strict=True):
        routers = 0
        if linear.router is not None:
            routers = linear.router.nbytes
        dense += dense_bytes(linear.weight)
        stored += sum(pool.stored_bytes().values()) + routers
        one = pool.bytes_per_token(linear.tokens)
        read += one + (routers if linear.group not in groups else 0)
        weights += one - (pool.out_features if pool.experts > 1 else 0)
        groups.add(linear.group)
    return Sizes(stored / dense, read / dense, weights / dense)
