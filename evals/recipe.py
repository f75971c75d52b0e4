"""What the recommended recipe recovers, run as a user runs it.

    python -m evals.recipe [--sparsity 0.9 ...] [--seeds 1] [--json FILE]

`evals.allocation` compares many settings by solving once and allocating often. This runs the
product: `wexpand compress` with recipes/sparse_expansion_budget.yaml as it stands, but for the
sparsity and the seed; the same with one expert (plain SparseGPT) and without a budget (the paper's
full expansion). The checkpoints are then read again, by transformers for the held-out loss and by
`wexpand inspect` for the bytes.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from evals.allocation import held_out_texts, training_texts
from evals.paper.inputs import label
from evals.perplexity import held_out_loss, load_model
from evals.pocket import MODEL
from evals.processes import ROOT

__all__ = ["held_out", "measure", "variants"]

RECIPE = ROOT / "recipes" / "sparse_expansion_budget.yaml"
TOKENS = 32768
CONTEXT = 256


def variants(sparsity: float, seed: int) -> dict[str, dict[str, Any]]:
    """The recipe and its two bounds, as nested dictionaries."""
    found = {}
    for name, changes in {
        "one expert": {"num_experts": 1, "size_budget": None},
        "full": {"size_budget": None},
        "budget": {},
    }.items():
        recipe = yaml.safe_load(RECIPE.read_text())
        (stage,) = recipe.values()
        (modifiers,) = stage.values()
        modifiers["SparseExpansionModifier"] |= {"sparsity": sparsity, "seed": seed, **changes}
        found[name] = recipe
    return found


def held_out(model: Path, dataset: str) -> float:
    """Loss of a directory's model on text that no calibration sees."""
    from transformers import AutoTokenizer

    return held_out_loss(
        load_model(model), AutoTokenizer.from_pretrained(model), held_out_texts(dataset),
        tokens=TOKENS, context=CONTEXT, progress=False,
    ).loss  # fmt: skip


def measure(
    model: str, recipe: dict[str, Any], dataset: str, seed: int, calibration: int = TOKENS
) -> dict[str, float]:
    """Compress on `calibration` tokens, save, read again: held-out loss and bytes over dense."""
    from wexpand_plugin.compress.oneshot import compress
    from wexpand_plugin.tools.inspect import inspect

    texts = training_texts(dataset, seed)
    with tempfile.TemporaryDirectory() as folder:
        data, file, out = (Path(folder) / name for name in ("d.jsonl", "r.yaml", "out"))
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        file.write_text(yaml.safe_dump(recipe))
        compress(
            model, file, str(data), out, seed=seed,
            max_seq_length=CONTEXT, samples=calibration // CONTEXT,
        )  # fmt: skip
        sizes = inspect(out)
        loss = held_out(out, dataset)
    return {
        "loss": loss,
        "stored": sizes.linear_bytes / sizes.dense_bytes,
        "read": sizes.bytes_per_token / sizes.dense_bytes,
    }


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path("evals/results/recipe.json"),
    model: Annotated[str, typer.Option(help="Model directory or id.")] = str(MODEL),
    dataset: Annotated[str, typer.Option(help="pocket, or a JSON list of texts.")] = "pocket",
    sparsity: Annotated[list[float] | None, typer.Option(help="0.8 0.9")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """The recommended recipe against plain SparseGPT and full expansion, end to end."""
    rows, levels = [], sparsity or [0.8, 0.9]
    for level in levels:
        for seed in range(seeds):
            for name, recipe in variants(level, seed).items():
                row = {"sparsity": level, "seed": seed, "variant": name}
                rows.append(row | measure(model, recipe, dataset, seed))
                print(json.dumps(rows[-1]), flush=True)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    asked = "".join(f" --sparsity {level}" for level in sparsity or ())
    content = {"command": f"python -m evals.recipe --seeds {seeds}{asked}", "model": label(model),
               "dataset": Path(dataset).name, "rows": rows}  # fmt: skip
    json_file.write_text(json.dumps(content, indent=1) + "\n")
    for level in levels:
        shares = []
        for seed in range(seeds):
            at = {r["variant"]: r for r in rows if (r["sparsity"], r["seed"]) == (level, seed)}
            plain, full = at["one expert"]["loss"], at["full"]["loss"]
            shares.append((plain - at["budget"]["loss"]) / (plain - full))
        deviation = f" +- {statistics.stdev(shares):.3f}" if seeds > 1 else ""
        print(
            f"sparsity {level}: recovered {statistics.mean(shares):.3f}{deviation}, "
            f"stored {at['budget']['stored']:.3f}, read {at['budget']['read']:.3f} of dense"
        )


if __name__ == "__main__":
    typer.run(main)
