"""(b) Do Wasserstein neurons suffer most from sparsity, the paper's Fig. 3, and is it their error?

    python -m evals.paper.entangled_neurons [--model DIR] [--seeds 3] [--quick]

In every MLP linear the top 3% of the neurons by one criterion are pruned by SparseGPT, row by row;
all other neurons stay exactly dense (given the Hessian, rows do not see each other). The loss that
this adds says how much the criterion's neurons matter. Criteria: Wasserstein distance, excess
kurtosis, mean (absolute) and variance of the output, weight norm, error of the neuron pruned to
95%, and a random choice.

At equal sparsity some neurons lose more of their output than others. The causal variant takes that
away: in each linear every criterion's neurons are pruned so far that their squared error, summed,
is the same, namely what the criterion that errs least reaches at 99%. What differs then is not how
much of the outputs is lost but whose.

Calibration inputs are those of the dense model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from wexpand_plugin.method.neurons import NeuronScores, wasserstein_neurons
from wexpand_plugin.method.solvers.sparsegpt import solve

from .frame import experiment
from .pictures import COLOURS, per_model
from .pruning import ROW, hessian
from .study import Study
from .verdicts import Claim

__all__ = ["CAPTION", "QUESTION", "claims", "draw", "equal_error", "measure"]

QUESTION = "Do Wasserstein neurons suffer most from sparsity?"
CAPTION = (
    "Loss added when only 3% of each linear's neurons are pruned, chosen by each criterion: to "
    "equal sparsities, and to equal squared error of the linear's output. Bars: mean and range "
    "over seeds."
)
PERCENT = 3.0
LEVELS = (0.8, 0.95)
MOST = 0.99
"""sparsity that is not exceeded for an equal error"""
STEPS = 7
EQUAL = "equal error"


def criteria(scores: NeuronScores, weight: Tensor, h: Tensor, seed: int) -> dict[str, Tensor]:
    """Each criterion's value for each neuron [out]; more is more important."""
    change = solve(weight, h[None], 0.95, ROW).weights[0] - weight
    return {
        "WD": scores.wd,
        "kurtosis": scores.kurtosis,
        "mean": scores.mean.abs(),
        "variance": scores.std.square(),
        "weight norm": weight.norm(dim=1),
        "error": squared_errors(change, h),
        "random": torch.rand(len(weight), generator=torch.Generator().manual_seed(seed)),
    }


def squared_errors(change: Tensor, h: Tensor) -> Tensor:
    """Mean squared change of each neuron's output [out], for a change of weights [out, in]."""
    return ((change @ h) * change).sum(dim=1)


def equal_error(weight: Tensor, h: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
    """Sparsities at which sets of neurons have the same squared error, by bisection.

    A sparsity is a whole number of weights per neuron; the few percent that this leaves between
    the sets go by scaling what pruning changed.

    :param sets: neurons of each set [sets, neurons]
    :return: sparsity of each set [sets]; its neurons' weights then [sets, neurons, in]
    """
    rows = weight[sets.flatten()]

    def at(sparsity: Tensor) -> tuple[Tensor, Tensor]:
        each = sparsity.repeat_interleave(sets.shape[1])
        pruned = solve(rows, h[None], each, ROW).weights[0]
        errors = squared_errors(pruned - rows, h).view(sets.shape).sum(dim=1)
        return errors, pruned.view(*sets.shape, -1)

    low, high = torch.zeros(len(sets)).double(), torch.full((len(sets),), MOST).double()
    errors, pruned = at(high)
    target = errors.min()
    # the one that has it stays where it is
    low[errors.argmin()] = MOST
    for _ in range(STEPS):
        middle = (low + high) / 2
        errors, pruned = at(middle)
        less = errors < target
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    scale = (target / errors).sqrt().view(-1, 1, 1)
    dense = rows.view(pruned.shape)
    return middle, dense + scale * (pruned - dense)


@contextmanager
def replaced(rows: dict[nn.Linear, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Rows (which, weights) of some linears replaced for a while."""
    dense = {linear: linear.weight[which].clone() for linear, (which, _) in rows.items()}
    try:
        for linear, (which, weights) in rows.items():
            linear.weight[which] = weights
        yield
    finally:
        for linear, (which, _) in rows.items():
            linear.weight[which] = dense[linear]


@torch.no_grad()
def measure(study: Study, seed: int) -> dict[str, Any]:
    """Loss added by criterion, at each level of sparsity and at equal error."""
    # what -> criterion -> linear -> (which rows, their weights)
    cases: dict[str, dict[str, dict[nn.Linear, tuple[Tensor, Tensor]]]] = {}
    sparsities: dict[str, list[float]] = {}
    for recorded in study.inputs(seed):
        h = hessian(recorded.x)
        for number, linear in enumerate(recorded.group.linears):
            weight = linear.weight.detach()
            values = criteria(study.scores(seed, recorded, number), weight, h, seed)
            sets = torch.stack([wasserstein_neurons(v, PERCENT) for v in values.values()])
            for level in LEVELS:
                pruned = solve(weight[sets.flatten()], h[None], level, ROW).weights[0]
                for name, which, own in zip(
                    values, sets, pruned.view(*sets.shape, -1), strict=True
                ):
                    cases.setdefault(f"{level:g}", {}).setdefault(name, {})[linear] = which, own
            found, pruned = equal_error(weight, h, sets)
            for name, which, own, sparsity in zip(
                values, sets, pruned, found.tolist(), strict=True
            ):
                cases.setdefault(EQUAL, {}).setdefault(name, {})[linear] = which, own
                sparsities.setdefault(name, []).append(sparsity)
    dense = study.keep(seed, "loss", study.loss)
    added: dict[str, dict[str, float]] = {}
    for case, by_criterion in cases.items():
        for name, rows in by_criterion.items():
            with replaced(rows):
                added.setdefault(case, {})[name] = study.loss() - dense
    return {
        "dense": dense, "added": added,
        "sparsity at equal error": {k: mean(v) for k, v in sparsities.items()},
    }  # fmt: skip


def claims(found: list[dict[str, Any]]) -> list[Claim]:
    """Loss added by other neurons, of that by Wasserstein neurons (the larger: no noise below)."""

    def over(case: str, *others: str) -> list[float]:
        added = [one["added"][case] for one in found]
        return [max(one[other] for other in others) / one["WD"] for one in added]

    most, mark = f"{LEVELS[-1]:g}", 0.9
    at, papers = f"at {LEVELS[-1]:.0%} zeros", ("mean", "variance", "weight norm", "random")
    return [
        Claim("They bear sparsity worse than random ones",
              f"loss added by random neurons {at}, of that by Wasserstein neurons",
              over(most, "random"), mark, True),
        Claim("... than the paper's other criteria'",
              f"the same by the most of {', '.join(papers)}", over(most, *papers), mark, True),
        Claim("... than those of high kurtosis or error",
              "the same by the more of the two", over(most, "kurtosis", "error"), mark, True),
        Claim("At equal error, worse than random ones",
              "as b1, at equal squared error", over(EQUAL, "random"), mark, True),
        Claim("... than all other criteria'",
              "the same by the most of the others",
              over(EQUAL, *papers, "kurtosis", "error"), mark, True),
    ]  # fmt: skip


def draw(found: dict[str, list[dict[str, Any]]], figure: Any) -> None:
    """Bars of loss added by case and criterion."""
    axes = figure.subplots(1, len(found), squeeze=False)
    for (model, seeds), (one,) in per_model(found, axes):
        cases = list(seeds[0]["added"])
        names = list(seeds[0]["added"][cases[0]])
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            runs = [[seed["added"][case][name] for seed in seeds] for case in cases]
            means = [mean(values) for values in runs]
            ends = [[m - min(v) for m, v in zip(means, runs, strict=True)],
                    [max(v) - m for m, v in zip(means, runs, strict=True)]]  # fmt: skip
            places = [i + (number - len(names) / 2 + 0.5) * width for i in range(len(cases))]
            one.bar(places, means, width, yerr=ends, color=COLOURS[number], label=name,
                    error_kw={"linewidth": 0.8})  # fmt: skip
        labels = [case if case == EQUAL else f"{float(case):.0%} zeros" for case in cases]
        one.set_xticks(range(len(cases)), labels)
        one.set(title=model, ylabel="loss added, nats per token")
        one.legend(frameon=False, fontsize=6)


if __name__ == "__main__":
    experiment(__file__)
