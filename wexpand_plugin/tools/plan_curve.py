"""The curve of `wexpand plan`, as a table and as a picture."""

import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import WexpandError

if TYPE_CHECKING:
    from ..compress.curve import Curve, Point

__all__ = ["plot", "refuse_plot", "table"]

LEAST = 24
"""columns that are left to the linears, however narrow a terminal"""
NO_BREAK = "\N{NO-BREAK SPACE}"


def table(curve: "Curve", width: int | None = None) -> str:
    """One row per size, and what the plan says of all.

    :param width: columns of a line, where numbers leave room; None: the terminal's
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    lines = [f"{'--size':>7}  {'bits stored':>11}  {'bits read':>9}  {'added loss':>10}  linears"]
    for point in curve.points:
        numbers = f"{point.size:7.4f}  {point.bits:11.2f}  {point.bits_read:9.2f}  "
        numbers += f"{_loss(point):>10}  "
        room = max(width - len(numbers), LEAST)
        # whole parts on a line: their own spaces do not break
        parts = ", ".join(part.replace(" ", NO_BREAK) for part in _linears(point))
        first, *others = (line.replace(NO_BREAK, " ") for line in textwrap.wrap(parts, room))
        lines += [numbers + first, *(" " * len(numbers) + other for other in others)]
    return "\n".join(
        [
            *lines,
            "",
            f"added loss: predicted, nats per token, before tuning, from {curve.tokens} tokens; "
            "above about 0.3 an order rather than a number",
            f"size: bytes of these linears, {curve.share:.0%} of the model, over their dense "
            f"{curve.dense_bits:.0f} bits per weight; {curve.least:.4f} is the smallest",
            "bits per weight: stored, and read by a token",
            f"compressing at any size, tuned, with the same text: about "
            f"{_minutes(curve.seconds_to_compress)} and {curve.memory / 2**30:.2g} GiB beside the "
            f"model on this machine (the plan took {_minutes(curve.seconds)})",
        ]
    )


def _loss(point: "Point") -> str:
    """Predictions far above a model's own loss say no more than that nothing is left of it."""
    return f"{point.added_loss:.4f}" if point.added_loss < 10 else "above 10"


def _linears(point: "Point") -> list[str]:
    """How many linears have which values and zeros."""
    found: dict[str, list[float]] = {}
    for share in point.linears.values():
        kind = "as they are" if share.values == "auto" else share.values
        found.setdefault(kind + (", zeros" if share.sparsity else ""), []).append(share.sparsity)
    parts = []
    for kind, shares in sorted(found.items()):
        name, _, zeros = kind.partition(", ")
        if zeros:
            low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
            name += f" with {low if low == high else f'{low[:-1]}-{high}'} zeros"
        parts.append(f"{len(shares)} {name}")
    return parts


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def refuse_plot(file: Path) -> None:
    """Whether matplotlib is there and knows the format is found before work starts.

    :raises WexpandError: it does not know the ending of the file's name
    """
    from matplotlib.figure import Figure

    if file.suffix[1:] not in Figure().canvas.get_supported_filetypes():
        raise WexpandError(f"plot: {file.name} should end in .png, .svg or .pdf")


def plot(curve: "Curve", file: Path) -> None:
    """Predicted loss against bits per weight, in the format that the file's name ends in."""
    from matplotlib.figure import Figure

    from .report.style import COMPRESSED, SOFT, styled

    with styled():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        bits = [point.bits for point in curve.points]
        losses = [max(point.added_loss, 1e-6) for point in curve.points]
        axes.plot(bits, losses, "o-", color=COMPRESSED, markersize=4)
        for point in curve.points:
            axes.annotate(
                f"{point.size:.3g}", (point.bits, max(point.added_loss, 1e-6)), (4, 4),
                textcoords="offset points", color=SOFT, fontsize=7.5,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("bits per weight (beside the points: --size)")
        axes.set_ylabel("predicted added loss, nats per token")
        axes.set_title(f"{Path(curve.model).name}, before tuning")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
