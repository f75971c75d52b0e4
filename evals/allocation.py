"""What should bytes be spent on? The recipe's `allocate_by` at equal bytes, by held-out loss.

    python -m evals.allocation [--sparsity 0.8 ...] [--budget 1.0 ...] [--allocate-by gain ...]
                               [--seeds 3] [--path full] [--single 0.74 ...] [--dataset pocket]
                               [--model evals/pocket/model] [--json FILE]

The MLP linears of the model are expanded with 16 experts (`evals.expansion`: solved once for each
sparsity and seed, then allocated for every budget and rule over the whole model) and the held-out
loss is measured. A seed decides the calibration text, the clusters and, for `random`, the neurons.
Beside each loss stands the share of full expansion's gain that it recovers, (SparseGPT - loss) /
(SparseGPT - full) with the SparseGPT (one expert) and full expansion of the same seed and sparsity,
and the bytes stored and read by a token over dense.

Later linears are calibrated on fully expanded earlier ones, as by the recipe (`budget_scope:
model`), which favours no rule. `--path budget` calibrates on earlier ones within the budget.

`--single` adds plain SparseGPT, one expert, at other sparsities: what the bytes that a token reads
buy without experts.

Cells found in the JSON file are not run again, so an interrupted run goes on, and several
processes may fill one file, each with its own sparsities.
"""

import fcntl
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.paper.inputs import label
from evals.pocket import MODEL, corpus

__all__ = ["summary", "training_texts"]

RULES = ("gain", "wasserstein", "gain_wasserstein", "kurtosis", "random")
CONTEXT = 256


def training_texts(dataset: str, seed: int) -> list[str]:
    """Calibration texts: of the pocket corpus, or the first nine tenths of a JSON list of texts."""
    import random

    if dataset == "pocket":
        return corpus.excerpts("train", count=400, characters=1000, seed=seed)
    texts = json.loads(Path(dataset).read_text(encoding="utf8"))
    train = texts[: len(texts) * 9 // 10]
    random.Random(seed).shuffle(train)
    return train


def held_out_texts(dataset: str) -> list[str] | str:
    """Texts that no calibration sees."""
    if dataset == "pocket":
        return "pocket"
    texts = json.loads(Path(dataset).read_text(encoding="utf8"))
    return texts[len(texts) * 9 // 10 :]


class Bench:
    """One model and its held-out text."""

    def __init__(self, model: str, dataset: str, calibration: int, tokens: int):
        from transformers import AutoTokenizer

        self.model, self.dataset = model, dataset
        self.calibration, self.tokens = calibration, tokens
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def network(self) -> Any:
        """The dense model in float32, its weights rounded to bfloat16 as a checkpoint has them."""
        from evals.perplexity import load_model

        return load_model(self.model, "bfloat16", "cpu").float()

    def rows(self, seed: int) -> Any:
        """Calibration token ids."""
        texts = training_texts(self.dataset, seed)
        return corpus.token_rows(texts, self.tokenizer, CONTEXT)[: self.calibration // CONTEXT]

    def loss(self, network: Any) -> float:
        from evals.perplexity import held_out_loss

        return held_out_loss(
            network, self.tokenizer, held_out_texts(self.dataset), tokens=self.tokens,
            context=CONTEXT, progress=False,
        ).loss  # fmt: skip

    def cells(self, wanted: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Loss and sizes of cells that share sparsity, seed, experts and path."""
        from evals.expansion import expand_network, install, reallocate, sizes
        from wexpand_plugin.errors import WexpandError
        from wexpand_plugin.method.settings import Settings

        first, network = wanted[0], self.network()
        settings = Settings(
            sparsity=first["sparsity"], num_experts=first["num_experts"],
            size_budget=first.get("size_budget"), seed=first["seed"],
        )  # fmt: skip
        rules = list(dict.fromkeys(c["allocate_by"] for c in wanted if "allocate_by" in c))
        expanded = expand_network(
            network, self.rows(first["seed"]), settings, rules, first.get("path", "full")
        )
        for cell in wanted:
            pools = [linear.pool for linear in expanded]
            if "allocate_by" in cell:
                try:
                    pools = reallocate(expanded, cell["size_budget"], cell["allocate_by"])
                except WexpandError as error:
                    print(f"    left out: {error}", flush=True)
                    continue
                for linear, pool in zip(expanded, pools, strict=True):
                    install(network, linear, pool)
            yield {"cell": cell, "loss": self.loss(network), **sizes(expanded, pools)._asdict()}


def summary(cells: list[dict[str, Any]]) -> str:
    """A line per setting: mean and standard deviation over seeds."""
    anchors = {}
    for found in cells:
        cell = found["cell"]
        if cell.get("size_budget") is None:
            kind = "one" if cell["num_experts"] == 1 else "full"
            anchors[kind, cell["sparsity"], cell["seed"]] = found["loss"]

    def key(cell: dict[str, Any]) -> tuple:
        return tuple((k, v) for k, v in cell.items() if k != "seed")

    lines = [
        f"{'setting':82}{'seeds':>6}{'loss':>16}{'recovered':>16}{'stored':>8}{'read':>7}"
        f"{'weights':>8}"
    ]
    for name, group in itertools.groupby(
        sorted(cells, key=lambda c: str(key(c["cell"]))), lambda c: key(c["cell"])
    ):
        found = list(group)
        share = []
        for one in found:
            at = one["cell"]["sparsity"], one["cell"]["seed"]
            if ("one", *at) in anchors and ("full", *at) in anchors:
                plain, full = anchors["one", *at], anchors["full", *at]
                share.append((plain - one["loss"]) / (plain - full))
        losses = [one["loss"] for one in found]

        def spread(values: list[float]) -> str:
            if not values:
                return ""
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.mean(values):.3f} +- {deviation:.3f}"

        text = " ".join(f"{k}={v}" for k, v in name)
        lines.append(
            f"{text:82}{len(found):>6}{spread(losses):>16}{spread(share):>16}"
            f"{found[0]['stored']:>8.3f}{found[0]['read']:>7.3f}{found[0]['read_weights']:>8.3f}"
        )
    return "\n".join(lines)


def add(file: Path, content: dict[str, Any], fresh: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Append cells to the JSON file, which other processes may be filling too; all its cells."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cells = json.loads(file.read_text())["cells"] if file.exists() else []
        cells += [new for new in fresh if new["cell"] not in [old["cell"] for old in cells]]
        if fresh:
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(content | {"cells": cells}, indent=1) + "\n")
            partial.replace(file)
    return cells


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path("evals/results/allocate_by.json"),
    model: Annotated[str, typer.Option(help="Model directory or id.")] = str(MODEL),
    dataset: Annotated[str, typer.Option(help="pocket, or a JSON list of texts.")] = "pocket",
    sparsity: Annotated[list[float] | None, typer.Option(help="0.7 0.8 0.9")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="0.5 0.75 1.0 1.5")] = None,
    allocate_by: Annotated[list[str] | None, typer.Option(help=", ".join(RULES))] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    path: Annotated[str, typer.Option(help="full or budget")] = "full",
    single: Annotated[list[float] | None, typer.Option(help="Sparsities of one expert.")] = None,
    calibration: Annotated[int, typer.Option(help="Calibration tokens.")] = 32768,
    tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 32768,
) -> None:
    """Compare what bytes are spent on, at equal bytes."""
    bench = Bench(model, dataset, calibration, tokens)
    content = {
        "command": "python -m evals.allocation", "model": label(model),
        "dataset": Path(dataset).name, "calibration_tokens": calibration, "held_out_tokens": tokens,
    }  # fmt: skip
    levels = sparsity or ([] if single else [0.7, 0.8, 0.9])
    for seed, level in itertools.product(range(seeds), [*levels, *(single or [])]):
        common = {"sparsity": level, "seed": seed}
        sweeps: list[list[dict[str, Any]]] = [[{**common, "num_experts": 1}]]
        grid = [
            {
                **common,
                "num_experts": experts,
                "size_budget": size,
                "allocate_by": name,
                "path": path,
            }
            for size, name in itertools.product(
                budget or [0.5, 0.75, 1.0, 1.5], allocate_by or RULES
            )
        ]
        if level in levels:
            sweeps.append([{**common, "num_experts": experts}])
            # a path within the budget differs with it: each has a calibration of its own
            each = (lambda cell: cell["size_budget"]) if path == "budget" else (lambda cell: None)
            sweeps += [list(cells) for _, cells in itertools.groupby(grid, each)]
        for sweep in sweeps:
            done = [found["cell"] for found in add(json_file, content, [])]
            if missing := [cell for cell in sweep if cell not in done]:
                for found in bench.cells(missing):
                    print(json.dumps(found), flush=True)
                    add(json_file, content, [found])
    print(summary(add(json_file, content, [])))


if __name__ == "__main__":
    typer.run(main)
