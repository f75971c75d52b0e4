"""The plot of README: loss added against bits per weight on a real model.

What is drawn stands in the SVG's description too, so that a test can tell an old plot without
drawing.
"""

import html
import json
import re
from pathlib import Path

from .accuracy import HOW, Point, real_model_points
from .fill import ROOT

__all__ = ["FILE", "draw", "drawn", "series"]

FILE: Path = ROOT / "docs" / "accuracy.svg"

Series = dict[str, dict[str, Point]]
"""line of the plot -> label -> point"""

_COLOURS = {
    "GPTQModifier": "#888888",
    "int3": "#8a4fb0",
    "int4": "#1f6fb4",
    "int8": "#2a9d5c",
    "bfloat16": "#c96a1b",
}
_STYLES = {"": "o-", "tuned": "o--", "tuned as a whole": "s:"}


def series() -> Series:
    """The points, by how kept values are stored and whether they were tuned."""
    found: Series = {}
    for name, points in real_model_points().items():
        first, *rest = name.split()
        if "groups" in rest or first == "2:4":  # beside other points, at the same bits
            continue
        kind = "GPTQModifier" if first == "GPTQ" else (rest or [first])[-1]
        label = f"{rest[0]} bits" if first == "GPTQ" else (first if rest else "no zeros")
        for point, how in zip(points, HOW, strict=True):
            if point is not None:
                line = found.setdefault(kind + "," * bool(how) + how, {})
                line[label] = (round(point[0], 2), round(point[1], 3))
    return dict(sorted(found.items()))


def drawn() -> Series | None:
    """What the file shows; None if there is none."""
    if not FILE.exists():
        return None
    text = re.search(r"<dc:description>(.*?)</dc:description>", FILE.read_text(), re.DOTALL)
    if text is None:
        return None
    values = json.loads(html.unescape(text.group(1)))
    return {k: {label: tuple(p) for label, p in v.items()} for k, v in values.items()}


def draw() -> None:
    """Write the file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "wexpand", "font.size": 9}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.8))
    for name, points in series().items():
        kind, _, tuned = (part.strip() for part in name.partition(","))
        ours = kind != "GPTQModifier"
        xs, ys = zip(*sorted(points.values()), strict=True)
        axes.plot(
            xs, ys, _STYLES[tuned], color=_COLOURS.get(kind, "black"),
            label=f"ours, {kind} values{', ' * bool(tuned)}{tuned}" if ours else name,
            markerfacecolor="white" if tuned else None, linewidth=1, markersize=5,
        )  # fmt: skip
        for label, point in points.items():
            axes.annotate(
                label, point, textcoords="offset points", fontsize=7,
                xytext=(5, 4 if ours and not tuned else -10), color=_COLOURS.get(kind, "black"),
            )  # fmt: skip
    axes.set_yscale("symlog", linthresh=0.1, linscale=0.6)
    axes.set_yticks([0, 0.05, 0.1, 0.3, 1, 3], ["0", "0.05", "0.1", "0.3", "1", "3"])
    axes.set_ylim(bottom=-0.02)
    axes.set_xlabel("bits stored per weight of the MLP linears")
    axes.set_ylabel("loss added, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(FILE, metadata={"Date": None, "Description": json.dumps(series())})
    pyplot.close(figure)
    text = "\n".join(line.rstrip() for line in FILE.read_text().splitlines())
    FILE.write_text(text + "\n")
