"""Plots of what the checkpoint itself says: bytes, shared rows, tokens per expert.

Each function returns a matplotlib figure; figures are made without pyplot, which would keep them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .data import Group, ReportData, short_name
from .style import BASE, COMPRESSED, DENSE, HEAT, KINDS, SOFT

__all__ = ["PANELS", "budget", "evenly", "grid", "sizes", "tokens", "tuning"]

PANELS = 24
"""small plots of one figure at most; more linears are sampled evenly"""
NAMES = {"row_map": "row map", "cluster_bias": "cluster biases"}


def evenly(items: Sequence[Any], count: int = PANELS) -> list[Any]:
    """At most `count` of the items, at even distances, the first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def grid(count: int, columns: int = 4, height: float = 1.55, **options: Any) -> tuple[Any, list]:
    """A figure with `count` small axes in rows of `columns`: (figure, axes)."""
    from matplotlib.figure import Figure

    columns = min(columns, max(count, 1))
    rows = -(-count // columns)
    figure = Figure(figsize=(10, height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]


def sizes(data: ReportData) -> Any:
    """Bars of bytes: the dense linears, ours on disk by kind, and what one token reads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.1), layout="constrained")
    axes = figure.subplots()
    unit, scale = next(
        (unit, scale)
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))
        if data.sizes.dense_bytes >= scale or scale == 1
    )
    dense = data.sizes.dense_bytes
    axes.barh("dense", dense / scale, color=DENSE, height=0.6)
    left = 0.0
    for kind, count in data.sizes.bytes_by_kind().items():
        if count:
            axes.barh(
                "stored", count / scale, left=left, height=0.6, color=KINDS[kind],
                label=NAMES.get(kind, kind),
            )  # fmt: skip
            left += count / scale
    read = data.sizes.bytes_per_token / scale
    axes.barh("read per token", read, color=SOFT, height=0.6)
    widest = max(dense / scale, left, read)
    for place, value in enumerate((dense / scale, left, read)):
        text = f"{value:.3g} {unit}, {value * scale / dense:.2f} × dense"
        axes.text(value + widest * 0.01, place, text, va="center", fontsize=8.5)
    axes.set_xlim(0, widest * 1.22)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} (the {len(data.linears)} compressed linears)")
    axes.grid(axis="y", visible=False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def budget(data: ReportData) -> Any:
    """Three heat maps over the linears: cost of each expert, users of a row, rows of a neuron."""
    from matplotlib.figure import Figure

    names = [linear.name for linear in data.linears]
    height = max(0.2 * len(names), 1.2) + 1.3
    figure = Figure(figsize=(10, height), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    texts = (
        ("cost of each expert", "expert", "rows paid for, % of a full copy", "cost", 0),
        (
            "who shares a row",
            "experts that use the same row",
            "% of (neuron, expert) pairs",
            "users",
            1,
        ),
        ("versions of a neuron", "row versions of the neuron", "% of neurons", "versions", 1),
    )
    for axes, (title, label, unit, field, first) in zip(panels, texts, strict=True):
        values = np.full((len(names), data.experts), np.nan)
        for row, name in enumerate(names):
            numbers = getattr(data.sharing[name], field).numpy() * 100
            values[row, : len(numbers)] = numbers
        edges = np.arange(data.experts + 1) + first - 0.5
        mesh = axes.pcolormesh(
            edges, np.arange(len(names) + 1) - 0.5, values, cmap=HEAT, vmin=0, rasterized=True
        )
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.set_xticks(np.unique(np.linspace(first, data.experts - 1 + first, 6).round()))
        axes.grid(False)
        figure.colorbar(mesh, ax=axes, orientation="horizontal", label=unit, aspect=25)
    panels[0].set_yticks(range(len(names)), [short_name(name) for name in names])
    panels[0].invert_yaxis()
    return figure


def tokens(groups: Sequence[Group], unit: str) -> Any:
    """Bars of calibration tokens per expert or cluster (`unit`), one small plot for each group."""
    shown = evenly([group for group in groups if sum(group.tokens)])
    figure, panels = grid(len(shown))
    for axes, group in zip(panels, shown, strict=True):
        share = np.array(group.tokens) / sum(group.tokens) * 100
        axes.bar(range(len(share)), share, color=COMPRESSED, width=0.8)
        axes.axhline(100 / len(share), color=SOFT, linewidth=1, linestyle="--")
        axes.set_title(group.label.replace("_proj", ""))
        axes.grid(axis="x", visible=False)
        axes.set_xticks(np.unique(np.linspace(0, len(share) - 1, 6).round()))
    figure.supxlabel(unit, fontsize=9)
    figure.supylabel("% of calibration tokens", fontsize=9)
    return figure


def tuning(tuned: Sequence[tuple[str, float, float]]) -> Any:
    """Error of each block's outputs, one-shot and tuned: (name, before, after) of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes, places = figure.subplots(), range(len(tuned))
    axes.plot(places, [before for _, before, _ in tuned], "o-", color=BASE, label="one-shot")
    axes.plot(places, [after for _, _, after in tuned], "o-", color=COMPRESSED, label="tuned")
    axes.set_yscale("log")
    names = [short_name(name) for name, _, _ in tuned]
    axes.set_xticks(*zip(*evenly(list(zip(places, names, strict=True))), strict=True))
    axes.set_xlabel("block")
    axes.set_ylabel("relative squared error")
    figure.legend(loc="outside upper left", ncols=2)
    return figure
