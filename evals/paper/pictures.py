"""What the figures of the experiments share: a column for each model, spread over seeds as a band.

A figure says in its PNG's description which results it shows, so that a test can tell an old one
without drawing.
"""

from collections.abc import Iterable, Iterator
from statistics import mean
from typing import Any

__all__ = ["COLOURS", "curve", "kinds", "per_model"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#f0c000")


def per_model(found: dict[str, Any], axes: Any) -> Iterator[tuple[tuple[str, Any], Any]]:
    """((model, its results), its column of axes)."""
    return zip(found.items(), axes.T, strict=True)


def kinds(linears: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(last part of the names, colour) of each kind of linear."""
    names = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    return zip(names, COLOURS, strict=False)


def curve(axes: Any, runs: list[dict[float, float]], style: str = "o-", **more: Any) -> None:
    """Mean over seeds, each {x: y}, and a band from least to most."""
    xs = sorted(runs[0])
    columns = [[run[x] for run in runs] for x in xs]
    (line,) = axes.plot(xs, [mean(c) for c in columns], style, linewidth=1, markersize=3, **more)
    axes.fill_between(
        xs, [min(c) for c in columns], [max(c) for c in columns], alpha=0.2, linewidth=0,
        color=line.get_color(),
    )  # fmt: skip
