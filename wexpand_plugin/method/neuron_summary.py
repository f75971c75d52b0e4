"""What `neuron_scores.json` shows of a linear, and whether WD says more than simpler scores.

A score that ranks the neurons as WD does, or would have chosen the same ones, could replace it.
"""

from typing import Any

import torch
from torch import Tensor

from .neurons import NeuronScores, wasserstein_neurons

__all__ = ["summary"]

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_TOP = 10


def summary(scores: NeuronScores, percent: float) -> dict[str, Any]:
    """The numbers, strings and None (undefined) that `neuron_scores.json` shows of a linear.

    `percent` of its neurons, the top by WD, are called Wasserstein neurons.
    """
    shown = {
        name: values.double().cpu()
        for name, values in (scores._asdict() | {"md_ratio": scores.md_ratio}).items()
        if values is not None
    }
    others = {name: values for name, values in shown.items() if name not in ("wd", "mean", "skew")}
    others |= {"abs_mean": shown["mean"].abs(), "abs_skew": shown["skew"].abs()}
    chosen = wasserstein_neurons(shown["wd"], percent)
    return {
        "wasserstein_neurons": chosen.tolist(),
        "top": [
            {"neuron": neuron} | {name: _number(values[neuron]) for name, values in shown.items()}
            for neuron in chosen[:_TOP].tolist()
        ],
        "quantiles": {
            name: {f"{q:g}": _quantile(values, q) for q in _QUANTILES}
            for name, values in shown.items()
        },
        "correlation_with_wd": {
            name: {
                "pearson": _correlation(shown["wd"], values),
                "spearman": _correlation(shown["wd"], values, ranks=True),
            }
            for name, values in others.items()
        },
        # the share of the Wasserstein neurons that another score would have chosen as well
        "chosen_by_other_scores_too": {
            name: _overlap(chosen, values, percent) for name, values in others.items()
        },
        "share_of_neurons": {
            "skewed (|skew| > 1)": _number((shown["skew"].abs() > 1).double().mean()),
            "heavy tails (kurtosis > 1)": _number((shown["kurtosis"] > 1).double().mean()),
            "light tails or two modes (kurtosis < -1)": _number(
                (shown["kurtosis"] < -1).double().mean()
            ),
            "constant": _number((shown["std"] == 0).double().mean()),
            "md undefined": _number(shown["md"].isnan().double().mean()),
        },
    }


def _number(value: Tensor) -> float | None:
    """A JSON number of six digits; None for what is undefined."""
    return float(f"{value.item():.6g}") if bool(value.isfinite()) else None


def _quantile(values: Tensor, q: float) -> float | None:
    values = values[values.isfinite()]
    return _number(values.quantile(q)) if values.numel() else None


def _correlation(a: Tensor, b: Tensor, ranks: bool = False) -> float | None:
    """Pearson's, or with `ranks` Spearman's, over neurons where both are defined."""
    both = a.isfinite() & b.isfinite()
    a, b = a[both], b[both]
    if a.numel() < 3:
        return None
    if ranks:
        from scipy.stats import rankdata  # comes with scikit-learn, slow to import

        a, b = (torch.from_numpy(rankdata(values.numpy())) for values in (a, b))
    return _number(torch.corrcoef(torch.stack((a, b)))[0, 1])


def _overlap(chosen: Tensor, values: Tensor, percent: float) -> float | None:
    others = wasserstein_neurons(values.nan_to_num(nan=-torch.inf), percent)
    return _number(torch.isin(chosen, others).double().mean())
