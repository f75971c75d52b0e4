"""(d) Does expansion disentangle? WD and MD within clusters, against random parts of equal sizes.

    python -m evals.paper.disentangling [--model DIR] [--seeds 3] [--quick]

The paper: WD, averaged over the clusters by their tokens, is smaller than WD of the whole, most of
all for Wasserstein neurons. Its reviewers asked for the control: the same tokens dealt at random
into parts of the clusters' sizes. A part is small, so its WD has a higher noise floor than the
whole's; against the random parts that cancels. MD's N_x is the largest distance of a part's own
pairs, smaller in a cluster, so MD over MD_null is shown too.
"""

from statistics import mean
from typing import Any

import torch
from torch import Tensor

from wexpand_plugin.method.neurons import NeuronScores, neuron_scores, wasserstein_neurons

from .frame import experiment
from .inputs import block_of
from .pictures import curve, kinds, per_model
from .study import Study
from .verdicts import Claim

__all__ = ["CAPTION", "QUESTION", "claims", "draw", "measure", "shuffled"]

QUESTION = "Does expansion disentangle neurons?"
CAPTION = (
    "WD within 16 clusters over WD within random parts of the same sizes, median over Wasserstein "
    "neurons (top 3%, solid) and over all neurons (dashed); below 1 clusters are more Gaussian."
)
PERCENT = 3.0


def shuffled(labels: Tensor, seed: int) -> Tensor:
    """The same labels, dealt at random: parts of equal sizes."""
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def compared(own: NeuronScores, chance: NeuronScores) -> dict[str, dict[str, float]]:
    """Medians over Wasserstein neurons ("top") and over all: of a neuron's mean over clusters,
    over the same of the whole and of random parts, and the share of neurons where it is less."""
    assert own.cluster_wd is not None and chance.cluster_wd is not None
    assert own.cluster_md is not None and chance.cluster_md is not None
    assert own.cluster_md_null is not None and chance.cluster_md_null is not None
    ratios = {
        "wd": (own.cluster_wd / own.wd, own.cluster_wd / chance.cluster_wd),
        "md": (own.cluster_md / own.md, own.cluster_md / chance.cluster_md),
        "md_ratio": (
            own.cluster_md / own.cluster_md_null / own.md_ratio,
            own.cluster_md / own.cluster_md_null * chance.cluster_md_null / chance.cluster_md,
        ),
    }
    top = wasserstein_neurons(own.wd, PERCENT)
    found = {}
    for name, (whole, control) in ratios.items():
        found[name] = {
            "top_of_whole": float(whole[top].nanmedian()),
            "all_of_whole": float(whole.nanmedian()),
            "top_of_random": float(control[top].nanmedian()),
            "all_of_random": float(control.nanmedian()),
            "top_less_than_random": float((control[top] < 1).double().mean()),
        }
    return found


def measure(study: Study, seed: int) -> dict[str, Any]:
    """A row for each linear."""
    rows = []
    for recorded in study.inputs(seed):
        labels = study.router(seed, recorded).route(recorded.x)
        random = shuffled(labels, seed)
        for number, (name, linear) in enumerate(
            zip(recorded.group.names, recorded.group.linears, strict=True)
        ):
            own = study.scores(seed, recorded, number)
            weight = linear.weight.detach()
            chance = neuron_scores(recorded.x, weight, labels=random, seed=seed)
            rows.append({"linear": name} | compared(own, chance))
    return {"rows": rows}


def claims(found: list[dict[str, Any]]) -> list[Claim]:
    """Means over linears of medians over neurons."""

    def over(score: str, key: str) -> list[float]:
        return [mean(row[score][key] for row in one["rows"]) for one in found]

    top, every = over("wd", "top_of_random"), over("wd", "all_of_random")
    beside = [a / b for a, b in zip(top, every, strict=True)]
    return [
        Claim("Clusters lower WD of Wasserstein neurons",
              "WD within clusters, of WD of the whole", over("wd", "top_of_whole"), 0.9, True),
        Claim("... more than random parts do",
              "WD within clusters, of WD within random parts", top, 0.9, True),
        Claim("... more than of other neurons",
              "the last, of the same for all neurons", beside, 0.9, True),
        Claim("Clusters lower their MD likewise",
              "MD within clusters, of MD within random parts", over("md", "top_of_random"), 0.95,
              True),
        Claim("... beyond the spread of inputs",
              "the same of MD over MD_null", over("md_ratio", "top_of_random"), 0.95, True),
    ]  # fmt: skip


def draw(found: dict[str, list[dict[str, Any]]], figure: Any) -> None:
    """WD within clusters by depth."""
    axes = figure.subplots(1, len(found), squeeze=False)
    for (model, seeds), (one,) in per_model(found, axes):
        for kind, colour in kinds(row["linear"] for row in seeds[0]["rows"]):
            for key, style in (("top", "o-"), ("all", "o--")):
                runs = [
                    {block_of(row["linear"]): row["wd"][f"{key}_of_random"]
                     for row in one["rows"] if row["linear"].endswith(kind)}
                    for one in seeds
                ]  # fmt: skip
                curve(one, runs, style, color=colour, label=kind if key == "top" else None)
        one.axhline(1, color="black", linewidth=0.8)
        one.set(title=model, xlabel="block", ylabel="WD in clusters / in random parts")
        one.legend(frameon=False, fontsize=6)


if __name__ == "__main__":
    experiment(__file__)
