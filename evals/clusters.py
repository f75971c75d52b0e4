"""What a bias for each cluster recovers, run as a user runs it.

    python -m evals.clusters [--clusters 0 --clusters 64 ...] [--sparsity 0.8] [--values auto]
        [--tune-epochs 0] [--tokens 32768] [--seed 0] [--json FILE]

One expert, MLP linears, compressed and read again as by `evals.recipe`, for each number of clusters
(0: no biases). The loss that is added to the dense model's, and bytes over dense. Rows that the
file has are not run again.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from evals.allocation import held_out_texts
from evals.paper.inputs import label
from evals.perplexity import held_out_loss, load_model
from evals.pocket import MODEL
from evals.processes import ROOT
from evals.recipe import CONTEXT, RECIPE, TOKENS, measure

__all__ = ["variant"]

RESULTS = ROOT / "evals" / "results" / "clusters.json"


def variant(clusters: int, **keys: Any) -> dict[str, Any]:
    """The recommended recipe with one expert and so many clusters, as nested dictionaries."""
    recipe = yaml.safe_load(RECIPE.read_text())
    ((modifier, found),) = recipe["expansion_stage"]["expansion_modifiers"].items()
    found |= {"num_experts": 1, "size_budget": None, "num_clusters": clusters} | keys
    return {"expansion_stage": {"expansion_modifiers": {modifier: found}}}


def main(
    json_file: Annotated[Path, typer.Option("--json")] = RESULTS,
    model: Annotated[str, typer.Option(help="Model directory or id.")] = str(MODEL),
    dataset: Annotated[str, typer.Option(help="pocket, or a JSON list of texts.")] = "pocket",
    clusters: Annotated[list[int] | None, typer.Option(help="0 1 16 64 256")] = None,
    sparsity: float = 0.8,
    values: str = "auto",
    tune_epochs: int = 0,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = TOKENS,
    seed: int = 0,
) -> None:
    """Loss added at one sparsity, by the number of clusters."""
    from transformers import AutoTokenizer

    dense = held_out_loss(
        load_model(model), AutoTokenizer.from_pretrained(model), held_out_texts(dataset),
        tokens=TOKENS, context=CONTEXT, progress=False,
    ).loss  # fmt: skip
    rows = json.loads(json_file.read_text())["rows"] if json_file.exists() else []
    for count in clusters or [0, 1, 16, 64, 256]:
        keys = {"sparsity": sparsity, "values": values, "tune_epochs": tune_epochs, "seed": seed}
        row = {"model": label(model), "clusters": count, "tokens": tokens} | keys
        if any(row.items() <= done.items() for done in rows):
            continue
        found = measure(model, variant(count, **keys), dataset, seed, tokens)
        rows.append(row | found | {"added": found["loss"] - dense})
        print(json.dumps(rows[-1]), flush=True)
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"dense": dense, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
