"""(c) What predicts a neuron's improvement under expansion? The paper's Fig. 7.

    python -m evals.paper.improvement [--model DIR] [--seeds 3] [--quick]

Every MLP linear of the dense model is pruned once by SparseGPT and once with 16 experts, at one
sparsity; a neuron's relative improvement is RMSE(SparseGPT) / RMSE(experts) on held-out tokens.
R2 of a straight line through each predictor, per linear. The control deals the same tokens at
random into parts of the same sizes: what improves there is not due to the input.
"""

from statistics import mean
from typing import Any

import torch
from torch import Tensor

from .disentangling import shuffled
from .frame import experiment
from .pictures import COLOURS, per_model
from .pruning import cluster_hessians, experts, hessian, routed_errors, stacked
from .study import CLUSTERS, Study
from .verdicts import Claim

__all__ = ["CAPTION", "QUESTION", "claims", "draw", "measure"]

QUESTION = "What predicts how much a neuron gains from experts?"
CAPTION = (
    "Above: RMSE of one mask over that of 16 experts on held-out tokens, at 80% sparsity, against "
    "the neuron's Wasserstein distance; seed 0, some neurons of all linears. Below: R2 of "
    "what predicts it (grey: for experts of random parts)."
)
SPARSITY = 0.8
POINTS = 800


def rmse(errors: Tensor) -> Tensor:
    """Of each neuron: [tokens, rows] -> [rows]."""
    return errors.square().mean(dim=0).sqrt()


def r_squared(a: Tensor, b: Tensor) -> float:
    """Of a straight line."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1] ** 2)


def measure(study: Study, seed: int) -> dict[str, Any]:
    """A row for each linear, and some neurons of all."""
    rows, points = [], []
    for recorded, test in zip(study.inputs(seed), study.held_out(seed), strict=True):
        weight, router = stacked(recorded.group), study.router(seed, recorded)
        labels, test_labels = router.route(recorded.x), router.route(test.x)
        one = experts(weight, hessian(recorded.x)[None], SPARSITY)[0]
        base = rmse(test.x @ (one - weight).t())
        own = []
        for cluster, test_cluster in (
            (labels, test_labels),
            (shuffled(labels, seed), shuffled(test_labels, seed)),
        ):
            pruned = experts(weight, cluster_hessians(recorded.x, cluster, CLUSTERS), SPARSITY)
            own.append(base / rmse(routed_errors(weight, pruned, test.x, test_cluster)))
        at = 0
        for number, name in enumerate(recorded.group.names):
            scores = study.scores(seed, recorded, number)
            part = slice(at, at := at + len(scores.wd))
            gain, control = own[0][part], own[1][part]
            predictors = {
                "WD": scores.wd, "kurtosis": scores.kurtosis, "MD / MD_null": scores.md_ratio,
                "variance": scores.std.square(), "error of one mask": base[part],
                "weight norm": weight[part].norm(dim=1),
            }  # fmt: skip
            rows.append({
                "linear": name, "gain": float(gain.median()), "control": float(control.median()),
                "R2": {k: r_squared(v, gain) for k, v in predictors.items()},
                "R2 control": {k: r_squared(v, control) for k, v in predictors.items()},
            })  # fmt: skip
            points.append(torch.stack([scores.wd, gain.double(), control.double()]))
    if seed:
        return {"rows": rows}
    every = torch.cat(points, dim=1)
    some = torch.randperm(every.shape[1], generator=torch.Generator().manual_seed(0))[:POINTS]
    return {"rows": rows, "points": every[:, some].T.tolist()}


def claims(found: list[dict[str, Any]]) -> list[Claim]:
    """Means over linears."""

    def r2(predictor: str) -> list[float]:
        return [mean(row["R2"][predictor] for row in one["rows"]) for one in found]

    names = [name for name in found[0]["rows"][0]["R2"] if name != "WD"]
    rivals = [max(values) for values in zip(*map(r2, names), strict=True)]
    gains = [mean(row["gain"] for row in one["rows"]) for one in found]
    control = [mean(row["control"] for row in one["rows"]) for one in found]
    return [
        Claim("Experts err less than one mask",
              "RMSE of one mask over the experts', median neuron", gains, 1.05),
        Claim("... than experts of random parts",
              "the same over that of random parts",
              [a / b for a, b in zip(gains, control, strict=True)], 1.05),
        Claim("WD predicts a neuron's improvement", "R2 of a line (the paper's: 0.24)",
              r2("WD"), 0.1),
        Claim("... better than what is simpler",
              f"its R2 less the best of {', '.join(names)}",
              [a - b for a, b in zip(r2("WD"), rivals, strict=True)], 0.0),
    ]  # fmt: skip


def draw(found: dict[str, list[dict[str, Any]]], figure: Any) -> None:
    """Above neurons, below R2 of each predictor."""
    figure.set_figheight(4.8)
    axes = figure.subplots(2, len(found), squeeze=False)
    for (model, seeds), (above, below) in per_model(found, axes):
        wd, gain, control = zip(*seeds[0]["points"], strict=True)
        above.scatter(wd, control, s=3, alpha=0.4, color="#999999", label="random parts")
        above.scatter(wd, gain, s=3, alpha=0.4, color=COLOURS[0], label="clusters")
        above.axhline(1, color="black", linewidth=0.8)
        above.set(title=model, xlabel="WD to N(0, 1)", ylabel="improvement")
        above.legend(frameon=False, fontsize=6, markerscale=3)
        names = list(seeds[0]["rows"][0]["R2"])
        for shift, key, colour in ((-0.2, "R2", COLOURS[0]), (0.2, "R2 control", "#999999")):
            runs = [[mean(row[key][n] for row in one["rows"]) for one in seeds] for n in names]
            means = [mean(values) for values in runs]
            ends = [[m - min(v) for m, v in zip(means, runs, strict=True)],
                    [max(v) - m for m, v in zip(means, runs, strict=True)]]  # fmt: skip
            places = [i + shift for i in range(len(names))]
            below.bar(places, means, 0.4, yerr=ends, color=colour, error_kw={"linewidth": 0.8})
        below.set_xticks(range(len(names)), [n.replace(" ", "\n", 1) for n in names], fontsize=5)
        below.set_ylabel("R2 with improvement")


if __name__ == "__main__":
    experiment(__file__)
