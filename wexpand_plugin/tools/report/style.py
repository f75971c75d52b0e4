"""How the plots look, and how a matplotlib figure gets into the page.

The palette is Okabe and Ito's, which readers with colour-blindness can tell apart. In the page a
figure is inline SVG whose colours are CSS variables, so that it follows the reader's light or dark
theme; the PNG files have a white background.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "HEAT", "INK", "SOFT", "save", "styled"]

INK, LINE, SOFT = "#1c2024", "#d3d8de", "#8a929c"
COLOURS = {
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "yellow": "#e69f00",
    "grey": "#9aa2ac",
}
"""their names are those of the page's CSS variables, too"""
HEAT = "cividis"

_VARIABLES = {INK: "ink", LINE: "line", SOFT: "soft"} | {v: k for k, v in COLOURS.items()}
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
    """Write `folder/name.png` and return the figure as SVG that can stand in an HTML page."""
    figure.savefig(folder / f"{name}.png", facecolor="white")
    buffer = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # in an HTML page the parser knows the namespaces of SVG
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    # identifiers must differ between the figures of a page
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1
    )
    for colour, variable in _VARIABLES.items():
        svg = re.sub(rf"{colour}\b", f"var(--{variable})", svg, flags=re.IGNORECASE)
    return svg
