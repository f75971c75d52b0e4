"""(f) Do negative pre-activations of Wasserstein neurons carry grammar (arXiv 2509.24198)?

    python -m evals.paper.blimp --model smollm2 --data FOLDER --seeds 1 [--quick]

The input of an MLP's activation function, here the output of gate_proj, is clamped to zero from
below for the top 1% of every block's neurons by Wasserstein distance; positive outputs and all
other neurons stay as they are. Then BLiMP is asked: pairs of sentences, of which one is
grammatical, and it should be the more likely one, by its summed log-probability.

The controls clamp as many neurons that are no Wasserstein neurons: random ones, and for each
Wasserstein neuron the one nearest to it in negative mass, the mean of what clamping takes away.
Where Wasserstein neurons have more of it than any other, that match falls short; "mass" says how
far. The loss added on other text says whether it is grammar alone that suffers.

FOLDER/blimp has BLiMP's 67 sets (*.jsonl). A model of Python code is not asked.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wexpand_plugin.method.neurons import wasserstein_distance, wasserstein_neurons

from .frame import Skipped, experiment
from .inputs import input_groups, record
from .pictures import COLOURS, per_model
from .study import Study
from .verdicts import Claim

__all__ = [
    "CAPTION", "QUESTION", "Pair", "clamped", "claims", "draw", "log_probabilities", "measure",
    "nearest", "pairs",
]  # fmt: skip

QUESTION = "Do negative pre-activations of Wasserstein neurons carry grammar?"
CAPTION = (
    "BLiMP accuracy by field when negative pre-activations of 1% of each MLP's neurons, in all "
    "blocks, are clamped to zero. Bars: mean over seeds, with a standard error of the pairs; the "
    "line is chance. In brackets the loss added on held-out text, nats per token."
)
PERCENT = 1.0
PAIRS = 20
"""of each of the 67 sets"""
BATCH = 32

DENSE, TOP, RANDOM, MASS = "dense", "Wasserstein", "random", "equal mass"


class Pair(NamedTuple):
    """Two sentences, the grammatical one first."""

    field: str
    good: str
    bad: str


def pairs(folder: Path, each: int, seed: int) -> list[Pair]:
    """`each` pairs of every set in `folder`, drawn by `seed`, in the order of the sets' names."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        lines = file.read_text(encoding="utf8").splitlines()
        for line in random.Random(f"{seed} {file.stem}").sample(lines, each):
            item = json.loads(line)
            # one of the sets spells it with a slash
            field = item["field"].replace("/", "_")
            found.append(Pair(field, item["sentence_good"], item["sentence_bad"]))
    return found


@torch.no_grad()
def log_probabilities(model: Any, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Log-probability of each sentence, summed over its tokens: float32 [sentences].

    All start with the tokenizer's first token, so that a sentence's own first token counts.
    """
    ids = [
        [tokenizer.bos_token_id, *tokenizer.encode(sentence, add_special_tokens=False)]
        for sentence in sentences
    ]
    found = torch.empty(len(ids))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for at in range(0, len(order), BATCH):
        part = order[at : at + BATCH]
        width = len(ids[part[-1]])
        # attention looks back only: what pads on the right is not seen
        batch = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in part])
        lengths = torch.tensor([len(ids[i]) for i in part])
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        each = -nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none")
        inside = torch.arange(1, width) < lengths[:, None]
        found[part] = each.where(inside, 0).sum(dim=1)
    return found


def nearest(values: Tensor, chosen: Tensor) -> Tensor:
    """For each chosen neuron another, not chosen, of the nearest value; each at most once.

    Those of the largest values choose first: they have the fewest neighbours.
    """
    free = torch.ones(len(values), dtype=torch.bool)
    free[chosen] = False
    found = torch.empty_like(chosen)
    for at in values[chosen].argsort(descending=True).tolist():
        gaps = (values - values[chosen[at]]).abs()
        found[at] = gaps.where(free, math.inf).argmin()
        free[found[at]] = False
    return found


@contextmanager
def clamped(neurons: dict[nn.Linear, Tensor]) -> Iterator[None]:
    """Outputs of some neurons of some linears clamped to zero from below for a while."""

    def hook(which: Tensor) -> Any:
        def clamp(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[..., which] = output[..., which].clamp(min=0)
            return output

        return clamp

    handles = [linear.register_forward_hook(hook(which)) for linear, which in neurons.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def chosen(study: Study, seed: int) -> tuple[dict[str, dict[nn.Linear, Tensor]], dict[str, float]]:
    """Condition -> gate -> its clamped neurons; and their negative mass, mean over all."""
    every = input_groups(study.network, 1, torch.tensor([[0, 1]]))
    gates = [g for g in every if any(name.endswith(".gate_proj") for name in g.names)]
    if not gates:
        raise Skipped("it has no gate_proj, whose outputs this is about")
    neurons: dict[str, dict[nn.Linear, Tensor]] = {TOP: {}, RANDOM: {}, MASS: {}}
    masses: dict[str, list[float]] = {name: [] for name in neurons}
    generator = torch.Generator().manual_seed(seed)
    ids = study.rows(study.home, "train", study.tokens, seed)
    for group, x in record(study.network, gates, ids):
        names = [name.endswith(".gate_proj") for name in group.names]
        linear = group.linears[names.index(True)]
        y = linear(x)
        mass = (-y).clamp(min=0).mean(dim=0)
        top = wasserstein_neurons(wasserstein_distance(y), PERCENT)
        shuffled = torch.randperm(len(mass), generator=generator)
        others = shuffled[~torch.isin(shuffled, top)][: len(top)]
        for name, which in ((TOP, top), (RANDOM, others), (MASS, nearest(mass, top))):
            neurons[name][linear] = which
            masses[name].append(float(mass[which].mean()))
    return neurons, {name: mean(values) for name, values in masses.items()}


@torch.no_grad()
def measure(study: Study, seed: int) -> dict[str, Any]:
    """Which pairs are told apart, by field ("1" or "0" each), and the held-out loss, by condition.

    :raises Skipped: a model of code, one without gates, or no BLiMP at hand
    """
    if study.home == "library":
        raise Skipped("a model of code is not asked for the grammar of English")
    folder = None if study.data is None else study.data / "blimp"
    if folder is None or not any(folder.glob("*.jsonl")):
        raise Skipped(f"--data: {study.data} should have blimp/*.jsonl")
    asked = pairs(folder, 2 if study.quick else PAIRS, seed)
    neurons, mass = chosen(study, seed)
    right: dict[str, dict[str, str]] = {}
    loss: dict[str, float] = {}
    for name, which in ({DENSE: {}} | neurons).items():
        with clamped(which):
            sentences = [pair.good for pair in asked] + [pair.bad for pair in asked]
            found = log_probabilities(study.network, study.tokenizer, sentences)
            good, bad = found.split(len(asked))
            loss[name] = study.loss()
        right[name] = {}
        for pair, told in zip(asked, (good > bad).tolist(), strict=True):
            right[name][pair.field] = right[name].get(pair.field, "") + str(int(told))
    return {"right": right, "loss": loss, "mass": mass}


def bits(one: dict[str, Any], name: str, field: str | None = None) -> Tensor:
    """1 for each pair told apart under a condition, of a field or of all."""
    fields = one["right"][name]
    text = "".join(fields.values()) if field is None else fields[field]
    return torch.tensor([int(c) for c in text]).double()


def lost(one: dict[str, Any], more: str, less: str) -> float:
    """Accuracy under `more` less that under `less`, in standard errors of the same pairs."""
    gap = bits(one, more) - bits(one, less)
    error = float(gap.std()) / math.sqrt(len(gap))
    return float(gap.mean()) / error if error else 0.0


def claims(found: list[dict[str, Any]]) -> list[Claim]:
    """Accuracy lost, in standard errors over pairs, and the loss added."""

    def over(more: str) -> list[float]:
        return [lost(one, more, TOP) for one in found]

    def of_loss(name: str) -> list[float]:
        return [(one["loss"][name] - one["loss"][DENSE]) / (one["loss"][TOP] - one["loss"][DENSE])
                for one in found]  # fmt: skip

    return [
        Claim("Their negative side carries grammar",
              "BLiMP accuracy lost by clamping it, in standard errors of the paired difference",
              over(DENSE), 2),
        Claim("... more than random neurons' does",
              "accuracy with random neurons clamped less that with Wasserstein neurons, likewise",
              over(RANDOM), 2),
        Claim("... than that of equal negative mass",
              "the same of neurons of the nearest negative mass", over(MASS), 2),
        Claim("It carries other text, too, beyond random ones",
              "loss added by clamping random neurons, of that by Wasserstein neurons",
              of_loss(RANDOM), 0.9, True),
        Claim("... beyond those of equal mass",
              "the same of neurons of the nearest negative mass", of_loss(MASS), 0.9, True),
    ]  # fmt: skip


def draw(found: dict[str, list[dict[str, Any]]], figure: Any) -> None:
    """Bars of accuracy by field and condition."""
    axes = figure.subplots(1, len(found), squeeze=False)
    for (model, seeds), (one,) in per_model(found, axes):
        names = list(seeds[0]["right"])
        fields = [None, *sorted(seeds[0]["right"][DENSE])]
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            runs = [torch.cat([bits(seed, name, field) for seed in seeds]) for field in fields]
            added = mean(seed["loss"][name] - seed["loss"][DENSE] for seed in seeds)
            places = [i + (number - len(names) / 2 + 0.5) * width for i in range(len(fields))]
            one.bar(places, [float(run.mean()) for run in runs], width,
                    yerr=[float(run.std()) / math.sqrt(len(run)) for run in runs],
                    color=COLOURS[number], error_kw={"linewidth": 0.8},
                    label=name if name == DENSE else f"{name} ({added:+.3f})")  # fmt: skip
        one.axhline(0.5, color="black", linewidth=0.8)
        one.set_xticks(range(len(fields)), [(f or "all").replace("_", "\n") for f in fields],
                       fontsize=7)  # fmt: skip
        one.set(title=model, ylabel="BLiMP accuracy", ylim=(0.3, 1))
        one.legend(frameon=False, fontsize=6, ncols=2)


if __name__ == "__main__":
    experiment(__file__)
