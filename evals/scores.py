"""What should bytes be spent on? Scores at equal bytes, by held-out loss.

    python -m evals.scores [--sparsity 0.8 ...] [--budget 1.0 ...] [--score gain ...] [--seeds 3]
                           [--model evals/pocket/model] [--dataset pocket] [--json FILE]

Every cell compresses the model's MLP linears with 16 experts and measures the held-out loss; a seed
decides the calibration text, the clusters and, for `random`, the neurons. Beside each loss stands
the share of full expansion's gain that it recovers, (SparseGPT - loss) / (SparseGPT - full) with
the SparseGPT (one expert) and full expansion of the same seed and sparsity, and the bytes stored
over dense. Cells found in the JSON file are not run again, so an interrupted run goes on.
"""

import itertools
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.pocket import MODEL, corpus

__all__ = ["compressed", "summary", "training_texts"]

SCORES = ("gain", "wasserstein", "gain_wasserstein", "kurtosis", "random")


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


def compressed(
    model: Path | str,
    texts: list[str],
    seed: int,
    rows: int = 128,
    length: int = 256,
    **values: Any,
) -> tuple[Any, dict[str, float]]:
    """Expand the MLP linears of `model`: the model, and bytes stored and read over dense.

    :param values: recipe keys of SparseExpansionModifier
    """
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    from wexpand_plugin.compress.modifier import SparseExpansionModifier
    from wexpand_plugin.linear import RoutedLinear

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = corpus.token_rows(texts, tokenizer, length)[:rows].tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length] * len(ids)})
    modifier = SparseExpansionModifier(targets=[r"re:.*\.mlp\..*"], seed=seed, **values)
    torch.manual_seed(seed)
    expanded = oneshot(
        model=str(model), dataset=data, recipe=[modifier], processor=tokenizer,
        max_seq_length=length, num_calibration_samples=len(ids), precision="bfloat16",
    )  # fmt: skip
    routed = [m for m in expanded.modules() if isinstance(m, RoutedLinear)]
    dense = sum(2 * m.in_features * m.out_features for m in routed)
    read = 0.0
    for module in routed:
        router = 4 * module.experts * (module.in_features + 1) if module.experts > 1 else 0
        read += module.pool.bytes_per_token(torch.tensor(module.tokens)) + router
        module.unpack()
    stored = sum(m.stored_bytes() for m in routed)
    return expanded.float(), {"stored": stored / dense, "read": read / dense}


def run_cell(model: str, dataset: str, cell: dict[str, Any]) -> dict[str, float]:
    """Loss and sizes of one setting."""
    from evals.perplexity import held_out_loss

    values = {k: v for k, v in cell.items() if k not in ("seed",)}
    context = 256
    expanded, sizes = compressed(model, training_texts(dataset, cell["seed"]), cell["seed"],
                                 length=context, **values)  # fmt: skip
    loss = held_out_loss(
        expanded, model, held_out_texts(dataset), tokens=32768, context=context, progress=False
    ).loss
    return {"loss": loss, **sizes}


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

    lines = [f"{'setting':66}{'loss':>16}{'recovered':>16}{'stored':>8}{'read':>7}"]
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
            f"{text:66}{spread(losses):>16}{spread(share):>16}"
            f"{found[0]['stored']:>8.3f}{found[0]['read']:>7.3f}"
        )
    return "\n".join(lines)


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path("evals/results/scores.json"),
    model: Annotated[str, typer.Option(help="Model directory or id.")] = str(MODEL),
    dataset: Annotated[str, typer.Option(help="pocket, or a JSON list of texts.")] = "pocket",
    sparsity: Annotated[list[float] | None, typer.Option(help="0.7 0.8 0.9")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="0.5 0.75 1.0 1.5")] = None,
    score: Annotated[list[str] | None, typer.Option(help=", ".join(SCORES))] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    experts: Annotated[int, typer.Option(min=2)] = 16,
    scope: Annotated[str, typer.Option(help="layer or model")] = "layer",
    share: Annotated[bool, typer.Option(help="Let experts share versions.")] = True,
) -> None:
    """Compare scores at equal bytes."""
    results: dict[str, Any] = {"cells": []}
    if json_file.exists():
        results = json.loads(json_file.read_text())
    done = [found["cell"] for found in results["cells"]]
    cells: list[dict[str, Any]] = []
    for seed, level in itertools.product(range(seeds), sparsity or [0.7, 0.8, 0.9]):
        cells.append({"sparsity": level, "num_experts": 1, "seed": seed})
        cells.append({"sparsity": level, "num_experts": experts, "seed": seed})
        for size, name in itertools.product(budget or [0.5, 0.75, 1.0, 1.5], score or SCORES):
            cells.append({
                "sparsity": level, "num_experts": experts, "size_budget": size, "score": name,
                "budget_scope": scope, "share_versions": share, "seed": seed,
            })  # fmt: skip
    for number, cell in enumerate(cells):
        if cell in done:
            continue
        print(f"{number + 1}/{len(cells)} {cell}", flush=True)
        found = run_cell(model, dataset, cell)
        print(f"    {found}", flush=True)
        results["cells"].append({"cell": cell, **found})
        results |= {"model": Path(model).name, "dataset": Path(dataset).name,
                    "command": "python -m evals.scores"}  # fmt: skip
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results["cells"]))


if __name__ == "__main__":
    typer.run(main)
