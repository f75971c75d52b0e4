"""The plot of README: loss added against bits per weight on a real model.

What is drawn stands in the SVG's description too, so that a test can tell an old plot without
drawing.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

from evals.size_curve_picture import SERIES, TITLES, Rows, of_series

from .accuracy import Point, real_model_points
from .fill import ROOT
from .results import results

__all__ = ["FILE", "draw", "drawn", "series"]

FILE: Path = ROOT / "docs" / "accuracy.svg"

Series = dict[str, dict[str, Point]]
"""line of the plot -> label -> point"""

_ZEROS = "ours, zeros in bfloat16"
_LINES = SERIES | {_ZEROS: ("#c96a1b", "v:")}
"""line of the plot -> colour and style: those of the curve's own picture, and zeros alone"""
_MOST = 9.5
"""bits per weight, of what is drawn"""


def series() -> dict[str, Series]:
    """The points of SmolLM2, of all linears and of the MLPs' alone: those of evals.size_curve, and,
    of the MLPs, zeros alone."""
    curve = results("size_curve")["rows"]
    return {part: _series(curve, part) for part in TITLES}


def _series(curve: Rows, part: str) -> Series:
    found: Series = {}
    for line in SERIES:
        for name, row in of_series(curve, part, line):
            added = row["loss"] - curve["dense"]["loss"]
            point = (round(row["bits_stored"], 2), round(added, 3))
            found.setdefault(line, {})[name.split()[2]] = point
    for name, points in real_model_points().items() if part == "mlp" else ():
        if name.endswith("% bfloat16") and points[0]:
            own = found.setdefault(_ZEROS, {})
            own[name.split()[0]] = (round(points[0][0], 2), round(points[0][1], 3))
    return {
        line: {label: p for label, p in found[line].items() if p[0] <= _MOST}
        for line in _LINES if line in found
    }  # fmt: skip


def drawn() -> dict[str, Series] | None:
    """What the file shows; None if there is none."""
    if not FILE.exists():
        return None
    text = re.search(r"<dc:description>(.*?)</dc:description>", FILE.read_text(), re.DOTALL)
    if text is None:
        return None
    values = json.loads(html.unescape(text.group(1)))
    return {
        part: {k: {label: tuple(p) for label, p in v.items()} for k, v in found.items()}
        for part, found in values.items()
    }


def draw() -> None:
    """Write the file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "wexpand", "font.size": 9}
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TITLES), figsize=(10, 4.4), sharey=True)
    for axes, (part, lines) in zip(panels, series().items(), strict=True):
        _plot(axes, lines)
        axes.set_title(TITLES[part], fontsize=9)
        axes.set_xlabel("bits stored per weight")
    panels[0].set_ylabel("loss added, nats per token")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(FILE, metadata={"Date": None, "Description": json.dumps(series())})
    pyplot.close(figure)
    text = "\n".join(line.rstrip() for line in FILE.read_text().splitlines())
    FILE.write_text(text + "\n")


def _plot(axes: Any, lines: Series) -> None:
    for name, points in lines.items():
        colour, style = _LINES[name]
        xs, ys = zip(*sorted(points.values()), strict=True)
        axes.plot(xs, ys, style, color=colour, label=name, linewidth=1, markersize=5)
        for label, point in points.items():
            if name not in ("GPTQ", "llama.cpp", _ZEROS):  # as many bits as its place says
                continue
            axes.annotate(
                f"{label} bits" if label.isdigit() else label, point, fontsize=7, color=colour,
                textcoords="offset points", xytext=(5, 4),
            )  # fmt: skip
    axes.set_yscale("symlog", linthresh=0.1, linscale=0.6)
    axes.set_yticks([0, 0.05, 0.1, 0.3, 1, 3], ["0", "0.05", "0.1", "0.3", "1", "3"])
    axes.set_ylim(bottom=-0.02)
    axes.grid(alpha=0.3)
