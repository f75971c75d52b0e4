"""Two processes against one: the same model from the same rows, but for the order of batches?

    python -m evals.ranks [--samples 64] [--json FILE]

`wexpand compress` compresses the pocket model by a few recipes, in one process and under torchrun
in two, each with half of the rows. The checkpoints are read again, for the held-out loss and for
how many of their kept weights are in the same places. What another order of batches alone changes
is seen from one process with another seed in the recipe: nothing, where nothing is tuned or routed.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from evals.allocation import training_texts
from evals.dial import loss_of
from evals.perplexity import load_model
from evals.pocket import MODEL
from evals.processes import run_step

__all__ = ["CASES", "measure"]

MLP = {"targets": ["re:.*mlp.*"]}
CASES: dict[str, dict[str, Any]] = {
    "80% zeros": {"sparsity": 0.8, "num_experts": 1, **MLP},
    "80% zeros, tuned": {"sparsity": 0.8, "num_experts": 1, "tune_epochs": 4, **MLP},
    "80% zeros, 16 experts in size 1.0": {
        "sparsity": 0.8, "num_experts": 16, "size_budget": 1.0, **MLP,
    },
    "sparsity auto, size 0.2": {
        "sparsity": "auto", "size_budget": 0.2, "num_experts": 1,
        "targets": ["Linear"], "ignore": ["re:.*lm_head"],
    },
}  # fmt: skip
CONTEXT, LIMIT = 256, 3600


def measure(
    folder: Path, data: Path, keys: dict[str, Any], ranks: int, samples: int, seed: int
) -> Path:
    """Compress with so many ranks; the model that was written."""
    file, out = folder / "recipe.yaml", folder / f"out{ranks}-{seed}"
    keys = keys | {"seed": seed}
    stages = {"one_stage": {"one_modifiers": {"SparseExpansionModifier": keys}}}
    file.write_text(yaml.safe_dump(stages))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(ranks)]
    wexpand = ["-m", "wexpand_plugin.tools.cli", "compress", str(MODEL), "-d", str(data)]
    options = ["-r", str(file), "-o", str(out), "--samples", str(samples)]
    command = [*start, *wexpand, *options, "--max-seq-length", str(CONTEXT)]
    run_step(f"{ranks} ranks", command, folder / f"log{ranks}-{seed}", LIMIT)
    return out


def same_places(one: Path, other: Path) -> float:
    """Share of the weights that both keep or both prune, whatever the expert."""
    masks = [
        torch.cat(
            [
                torch.stack([m.pool.expert(e) != 0 for e in range(m.experts)]).flatten()
                for m in load_model(path).modules()
                if hasattr(m, "pool")
            ]
        )
        for path in (one, other)
    ]
    return float((masks[0] == masks[1]).float().mean())


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path("evals/results/ranks.json"),
    samples: Annotated[int, typer.Option(min=2, help="Rows of 256 tokens.")] = 64,
) -> None:
    """The same recipes in one process and in two."""
    rows = {}
    for name, keys in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            folder, found, losses = Path(work), dict[str, Path](), dict[str, float]()
            data = folder / "d.jsonl"
            texts = training_texts("pocket", 0)
            data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            for which, ranks, own in (("one", 1, 0), ("two", 2, 0), ("one, other seed", 1, 1)):
                found[which] = measure(folder, data, keys, ranks, samples, own)
                losses[which] = loss_of(found[which], "pocket")
            rows[name] = {
                "loss": losses,
                "same_places": same_places(found["one"], found["two"]),
            }
        print(name, json.dumps(rows[name]), flush=True)
        command = f"python -m evals.ranks --samples {samples}"
        json_file.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
