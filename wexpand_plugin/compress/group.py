"""Expanding one input group: route, sum Hessians, solve, allocate, replace the linears."""

from dataclasses import dataclass

import torch
from compressed_tensors.offload import OffloadCache, get_cache_init_kwargs, offload_module
from torch import Tensor, nn

from ..format.router import Router, fit_router
from ..format.rowpool import RowPool
from ..hf.linear import RoutedLinear
from ..method.allocation import allocate
from ..method.candidates import Candidates, Settings, dense_bytes, expand, fixed_bytes, propose
from ..method.statistics import GroupStatistics, RowSample
from .replay import BlockReplay, InputGroup

__all__ = ["SHORTLIST", "ExpandedGroup", "expand_group", "replace_linear", "sum_hessians"]

SHORTLIST = (0.5, 1.0, 2.0)
"""Times its share of the model's budget: a linear may choose again from what it would be granted at
one of these. Bounds what is kept; more bytes grant other versions, not only further ones."""


@dataclass
class ExpandedGroup:
    """What was done to the linears of one input group, in their order."""

    modules: list[RoutedLinear]
    candidates: list[Candidates]
    """with `budget_scope: model`, the versions that the whole model will choose from"""
    tokens: Tensor
    """calibration tokens per expert [experts]"""
    errors: list[float]
    """norm of the change of the outputs over the norm of the dense outputs"""


def sum_hessians(
    groups: list[InputGroup], routers: list[Router | None], replay: BlockReplay, settings: Settings
) -> list[GroupStatistics]:
    """The statistics of each group, from one replay of all batches."""
    firsts = [group.linears[0] for group in groups]
    found = [
        GroupStatistics(
            first.weight.shape[1], router, hold_back=settings.size_budget is not None,
            seed=settings.seed, device=first.weight.device,
        )
        for first, router in zip(firsts, routers, strict=True)
    ]  # fmt: skip
    for inputs in replay.inputs(firsts, range(len(replay))):
        for first, statistics in zip(firsts, found, strict=True):
            if first in inputs:
                statistics.add(inputs[first])
    for statistics in found:
        statistics.flush()
    return found


def expand_group(
    model: nn.Module,
    group: InputGroup,
    replay: BlockReplay,
    settings: Settings,
    statistics: GroupStatistics | None = None,
) -> ExpandedGroup:
    """Replace the linears of `group` in `model` by routed ones, calibrated by `replay`.

    :param statistics: with one expert, what `sum_hessians` found for the group
    """
    first = group.linears[0]
    weights = [linear.weight.detach() for linear in group.linears]
    biases: list[Tensor | None] = [
        None if m.bias is None else m.bias.detach() for m in group.linears
    ]
    device, width = weights[0].device, weights[0].shape[1]
    router, sample = None, torch.empty(0)
    if settings.num_experts > 1:
        sample = _sample(first, replay, settings)
        router = fit_router(
            sample, settings.num_experts, dims=settings.router_dims,
            restarts=settings.router_restarts, seed=settings.seed,
        )  # fmt: skip
        router = Router(*(part.to(device) for part in router))
    budget = settings.size_budget
    if statistics is None:
        (statistics,) = sum_hessians([group], [router], replay, settings)

    candidates: list[Candidates] = []
    meanwhile: list[RowPool | None] = []
    if budget is None:
        pools = expand(weights, statistics, settings)
    else:
        pools = []
        proposals = propose(weights, biases, statistics, sample, settings)
        for weight, proposal in zip(weights, proposals, strict=True):
            fixed = fixed_bytes(len(weight), width, settings.num_experts)
            share = budget * dense_bytes(weight) - fixed
            pools.append(proposal.select(allocate([proposal.problem], share)[0]))
            if settings.budget_scope == "model":
                least = float(proposal.problem.cost[-1].sum())
                likely = [
                    allocate([proposal.problem], max(least, share * part))[0] for part in SHORTLIST
                ]
                candidates.append(proposal.shortlist(likely))
                # what the budget leaves of this linear is not known yet; later ones calibrated on
                # its full expansion come out better than on a guess (evals/LOG.md)
                meanwhile.append(proposal.full())

    rows = statistics.sample.rows.to(weights[0].dtype)
    modules, errors = [], []
    for name, linear, bias, pool, other in zip(
        group.names, group.linears, biases, pools, meanwhile or [None] * len(pools), strict=True
    ):
        dense = nn.functional.linear(rows, linear.weight, bias).float()
        module = replace_linear(model, name, linear, pool, router, bias, group.names[0])
        module.tokens = statistics.tokens.tolist()
        # until the block has been propagated and its other groups have been replayed
        if other is None:
            module.materialise()
        else:
            module.materialise(torch.stack([other.expert(e) for e in range(other.experts)]))
        change = module(rows).float() - dense
        errors.append(float(change.norm() / dense.norm().clamp(min=1e-12)))
        modules.append(module)
    return ExpandedGroup(modules, candidates, statistics.tokens, errors)


def _sample(linear: nn.Linear, replay: BlockReplay, settings: Settings) -> Tensor:
    """About `router_samples` rows, from batches spread over the calibration set."""
    sample, seen = RowSample(settings.router_samples, settings.seed), 0
    batches = range(len(replay))
    # every stride-th batch, then the ones after them, until there are rows enough to choose from
    stride = max(1, len(batches) // 8)
    for offset in range(stride):
        for inputs in replay.inputs([linear], batches[offset::stride]):
            for rows in inputs.values():
                sample.add(rows)
                seen += len(rows)
        if seen >= settings.router_samples:
            break
    return sample.rows


def replace_linear(
    model: nn.Module,
    name: str,
    old: nn.Module,
    pool: RowPool,
    router: Router | None,
    bias: Tensor | None,
    group: str = "",
) -> RoutedLinear:
    """Put a routed linear in the place of `old`, offloaded like it."""
    module = RoutedLinear.from_pool(pool, router, bias, group=group)
    if isinstance(old._parameters, OffloadCache):
        offload_module(module, **get_cache_init_kwargs(old))
    model.set_submodule(name, module)
    return module
