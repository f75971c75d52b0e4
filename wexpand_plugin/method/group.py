"""Expanding one input group: route, sum Hessians, solve, allocate.

This is the method from end to end. It sees weights and inputs, no model and no file: `batches`
runs whatever gives the inputs of the group's linears, as often as asked.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .allocation import allocate
from .candidates import Candidates, full_expansion, propose
from .clusters import Router, fit_router
from .settings import Settings
from .statistics import GroupStatistics, RowSample
from .versions import RowVersions, SolvedRows

__all__ = ["Batches", "GroupResult", "LinearResult", "expand_group"]


class Batches(Protocol):
    """The inputs of an input group, calibration batch by calibration batch."""

    def __len__(self) -> int:
        """Number of batches."""
        ...

    def __call__(self, numbers: Iterable[int] | None = None, /) -> Iterator[Tensor]:
        """Input rows [tokens, in] of the batches with these numbers, in this order; None: all."""
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
    """None with one expert"""
    tokens: Tensor
    """calibration tokens per expert, int64 [experts]"""
    linears: list[LinearResult]


def expand_group(
    weights: list[Tensor],
    biases: list[Tensor | None],
    batches: Batches,
    settings: Settings,
    statistics: GroupStatistics | None = None,
) -> GroupResult:
    """Sparse experts for the linears that read one tensor.

    :param weights: their dense weights [out_i, in]
    :param biases: their biases [out_i], where they have one
    :param batches: their inputs; read twice, the first time in part
    :param statistics: with one expert, the statistics of the inputs where they are known already
    :raises WexpandError: inputs that are not finite or too few, a budget too small
    """
    width, device = weights[0].shape[1], weights[0].device
    router, sample = None, torch.empty(0, width)
    if settings.num_experts > 1:
        sample = _sample(batches, settings)
        router = fit_router(
            sample, settings.num_experts, dims=settings.router_dims,
            restarts=settings.router_restarts, seed=settings.seed,
        )  # fmt: skip
        router = Router(*(part.to(device) for part in router))
    if statistics is None:
        statistics = GroupStatistics(
            width, router, hold_out=settings.size_budget is not None, seed=settings.seed,
            device=device,
        )  # fmt: skip
        for rows in batches():
            statistics.add(rows)
        statistics.flush()

    linears = []
    if settings.size_budget is None:
        seen = statistics.sample.rows
        for weight, experts in zip(
            weights, full_expansion(weights, statistics, settings), strict=True
        ):
            versions = RowVersions.full(experts, _error(weight, experts, seen, router))
            linears.append(LinearResult(versions, versions))
    else:
        for candidates in propose(weights, biases, statistics, sample, settings):
            linears.append(_within_budget(candidates, width, settings))
    return GroupResult(router, statistics.tokens, linears)


def _within_budget(candidates: Candidates, width: int, settings: Settings) -> LinearResult:
    problem = candidates.problem
    share = settings.version_bytes(problem.cost.shape[1], width)
    if settings.budget_scope == "layer":
        versions = candidates.select(allocate([problem], share)[0].use)
        return LinearResult(versions, versions)
    # what the budget leaves of this linear is not known yet; later ones calibrated on its full
    # expansion come out better than on a guess (evals/LOG.md)
    calibrating = candidates.full()
    if settings.shortlist:
        base = float(problem.cost[-1].sum())
        likely = [allocate([problem], max(base, share * part))[0] for part in settings.shortlist]
        candidates = candidates.shortlist(likely, settings.keep)
    return LinearResult(calibrating, None, candidates)


def _sample(batches: Batches, settings: Settings) -> Tensor:
    """About `router_samples` rows, from batches spread over the calibration set."""
    sample, seen = RowSample(settings.router_samples, settings.seed), 0
    # every stride-th batch, then the ones after them, until there are rows enough to choose from
    stride = max(1, len(batches) // 8)
    for offset in range(stride):
        for rows in batches(range(offset, len(batches), stride)):
            sample.add(rows)
            seen += len(rows)
        if seen >= settings.router_samples:
            break
    return sample.rows


def _error(weight: Tensor, experts: SolvedRows, rows: Tensor, router: Router | None) -> float:
    """Relative error of the outputs on `rows` [n, in], each by its own of `experts`."""
    rows = rows.to(weight.device)
    labels = rows.new_zeros(len(rows), dtype=torch.int64) if router is None else router.route(rows)
    change = sum(
        (rows[labels == e] @ (own - weight).float().t()).double().square().sum()
        for e, own in enumerate(experts.weights)
    )
    energy = (rows @ weight.float().t()).double().square().sum().clamp(min=1e-12)
    return float(change / energy) ** 0.5
