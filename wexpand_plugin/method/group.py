"""Expanding one input group: route, sum Hessians, solve, allocate, and set cluster biases.

This is the method from end to end. It sees weights and inputs, no model and no file: `batches`
runs whatever gives the inputs of the group's linears, as often as asked.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from . import ranks
from .allocation import allocate, neuron_values
from .biases import BiasProblem
from .candidates import Candidates, full_expansion, propose
from .clusters import Router, fit_router
from .merge_tree import merge_tree
from .row_sample import RowSample, order_of
from .settings import Settings
from .statistics import GroupStatistics
from .versions import RowVersions, SolvedRows

__all__ = ["Batches", "GroupResult", "LinearResult", "expand_group"]


SOME_BATCHES = 8
"""that are read for the router's sample, before it is known how many it takes; then as many times
so many as it does, for short ones are run together"""
LIKELY = 0.98
"""how well what is only likely to be granted fills its bytes"""


class Batches(Protocol):
    """The inputs of an input group, calibration batch by calibration batch."""

    def __len__(self) -> int:
        """Number of batches."""
        ...

    def identity(self, number: int, /) -> int:
        """What the batch of this number is known by, in whatever order batches come and on
        whatever rank: 32 bits that follow from its tokens."""
        ...

    def __call__(self, numbers: Iterable[int] | None = None, /) -> Iterator[Tensor]:
        """Input rows [tokens, in] of each of the batches with these numbers, in this order; None:
        all. A batch may have none."""
        ...


@dataclass(frozen=True)
class LinearResult:
    """What expansion found for one linear."""

    calibrating: RowVersions
    """what later linears are calibrated on"""
    stored: RowVersions | None
    """what is stored: the same; None where a model-wide budget has yet to choose"""
    candidates: Candidates | None = None
    """what may be stored: what a model-wide budget chooses from"""


@dataclass(frozen=True)
class GroupResult:
    """What expansion found for an input group."""

    router: Router | None
    """None with one cluster"""
    tokens: Tensor
    """calibration tokens per cluster, int64 [clusters]"""
    linears: list[LinearResult]
    cluster_expert: Tensor | None = None
    """expert of each cluster, uint8 [clusters]; None where each has its own, or all have one"""


def expand_group(
    weights: list[Tensor],
    biases: list[Tensor | None],
    batches: Batches,
    settings: Settings,
    statistics: GroupStatistics | None = None,
    size_budgets: Sequence[float | None] | None = None,
) -> GroupResult:
    """Sparse experts for the linears that read one tensor.

    :param weights: their dense weights [out_i, in]
    :param biases: their biases [out_i], where they have one
    :param batches: their inputs, each read once
    :param statistics: with one expert, the statistics of the inputs where they are known already
    :param size_budgets: the linears' own, in place of that of `settings`
    :raises WexpandError: inputs that are not finite or too few, a budget too small
    """
    width, device = weights[0].shape[1], weights[0].device
    router, cluster_expert = None, None
    values: list[Tensor | None] = [None] * len(weights)
    seen: dict[int, Tensor] = {}
    order: list[tuple[int, int]] = []
    if statistics is None:  # a batch's place in it is what it is known by
        own = [batches.identity(number) for number in range(len(batches))]
        order = order_of(own, settings.seed)
    if settings.clusters > 1:
        sample, seen = _sample(batches, order, settings)
        router, cluster_expert = ranks.of_first(partial(_fit, sample, settings, width, device))
        router = router.to(device)
        if settings.size_budget is not None:
            values = [
                neuron_values(settings.allocate_by, sample, weight, bias, settings.seed)
                for weight, bias in zip(weights, biases, strict=True)
            ]
        del sample  # as large as a Hessian, and not needed any more
    if statistics is None:
        statistics = GroupStatistics(
            width, router, cluster_expert=cluster_expert, within=settings.biased,
            hold_out=settings.biased or settings.size_budget is not None, seed=settings.seed,
            device=device,
        )  # fmt: skip
        place = {n: place for place, (rank, n) in enumerate(order) if rank == ranks.rank()}
        others = [number for number in place if number not in seen]
        while seen:
            number = next(iter(seen))
            statistics.add(seen.pop(number), place[number])
        for number, rows in zip(others, batches(others), strict=True):
            statistics.add(rows, place[number])
        statistics.flush()
    statistics.join()

    linears = []
    if settings.size_budget is None:
        for weight, experts in zip(
            weights, full_expansion(weights, statistics, settings), strict=True
        ):
            bias = None
            if settings.biased:
                problem = BiasProblem.of(weight, statistics.cluster_means())
                bias = problem.shrunk(experts.weights).bias
            error = _error(weight, experts, statistics, bias)
            versions = RowVersions.full(experts, error, bias)
            linears.append(LinearResult(versions, versions))
    else:
        budgets = size_budgets or [settings.size_budget] * len(weights)
        proposed = propose(weights, values, statistics, settings)
        for candidates, budget in zip(proposed, budgets, strict=True):
            statistics.release()  # the versions are solved and weighed
            linears.append(_within_budget(candidates, width, replace(settings, size_budget=budget)))
    if cluster_expert is not None:
        cluster_expert = None if settings.num_experts == 1 else cluster_expert.to(device)
    return GroupResult(router, statistics.tokens, linears, cluster_expert)


def _fit(
    sample: Tensor, settings: Settings, width: int, device: torch.device
) -> tuple[Router, Tensor | None]:
    """The router, in main memory, and which expert each cluster uses."""
    router = fit_router(
        sample, settings.clusters, dims=settings.dims(width), restarts=settings.router_restarts,
        seed=settings.seed, key="num_clusters" if settings.biased else "num_experts",
    )  # fmt: skip
    if settings.num_experts == settings.clusters:
        return router, None
    return router, _experts(sample, router.to(device), settings.num_experts)


def _experts(rows: Tensor, router: Router, num_experts: int) -> Tensor:
    """Which expert each cluster uses: similar ones the same, judged by a sample of the inputs."""
    if num_experts == 1:
        return torch.zeros(router.clusters, dtype=torch.uint8)
    clusters = router.route(rows.to(router.bias.device)).cpu()
    tokens = torch.bincount(clusters, minlength=router.clusters)
    sums = torch.zeros(router.clusters, rows.shape[1]).index_add_(0, clusters, rows.float().cpu())
    return merge_tree(sums / tokens.clamp(min=1).unsqueeze(1), tokens).cut(num_experts)


def _within_budget(candidates: Candidates, width: int, settings: Settings) -> LinearResult:
    problem = candidates.problem
    share = settings.version_bytes(problem.cost.shape[1], width)
    if settings.budget_scope == "layer":
        read = settings.read_bytes(problem.cost.shape[1], width)
        versions = candidates.select(allocate([problem], share, read)[0].use)
        return LinearResult(versions, versions)
    # what the budget leaves of this linear is not known yet; later ones calibrated on its full
    # expansion come out better than on a guess (evals/LOG.md)
    calibrating = candidates.full()
    if settings.shortlist:
        base = float(problem.cost[-1].sum())
        likely = [
            allocate([problem], max(base, share * part), fill=LIKELY)[0]
            for part in settings.shortlist
        ]
        candidates = candidates.shortlist(likely, settings.keep)
    return LinearResult(calibrating, None, candidates)


def _sample(
    batches: Batches, order: list[tuple[int, int]], settings: Settings
) -> tuple[Tensor, dict[int, Tensor]]:
    """About `settings.samples` rows, from as many batches as have them, and all rows of each batch
    of this rank that was read for them."""
    sample, seen = RowSample(settings.samples, settings.seed), dict[int, Tensor]()
    waiting = list(enumerate(order))
    found, taken, more = 0, 0, SOME_BATCHES
    while waiting and found < settings.samples:
        some, waiting = waiting[:more], waiting[more:]
        mine = [(place, number) for place, (rank, number) in some if rank == ranks.rank()]
        read = batches([number for _, number in mine])
        for (place, number), rows in zip(mine, read, strict=True):
            seen[number] = rows
            sample.add(rows, place)
        found = sum(ranks.gathered(sum(len(rows) for rows in seen.values())))
        taken += len(some)
        # as many as have the rest, if they are like those before
        more = math.ceil((settings.samples - found) * taken / found) if found else taken
        more = -(-more // SOME_BATCHES) * SOME_BATCHES
    sample.join()
    return sample.rows, seen


def _error(
    weight: Tensor, experts: SolvedRows, statistics: GroupStatistics, bias: Tensor | None
) -> float:
    """Relative error of the outputs on a few rows, each by its own of `experts`.

    :param bias: of each cluster [clusters, out]
    """
    rows = statistics.sample.rows.to(weight.device)
    clusters = statistics.route(rows)
    labels = statistics.cluster_expert.to(clusters.device)[clusters]
    change = torch.zeros((), dtype=torch.float64, device=rows.device)
    for e, own in enumerate(experts.weights):
        off = rows[labels == e] @ (own - weight).float().t()
        if bias is not None:
            off += bias[clusters[labels == e]]
        change += off.double().square().sum()
    energy = (rows @ weight.float().t()).double().square().sum().clamp(min=1e-12)
    return float(change / energy) ** 0.5
