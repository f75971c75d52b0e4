"""(a) What neurons' outputs look like, by depth, and what Wasserstein distance (WD) goes with.

    python -m evals.paper.distributions [--model DIR] [--seeds 3] [--quick]

For each MLP linear of the dense model: the spread of WD over its neurons, and over the same neurons
the rank correlation of WD with mapping difficulty (MD), with MD over MD_null (what of MD speaks of
inputs and not of the outputs' shape), with kurtosis and absolute skew. The paper shows WD against
MD in one layer; its reviewers asked whether WD is more than skew and kurtosis.
"""

from statistics import mean
from typing import Any

import torch

from wexpand_plugin.method.neuron_summary import summary
from wexpand_plugin.method.neurons import wasserstein_neurons

from .frame import experiment
from .inputs import block_of
from .pictures import curve, kinds, per_model
from .study import Study
from .verdicts import Claim

__all__ = ["CAPTION", "QUESTION", "claims", "draw", "measure"]

QUESTION = "Which neurons are entangled, and what does Wasserstein distance say about them?"
CAPTION = (
    "Above: Wasserstein distance by depth, least of the top 3% of a linear's neurons (solid) "
    "and the median (dashed). Below: neurons of one linear in the middle, a point each."
)
PERCENT = 3.0
POINTS = 300


def measure(study: Study, seed: int) -> dict[str, Any]:
    """A row for each linear, and some neurons of one."""
    rows, shown = [], study.groups[len(study.groups) // 4 * 2].names[-1]
    points: list[list[float]] = []
    for recorded in study.inputs(seed):
        for number, (name, linear) in enumerate(
            zip(recorded.group.names, recorded.group.linears, strict=True)
        ):
            scores = study.scores(seed, recorded, number)
            said = summary(scores, PERCENT)
            norm = linear.weight.detach().norm(dim=1)
            top = wasserstein_neurons(scores.wd, PERCENT)
            rows.append({
                "linear": name, "wd": said["quantiles"]["wd"],
                "spearman": {k: v["spearman"] for k, v in said["correlation_with_wd"].items()},
                "chosen_too": said["chosen_by_other_scores_too"],
                "norm": float(norm[top].mean() / norm.mean()),
                "top_wd": float(scores.wd[top[-1]]),
            })  # fmt: skip
            if name == shown and seed == 0:
                some = torch.randperm(len(norm), generator=torch.Generator().manual_seed(0))
                chosen = torch.cat([top, some[:POINTS]]).unique()
                points = torch.stack([scores.wd, scores.md_ratio, scores.kurtosis])[:, chosen]
                points = points.T.tolist()
    return {"rows": rows} | ({"shown": shown, "points": points} if points else {})


def claims(found: list[dict[str, Any]]) -> list[Claim]:
    """Means over linears."""

    def over(*keys: str) -> list[float]:
        values = []
        for one in found:
            rows = one["rows"]
            for key in keys:
                rows = [row[key] for row in rows]
            values.append(mean(rows))
        return values

    rivals = [max(over("chosen_too", key)[i] for key in ("kurtosis", "abs_skew"))
              for i in range(len(found))]  # fmt: skip
    return [
        Claim("WD goes with mapping difficulty (MD)",
              "rank correlation of WD and MD", over("spearman", "md"), 0.5),
        Claim("... beyond the shape of outputs",
              "rank correlation of WD and MD over MD_null, which the shape cancels from",
              over("spearman", "md_ratio"), 0.3),
        Claim("WD is more than kurtosis or skew",
              "share of the top 3% that the better of them names too", rivals, 0.5, True),
        Claim("Wasserstein neurons have smaller weights",
              "norm of their weights, of the linear's mean", over("norm"), 1.0, True),
    ]  # fmt: skip


def draw(found: dict[str, list[dict[str, Any]]], figure: Any) -> None:
    """Above WD by depth, below neurons of one linear."""
    figure.set_figheight(4.8)
    axes = figure.subplots(2, len(found), squeeze=False)
    for (model, seeds), (above, below) in per_model(found, axes):
        for kind, colour in kinds(row["linear"] for row in seeds[0]["rows"]):
            for key, style in (("median", "--"), ("top", "-")):
                runs = [
                    {
                        block_of(row["linear"]): row["wd"]["0.5"] if key == "median"
                        else row["top_wd"]
                        for row in one["rows"]
                        if row["linear"].endswith(kind)
                    }
                    for one in seeds
                ]  # fmt: skip
                curve(above, runs, style, color=colour, label=kind if key == "top" else None)
        above.set(title=model, xlabel="block", ylabel="WD to N(0, 1)")
        above.legend(frameon=False, fontsize=6)
        wd, ratio, kurtosis = zip(*seeds[0]["points"], strict=True)
        below.scatter(wd, ratio, c=[min(k, 10) for k in kurtosis], s=6, cmap="viridis")
        below.set(title=seeds[0]["shown"], xlabel="WD", ylabel="MD / MD_null")
        below.annotate("colour: kurtosis, up to 10", (0.98, 0.02), xycoords="axes fraction",
                       ha="right", fontsize=6)  # fmt: skip


if __name__ == "__main__":
    experiment(__file__)
