"""How the plots look, and how a matplotlib figure gets into the page.

Colours come from Okabe and Ito's palette, which readers with colour-blindness can tell apart. A
figure is dark on white wherever it stands: as a PNG file, and in the page, light or dark, as SVG in
an `img`, so that nothing of one figure can reach another or the page.
"""

from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

__all__ = [
    "BASE",
    "COMPRESSED",
    "DENSE",
    "HEAT",
    "HIGHLIGHT",
    "INK",
    "KINDS",
    "LEVELS",
    "OTHERS",
    "SOFT",
    "save",
    "styled",
]

INK, LINE, SOFT = "#1c2024", "#d3d8de", "#8a929c"
BLUE, SKY, ORANGE = "#0072b2", "#56b4e9", "#d55e00"
GREEN, YELLOW, GREY, PINK = "#009e73", "#e69f00", "#9aa2ac", "#cc79a7"

DENSE, COMPRESSED, BASE = GREY, BLUE, ORANGE
"""the model before, after, and with one sparse version of each neuron"""
HIGHLIGHT, OTHERS = ORANGE, GREY
"""Wasserstein neurons and the rest"""
KINDS = {
    "values": BLUE,
    "scale": SKY,
    "mask": YELLOW,
    "row_map": GREEN,
    "router": ORANGE,
    "cluster_bias": PINK,
    "bias": GREY,
}
"""what the bytes of a linear are"""
LEVELS = (BLUE, SKY, GREEN, GREY, PINK)
"""kinds of values, whatever they are"""
HEAT = "cividis"

_SETTINGS: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "wexpand",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
}


@contextmanager
def styled() -> Iterator[None]:
    """Our settings for the figures that are made and saved inside."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


def save(figure: Any, name: str, folder: Path) -> str:
    """Write `folder/name.png` and return the figure as the address of an `img`."""
    figure.savefig(folder / f"{name}.png")
    svg = BytesIO()
    # without the date, the same numbers give the same page
    figure.savefig(svg, format="svg", dpi=200, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(svg.getvalue()).decode('ascii')}"
