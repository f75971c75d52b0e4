"""Do experts and clusters add anything, once all is tuned? At equal bytes, on the pocket model.

    python -m evals.experts [--sparsity 0.8] [--seeds 1] [--random] [--json FILE]

Each way to spend bytes on top of one mask (biases for 16, 64 or 256 clusters, 16 experts in the
dense size, both) is run end to end by its recipe, tuned; beside each stand two plain masks, tuned
alike, that are as much denser as makes the bytes equal: those stored, and those that a token reads.
MLP linears; the texts and the held-out loss of `evals.recipe`. `--random` sends tokens to clusters
whose centres are inputs drawn at random instead of k-means'. Rows that the file has are not run
again.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

from evals.pocket import MODEL
from evals.recipe import measure
from wexpand_plugin.method import clusters

__all__ = ["VARIANTS"]

BUDGET = {"size_budget": 1.0, "budget_scope": "layer"}
VARIANTS: dict[str, dict[str, Any]] = {
    "16 cluster biases": {"num_experts": 1, "num_clusters": 16},
    "64 cluster biases": {"num_experts": 1, "num_clusters": 64},
    "256 cluster biases": {"num_experts": 1, "num_clusters": 256},
    "16 experts": {"num_experts": 16, **BUDGET},
    "16 experts, 64 cluster biases": {"num_experts": 16, "num_clusters": 64, **BUDGET},
}
MASK_BITS, VALUE_BITS = 1, 16


def recipe(epochs: int, **keys: Any) -> dict[str, Any]:
    """A recipe for the MLP linears with these keys."""
    keys = {"targets": ["re:.*mlp.*"], "tune_epochs": epochs} | keys
    return {"compress_stage": {"compress_modifiers": {"SparseExpansionModifier": keys}}}


def sparsity_of(share: float) -> float:
    """The sparsity at which one mask with 16-bit values takes this share of the dense bytes."""
    return 1 - (VALUE_BITS * share - MASK_BITS) / VALUE_BITS


def random_centres(points: Any, number: int, restarts: int, seed: int) -> torch.Tensor:
    """In place of k-means: inputs drawn at random are the centres."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.as_tensor(points, dtype=torch.float64)
    return rows[torch.randperm(len(rows), generator=generator)[:number]]


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path("evals/results/experts.json"),
    sparsity: Annotated[float, typer.Option()] = 0.8,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    epochs: Annotated[int, typer.Option(help="Of tuning.")] = 8,
    names: Annotated[list[str] | None, typer.Option("--variant")] = None,
    random: Annotated[bool, typer.Option(help="Random centres instead of k-means'.")] = False,
) -> None:
    """One table: each variant, and one mask of as many bytes stored, and read."""
    rows: list[dict[str, Any]] = []
    if json_file.exists():
        rows = json.loads(json_file.read_text())["rows"]

    def run(name: str, seed: int, **keys: Any) -> dict[str, Any]:
        about = {"name": name, "seed": seed, "sparsity": sparsity, "epochs": epochs}
        for row in rows:
            if about.items() <= row.items():
                return row
        found = measure(str(MODEL), recipe(epochs, seed=seed, **keys), "pocket", seed)
        rows.append(about | found)
        content = {"command": "python -m evals.experts", "rows": rows}
        json_file.write_text(json.dumps(content, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)
        return rows[-1]

    for seed in range(seeds):
        run("one mask", seed, sparsity=sparsity, num_experts=1)
        for name in names or VARIANTS:
            if random:
                with patch.object(clusters, "_k_means", random_centres):
                    run(f"{name}, random", seed, sparsity=sparsity, **VARIANTS[name])
                continue
            found = run(name, seed, sparsity=sparsity, **VARIANTS[name])
            for what in ("stored", "read"):
                own = sparsity_of(found[what])
                if own > 0:
                    run(f"one mask, {what} as {name}", seed, sparsity=own, num_experts=1)
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        losses = [row["loss"] for row in own]
        deviation = f" +- {statistics.stdev(losses):.3f}" if len(own) > 1 else ""
        print(
            f"{name:46} {statistics.mean(losses):.3f}{deviation}, stored {own[0]['stored']:.3f}, "
            f"read {own[0]['read']:.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
