"""The numbers in the page's sentences and tables; the sentences are in `page.html.jinja`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...method.neurons import wasserstein_neurons
from ..inspect import LinearInspection, is_number
from .data import Group, ReportData
from .measure import Measurement, r_squared

__all__ = [
    "Budget",
    "Gain",
    "Row",
    "Shares",
    "Spread",
    "budget",
    "gain",
    "rows",
    "shares",
    "spread",
    "tuned",
]


class Budget(NamedTuple):
    """How many row versions neurons have."""

    full: bool
    """every expert has its own row of every neuron"""
    versions: float
    """of a neuron, on average"""
    own: float
    """share of the (neuron, expert) pairs that have a row to themselves"""


def budget(data: ReportData) -> Budget:
    """Over all linears."""
    pairs = sum(linear.experts * linear.out_features for linear in data.linears)
    versions = sum(linear.versions for linear in data.linears)
    own = sum(
        float(data.sharing[linear.name].users[0]) * linear.experts * linear.out_features
        for linear in data.linears
    )
    neurons = sum(linear.out_features for linear in data.linears)
    return Budget(versions == pairs, versions / neurons, own / pairs)


class Shares(NamedTuple):
    """The share of its group's calibration tokens that the smallest and the largest cluster got."""

    smallest: float
    largest: float


def shares(counted: Sequence[Group]) -> Shares:
    """Over the groups that recorded their tokens."""
    found = [count / sum(group.tokens) for group in counted for count in group.tokens]
    return Shares(min(found), max(found))


def tuned(data: ReportData) -> list[tuple[str, float, float]]:
    """The blocks that were tuned: name, error of its outputs one-shot and tuned."""
    blocks = data.sizes.made("tuned")
    return [
        (name, errors[0], errors[1])
        for name, errors in blocks.items()
        if isinstance(errors, list) and len(errors) == 2 and all(map(is_number, errors))
    ]


class Spread(NamedTuple):
    """Wasserstein distances of all neurons."""

    median: float
    highest: float


def spread(wd: Mapping[str, Tensor]) -> Spread:
    """From linear -> WD of its neurons [out]."""
    values = torch.cat(list(wd.values()))
    return Spread(float(values.median()), float(values.max()))


class Gain(NamedTuple):
    """How much lower experts' errors are than one sparse version's, and whether WD explains it."""

    better: float
    """share of the neurons whose error is lower with experts"""
    median: float
    """error of one version over that of the experts, of the median neuron"""
    top: float
    """the same of the median Wasserstein neuron"""
    explained: float
    """R2 of a straight line in WD within one linear, its median; NaN where undefined"""
    left_out: int
    """neurons without a version to compare with"""


def gain(measured: Measurement, percent: float) -> Gain:
    """Over all linears that have a base; `percent`: how many are called Wasserstein neurons."""
    ratios, tops, explained, left_out = [], [], [], 0
    for linear in measured.linears.values():
        ratio = linear.improvement
        if ratio is None:
            left_out += linear.wd.numel()
            continue
        known, top = ratio.isfinite(), torch.zeros(len(ratio), dtype=torch.bool)
        top[wasserstein_neurons(linear.wd, percent)] = True
        left_out += int((~known).sum())
        ratios.append(ratio[known])
        tops.append(ratio[known & top])
        explained.append(r_squared(linear.wd[known], ratio[known]))
    every, top = torch.cat(ratios), torch.cat(tops)
    return Gain(
        float((every > 1).double().mean()),
        float(every.nanmedian()),
        float(top.nanmedian()) if len(top) else float("nan"),
        float(torch.tensor(explained).nanmedian()),
        left_out,
    )


class Row(NamedTuple):
    """A linear in the table of all linears."""

    sizes: LinearInspection
    wd: float | None = None
    """of the median neuron; None where nothing was measured"""
    top: float | None = None
    """the lowest WD of its Wasserstein neurons"""
    error: float | None = None
    """relative, of the experts"""
    base_error: float | None = None
    """relative, of one version"""


def rows(data: ReportData, measured: Measurement | None, percent: float) -> list[Row]:
    """One for each compressed linear, in the checkpoint's order."""
    if measured is None:
        return [Row(linear) for linear in data.linears]
    found = []
    for linear in data.linears:
        neurons = measured.linears[linear.name]
        found.append(
            Row(
                linear,
                float(neurons.wd.median()),
                float(neurons.wd[wasserstein_neurons(neurons.wd, percent)].min()),
                neurons.relative_error("expanded"),
                None if neurons.base is None else neurons.relative_error("base"),
            )
        )
    return found
