"""Plots of neurons: how entangled they are, what pruning does to them, who gains from experts."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...method.neurons import wasserstein_neurons
from .data import short_name
from .measure import Distribution, Measured, Measurement, r_squared
from .plots import evenly, grid
from .style import BASE, COMPRESSED, DENSE, HIGHLIGHT, INK, OTHERS

__all__ = ["distributions", "improvement", "wasserstein"]


def wasserstein(wd: Mapping[str, Tensor], percent: float) -> Any:
    """Histogram of WD for each linear; the top `percent` of its neurons in a second colour."""
    names = evenly(list(wd))
    figure, panels = grid(len(names), sharex=True)
    top = max(float(wd[name].max()) for name in names)
    edges = np.linspace(0, top * 1.02 or 1.0, 51)
    for axes, name in zip(panels, names, strict=True):
        values, chosen = wd[name].numpy(), wasserstein_neurons(wd[name], percent).numpy()
        rest = np.delete(values, chosen)
        axes.hist(
            [rest, values[chosen]], edges, stacked=True, histtype="stepfilled",
            color=[OTHERS, HIGHLIGHT],
            label=["other neurons", f"Wasserstein neurons (top {percent:g}%)"],
        )  # fmt: skip
        axes.axvline(values[chosen].min(), color=HIGHLIGHT, linewidth=0.8)
        # a linear scale would hide the few neurons of interest
        axes.set_yscale("symlog", linthresh=10, linscale=0.6)
        axes.set_yticks([0, 10, 100, 1000], ["0", "10", "100", "1000"])
        axes.set_ylim(0, max(100, len(values) / 2))
        axes.minorticks_off()
        axes.set_title(short_name(name))
    _legend(figure, panels[0])
    figure.supxlabel("Wasserstein distance (WD) of the neuron's outputs to a Gaussian", fontsize=9)
    figure.supylabel("neurons", fontsize=9)
    return figure


def distributions(measured: Measurement, compressed: str, pairs: int = 4) -> Any:
    """Outputs of the most entangled neurons of `pairs` linears, and of a median neuron of each.

    :param compressed: what the compressed outputs are called
    """
    chosen = [pair for _, pair in zip(range(pairs), measured.distributions, strict=False)]
    figure, panels = grid(2 * len(chosen), len(chosen), 2.1)
    for row in (0, 1):
        for axes, pair in zip(panels[row * len(chosen) :], chosen, strict=False):
            _outputs(axes, pair[row], compressed)
    for axes in panels[:: len(chosen)]:
        axes.set_ylabel("density")
    _legend(figure, max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[0])))
    figure.supxlabel("output, in standard deviations of the dense neuron", fontsize=9)
    return figure


def _outputs(axes: Any, neuron: Distribution, compressed: str) -> None:
    low, high = np.quantile(neuron.dense.numpy(), (0.002, 0.998))
    low, high = min(low, -3.0), max(high, 3.0)
    edges = np.linspace(low, high, 50)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]

    def density(values: Tensor) -> np.ndarray:
        return np.histogram(values.numpy(), edges)[0] / len(values) / width

    dense = density(neuron.dense)
    experts, highest = density(neuron.expanded), dense.max()
    axes.stairs(dense, edges, fill=True, color=DENSE, alpha=0.45, label="dense")
    if neuron.base is not None:
        base = density(neuron.base)
        highest = max(highest, base.max())
        axes.stairs(base, edges, color=BASE, linewidth=1.2, label="one version")
    axes.stairs(experts, edges, color=COMPRESSED, linewidth=1.2, label=compressed)
    gauss = np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi)
    axes.plot(middle, gauss, color=INK, linewidth=0.9, linestyle=":", label="Gaussian")
    # a spike may be cut: the rest would be flat
    axes.set_ylim(0, min(max(highest, experts.max(), gauss.max()) * 1.05, 6 * gauss.max()))
    axes.set_title(f"{short_name(neuron.linear)} #{neuron.neuron}, WD {neuron.wd:.2f}", fontsize=8)


def improvement(measured: Measurement, percent: float) -> Any:
    """WD against relative improvement, a point for each neuron, one plot for each kind of linear.

    The Wasserstein neurons of each linear in a second colour; R2 of a straight line in the title.
    """
    kinds: dict[str, dict[str, Measured]] = {}
    for name, linear in measured.linears.items():
        if linear.improvement is not None and bool(linear.improvement.isfinite().any()):
            kinds.setdefault(name.rpartition(".")[2], {})[name] = linear
    figure, panels = grid(len(kinds), min(len(kinds), 3), 3.2)
    for axes, (kind, linears) in zip(panels, kinds.items(), strict=True):
        x, y, marked = [], [], []
        for linear in linears.values():
            ratio = linear.improvement
            assert ratio is not None
            known, top = ratio.isfinite(), torch.zeros(len(ratio), dtype=torch.bool)
            top[wasserstein_neurons(linear.wd, percent)] = True
            x.append(linear.wd[known])
            y.append(ratio[known])
            marked.append(top[known])
        wd, ratios, tops = (torch.cat(parts) for parts in (x, y, marked))
        for chosen, colour, size, label in (
            (~tops, OTHERS, 7, "other neurons"),
            (tops, HIGHLIGHT, 14, f"Wasserstein neurons (top {percent:g}% of their linear)"),
        ):
            axes.scatter(
                wd[chosen], ratios[chosen], s=size, alpha=0.65, linewidths=0, rasterized=True,
                color=colour, label=label,
            )  # fmt: skip
        axes.axhline(1, color=INK, linewidth=0.8, linestyle="--")
        # where nothing differs, rounding would be all that is seen
        axes.set_ylim(min(float(ratios.min()), 1) - 0.05, max(float(ratios.max()), 1) + 0.05)
        axes.set_title(f"{kind}: {len(wd)} neurons, R² {_number(r_squared(wd, ratios))}")
        axes.set_xlabel("WD of the dense outputs")
    panels[0].set_ylabel("error of one version / of this model")
    _legend(figure, panels[0])
    return figure


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "undefined"


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), markerscale=2)
