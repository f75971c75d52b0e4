"""The words and tables of the page: what each plot shows, in a few sentences, with its numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...method.neurons import wasserstein_neurons
from ..inspect_table import readable_bytes
from .data import Group, ReportData
from .measure import Measurement, r_squared
from .plots import PANELS

__all__ = [
    "NO_BASE",
    "ONE_EXPERT",
    "about",
    "budget",
    "distributions",
    "improvement",
    "kind_rows",
    "linear_rows",
    "pass_options",
    "settings",
    "sizes",
    "tiles",
    "tokens",
    "wasserstein",
]

ONE_EXPERT = (
    "Every linear has one expert, plain sparse: each neuron has one version of its weights, and "
    "there was nothing to choose."
)
NO_BASE = (
    "Pass --baseline DIR, the same model pruned without experts (recipes/sparsegpt.yaml): it is "
    "what the experts are compared with. A model whose experts share row versions needs none, but "
    "here they do not."
)


def about(data: ReportData) -> str:
    """One line on the model."""
    model, text = data.model, data.model.get("text_config", {})
    known = {**model, **text}
    parts = [(model.get("architectures") or ["model"])[0]]
    for key, unit in (
        ("num_hidden_layers", "blocks"),
        ("hidden_size", "wide"),
        ("vocab_size", "tokens in the vocabulary"),
    ):
        if key in known:
            parts.append(f"{known[key]} {unit}")
    dtype = known.get("dtype") or known.get("torch_dtype")
    return ", ".join(parts + ([str(dtype)] if dtype else []))


def tiles(data: ReportData) -> list[tuple[str, str]]:
    """(number, what it is), the four numbers to know."""
    found = data.sizes
    dense = found.dense_bytes or 1
    return [
        (f"{found.linear_bytes / dense:.2f} ×", "the dense size, on disk"),
        (f"{found.bytes_per_token / dense:.2f} ×", "the dense size, read per token"),
        (
            f"{found.sparsity:.1%}",
            "zeros in every " + ("linear" if data.experts == 1 else "expert"),
        ),
        (str(data.experts), "expert per linear" if data.experts == 1 else "experts per linear"),
    ]


def sizes(data: ReportData) -> str:
    """What the compressed linears weigh: on disk, dense, per token."""
    found = data.sizes
    return (
        f"The {len(data.linears)} compressed linears weigh {readable_bytes(found.linear_bytes)} "
        f"on disk, {readable_bytes(found.dense_bytes)} dense. A token reads only the rows of its "
        f"own experts, {readable_bytes(found.bytes_per_token)}. All tensors of the model, the "
        f"untouched ones included, take {readable_bytes(found.disk_bytes)}."
    )


def budget(data: ReportData) -> str:
    """How many row versions neurons have, and who shares them."""
    versions = sum(linear.versions for linear in data.linears)
    neurons = sum(linear.out_features for linear in data.linears)
    users = sum(
        data.sharing[linear.name].users[0] * linear.experts * linear.out_features
        for linear in data.linears
    )
    pairs = sum(linear.experts * linear.out_features for linear in data.linears)
    if versions == pairs:
        start = f"Each of the {data.experts} experts has its own row of every neuron: this is full "
        start += "expansion, without a budget. "
    else:
        start = (
            f"A neuron has {versions / neurons:.1f} row versions on average, for {data.experts} "
            f"experts; {float(users) / pairs:.0%} of the (neuron, expert) pairs have a row to "
            "themselves, the others share. "
        )
    return start + (
        "Left: how many rows each expert costs, a shared row split "
        "among its users; bright experts are those that bytes were spent on. Middle: how many "
        "experts use the same row. Right: how many versions the neurons have."
    )


def tokens(data: ReportData, counted: Sequence[Group]) -> str:
    """How evenly routers spread the calibration tokens; `counted`: groups that recorded them."""
    if not counted:
        return "This checkpoint does not record how many calibration tokens each expert got."
    shares = [count / sum(group.tokens) for group in counted for count in group.tokens]
    return (
        "Where the router sent the calibration tokens, for each tensor that linears read; dashed: "
        f"an even split. The smallest expert got {min(shares):.1%}, the largest {max(shares):.1%}. "
        "An expert with few tokens was solved with little data."
        + _sampled(len(counted), "input groups")
    )


def wasserstein(scores: Mapping[str, Tensor], measured: Measurement | None, percent: float) -> str:
    """What WD is, and how it is distributed here; `scores`: linear -> WD of its neurons."""
    source = "the scores stored beside the model"
    floor = ""
    if measured is not None:
        source = f"{measured.tokens:,} tokens of {Path(measured.dataset).name}"
        floor = f" (a Gaussian neuron has about {0.8 / measured.tokens**0.5:.3f} here)"
    values = torch.cat(list(scores.values()))
    return (
        "WD measures how far a neuron's outputs, before any activation function, are from a "
        f"Gaussian{floor}. Half of all neurons are below {float(values.median()):.3f}, the "
        f"highest has {float(values.max()):.2f}. Orange, right of the line: the top {percent:g}% "
        "of each linear, which the paper calls Wasserstein neurons and finds hardest to prune. "
        f"From {source}, on the dense model. The scale is linear up to 10 neurons, then "
        "logarithmic." + _sampled(len(scores), "linears")
    )


def distributions(measured: Measurement, blue: str) -> str:
    """How to read the outputs of single neurons; `blue` names what the blue line shows."""
    base = ""
    if measured.base is not None:
        base = f"one sparse version for all tokens ({measured.base}, orange), "
    return (
        "Top: the most entangled neuron of each of the linears where WD is highest. Bottom: "
        f"a neuron of median WD in the same linears. Grey is the dense model, then {base}"
        f"and the {blue} (blue). The closer a line follows the grey, the better the neuron "
        "survived; equal shapes are necessary, not sufficient, for equal outputs."
    )


def improvement(measured: Measurement, percent: float) -> str:
    """How much lower experts' errors are than one sparse version's, and whether WD explains it."""
    ratios, tops, explained, left_out = [], [], [], 0
    for linear in measured.linears.values():
        ratio = linear.improvement
        if ratio is None:
            left_out += linear.wd.numel()
            continue
        known = ratio.isfinite()
        left_out += int((~known).sum())
        ratios.append(ratio[known])
        explained.append(r_squared(linear.wd[known], ratio[known]))
        chosen = torch.zeros_like(known)
        chosen[wasserstein_neurons(linear.wd, percent)] = True
        tops.append(ratio[known & chosen])
    all_, top = torch.cat(ratios), torch.cat(tops)
    text = (
        f"Each point is a neuron: the RMSE of one sparse version ({measured.base}) over that of "
        f"the experts, against the neuron's WD. Above the dashed line experts are better: "
        f"{float((all_ > 1).double().mean()):.0%} of the neurons. The median neuron's error falls "
        f"by a factor of {_median(all_)}, the median Wasserstein neuron's by {_median(top)}. R² is "
        "the share of the improvement that WD explains by a straight line; 0 means that WD says "
        "nothing about who gains. "
    )
    within = torch.tensor([value for value in explained if value == value])
    if within.numel():
        text += f"Within one linear it is {float(within.median()):.2f} in the median."
    if left_out:
        text += f" {left_out:,} neurons without a shared version are left out."
    return text


def pass_options(wanted: str, what: str) -> str:
    """What stands in place of a plot: the options `wanted` that would draw it."""
    return f"Pass {wanted} to see {what}: the dense model is then run over some text."


def kind_rows(data: ReportData) -> list[tuple[str, str, str]]:
    """(what, bytes, share of the dense bytes) of the size table."""
    found, dense = data.sizes, data.sizes.dense_bytes or 1
    rows = [("dense", found.dense_bytes), ("stored", found.linear_bytes)]
    rows += [
        (f"\u2003{kind.replace('_', ' ')}", count)
        for kind, count in found.bytes_by_kind().items()
        if count
    ]
    rows.append(("read per token", round(found.bytes_per_token)))
    return [(what, readable_bytes(count), f"{count / dense:.3f}") for what, count in rows]


def linear_rows(
    data: ReportData, measured: Measurement | None, percent: float
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table of all linears."""
    header = ["linear", "out × in", "versions per neuron", "zeros", "stored, × dense"]
    header += ["read, × dense", "balance"]
    if measured is not None:
        header += ["WD, median", f"WD, top {percent:g}% from", "error, experts"]
        header += ["error, one version"] if measured.base is not None else []
    rows = []
    for linear in data.linears:
        row = [
            linear.name,
            f"{linear.out_features} × {linear.in_features}",
            f"{linear.versions / linear.out_features:.2f} of {linear.experts}",
            f"{linear.sparsity:.1%}",
            f"{linear.stored_bytes / linear.dense_bytes:.2f}",
            f"{linear.bytes_per_token / linear.dense_bytes:.2f}",
            "–" if linear.balance is None else f"{linear.balance:.2f}",
        ]
        if measured is not None:
            found = measured.linears[linear.name]
            lowest = found.wd[wasserstein_neurons(found.wd, percent)].min()
            row += [f"{float(found.wd.median()):.3f}", f"{float(lowest):.3f}"]
            row += [f"{found.relative_error('expanded'):.3f}"]
            if measured.base is not None:
                row += ["–" if found.base is None else f"{found.relative_error('base'):.3f}"]
        rows.append(row)
    return header, rows


def settings(data: ReportData) -> list[tuple[str, str]]:
    """(key, value) of what made the checkpoint."""
    values: dict[str, Any] = data.sizes.made_by
    return [
        (str(key), value if isinstance(value, str) else json.dumps(value))
        for key, value in values.items()
    ]


def _median(ratio: Tensor) -> str:
    return f"{float(ratio.median()):.2f}" if ratio.numel() else "an unknown factor"


def _sampled(count: int, things: str) -> str:
    return f" {PANELS} of {count} {things} are drawn, at even distances." * (count > PANELS)
