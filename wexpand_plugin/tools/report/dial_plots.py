"""What `sparsity: auto` chose: the curve with the chosen point, what each linear got, and why."""

from typing import Any, NamedTuple

from .data import ReportData, short_name
from .style import COMPRESSED, HIGHLIGHT, LEVELS, SOFT

__all__ = ["Chosen", "chosen", "curve", "settings"]

FLOOR = 1e-7
"""nats; less is drawn here"""


class Chosen(NamedTuple):
    """The numbers of the page's sentences."""

    loss: float
    """predicted over all linears, nats per token"""
    size: float
    """of the chosen point, of dense bytes; one version of each row"""
    most: str
    """the linear that is predicted to add most"""
    share: float
    """its share of the loss"""
    dense: int
    """linears that were left as they are"""


def chosen(data: ReportData) -> Chosen | None:
    """None: settings were not chosen."""
    about, losses = (data.sizes.made_by.get(key) for key in ("dial", "predicted_loss"))
    if not about or not losses:
        return None
    loss = sum(losses.values())
    most = max(losses, key=lambda name: losses[name])
    dense = len(about["linears"]) - len(losses)
    return Chosen(loss, _here(data)[0], most, losses[most] / max(loss, FLOOR), dense)


def _here(data: ReportData) -> tuple[float, float]:
    """The point of the curve that was chosen: size and loss."""
    loss = sum(data.sizes.made_by["predicted_loss"].values())
    points = data.sizes.made_by["dial"]["curve"]
    size, nearest = min(points, key=lambda point: abs(point[1] - loss))
    return size, nearest


def curve(data: ReportData) -> Any:
    """Predicted loss against size, and the point that was chosen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.9), layout="constrained")
    axes = figure.subplots()
    sizes, losses = zip(*data.sizes.made_by["dial"]["curve"], strict=True)
    axes.plot(sizes, [max(loss, FLOOR) for loss in losses], "-", color=COMPRESSED)
    size, loss = _here(data)
    axes.plot([size], [max(loss, FLOOR)], "o", color=HIGHLIGHT, markersize=7)
    axes.annotate(
        f"chosen: {size:.3g} × dense, {loss:.3g} nats", (size, max(loss, FLOOR)), (8, 8),
        textcoords="offset points", fontsize=8.5,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("size, × dense")
    axes.set_ylabel("predicted loss, nats")
    return figure


def settings(data: ReportData) -> Any:
    """Of each linear: bits, zeros, predicted loss, and what its next and last bytes are worth."""
    from matplotlib.figure import Figure

    losses, why = data.sizes.made_by["predicted_loss"], data.sizes.made_by["dial"]["linears"]
    linears = [linear for linear in data.linears if linear.name in losses]
    places = range(len(linears))
    figure = Figure(figsize=(10, max(0.2 * len(linears), 1.2) + 1.3), layout="constrained")
    bits, added, worth = figure.subplots(1, 3, sharey=True)
    kinds = sorted({linear.values.partition(",")[0] for linear in linears})
    for kind, colour in zip(kinds, LEVELS, strict=False):
        own = [n for n in places if linears[n].values.partition(",")[0] == kind]
        weights = [linears[n].in_features * linears[n].out_features for n in own]
        stored = [8 * linears[n].stored_bytes for n in own]
        bits.barh(
            own, [b / w for b, w in zip(stored, weights, strict=True)], color=colour, height=0.7,
            label=kind,
        )  # fmt: skip
    for n, linear in enumerate(linears):
        if linear.sparsity:
            zeros = f"{linear.sparsity:.0%} zeros"
            bits.text(0.05, n, zeros, va="center", fontsize=7, color="white")
    bits.set_xlabel("bits per weight, stored")
    bits.legend(loc="lower right")
    own_losses = [max(losses[linear.name], FLOOR) for linear in linears]
    added.plot(own_losses, places, "o", color=COMPRESSED, markersize=3.5)
    added.set_xlabel("predicted loss, nats")
    for n, linear in enumerate(linears):
        reason = why.get(linear.name, {})
        following, last = reason.get("next"), reason.get("last")
        if following and last:
            worth.plot([following, last], [n, n], "-", color=SOFT, linewidth=1)
        if following:
            worth.plot([following], [n], ">", color=COMPRESSED, markersize=3.5)
        if last:
            worth.plot([last], [n], "<", color=HIGHLIGHT, markersize=3.5)
    worth.set_xlabel("nats per MB, of more and of fewer")
    for axes in (added, worth):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    bits.set_yticks(places, [short_name(linear.name) for linear in linears])
    bits.invert_yaxis()
    return figure
