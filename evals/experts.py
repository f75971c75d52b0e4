"""Do experts and clusters add anything, once all is tuned? At equal bytes, on the pocket model.

    python -m evals.experts [--sparsity 0.8] [--seeds 1] [--epochs 4] [--variant NAME ...]
        [--random] [--json FILE]
        [--model DIR --data FOLDER --block NUMBER ...]

Each way to spend bytes on top of one mask (biases for 16, 64 or 256 clusters, 16 experts in the
dense size, both) is run end to end by its recipe, tuned; beside each stand plain masks, tuned
alike, that are as much denser as makes the bytes equal, those stored and those that a token reads,
and the first mask with a low-rank correction (`evals.corrected`) of as many bytes. MLP linears; the
texts and the held-out loss of `evals.recipe`. `--random` sends tokens to clusters whose centres are
inputs drawn at random instead of k-means'. Equal masks are run once, and rows that the file has
are not run again; seeds come one after another.

Another model is calibrated and measured on WikiText-2 (`--data` as in `evals.real_model`). It takes
long: `--block` names those whose MLPs are compressed, and the others stay dense.
"""

import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from transformers import AutoConfig

from evals import corrected
from evals.grounds import PocketGround, RealGround
from evals.paper.inputs import label
from evals.pocket import MODEL
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


def modifiers(targets: str, epochs: int, **keys: Any) -> dict[str, dict[str, Any]]:
    """Of a recipe for these linears with these keys."""
    return {"SparseExpansionModifier": {"targets": [targets], "tune_epochs": epochs} | keys}


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
    sparsity: Annotated[float, typer.Option(help="Of all but the denser masks.")] = 0.8,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    epochs: Annotated[int, typer.Option(help="Of tuning.")] = 4,
    names: Annotated[list[str] | None, typer.Option("--variant")] = None,
    random: Annotated[bool, typer.Option(help="Random centres, too.")] = False,
    model: Annotated[Path, typer.Option(help="A model's directory.")] = MODEL,
    data: Annotated[Path | None, typer.Option(help="Folder with WikiText-2's files.")] = None,
    blocks: Annotated[list[int] | None, typer.Option("--block")] = None,
) -> None:
    """Each variant, and what else as many bytes stored, and read, can be spent on."""
    ground = PocketGround() if model == MODEL else RealGround(model, data)
    config = AutoConfig.from_pretrained(model)
    chosen = blocks or list(range(config.num_hidden_layers))
    targets = rf"re:.*layers\.({'|'.join(map(str, chosen))})\.mlp.*" if blocks else "re:.*mlp.*"
    other = {} if model == MODEL else {"model": label(str(model)), "blocks": chosen}
    command = f"python -m evals.experts --epochs {epochs} --seeds {seeds}"
    command += "".join(f' --variant "{name}"' for name in names or ()) + " --random" * random
    if other:
        command += f" --model {label(str(model))}"
    command += "".join(f" --block {number}" for number in blocks or ())
    rows: list[dict[str, Any]] = []
    if json_file.exists():
        rows = json.loads(json_file.read_text())["rows"]

    def row(about: dict[str, Any], found: Callable[[], dict[str, float]]) -> dict[str, Any]:
        about |= {"epochs": epochs} | other
        for done in rows:
            if about.items() <= done.items() and done.get("model") == about.get("model"):
                return done
        rows.append(about | found())
        content = {"command": command, "rows": rows}
        json_file.write_text(json.dumps(content, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)
        return rows[-1]

    def run(name: str, seed: int, sparsity: float, **keys: Any) -> dict[str, Any]:
        asked = modifiers(targets, epochs, seed=seed, sparsity=sparsity, **keys)
        about = {"name": name, "seed": seed, "sparsity": sparsity}
        return row(about, lambda: ground.measure(asked, seed))

    def low_rank(seed: int, share: float, mask: float) -> None:
        # an MLP's linears all have these two widths
        weight = config.hidden_size * config.intermediate_size
        both = config.hidden_size + config.intermediate_size
        rank = int((share - mask) * weight / both)
        size = mask + rank * both / weight

        def found() -> dict[str, float]:
            loss = corrected.measure(ground, chosen, sparsity, seed, epochs, rank)
            return {"loss": loss, "stored": size, "read": size}

        row({"name": f"low rank, {rank}", "seed": seed, "sparsity": sparsity}, found)

    if other:
        about = {"name": "dense", "seed": 0, "sparsity": 0.0}
        row(about, lambda: {"loss": ground.loss(ground.dense()), "stored": 1.0, "read": 1.0})
    for seed in range(seeds):
        plain = run("one mask", seed, sparsity, num_experts=1)
        for name in names or VARIANTS:
            found = run(name, seed, sparsity, **VARIANTS[name])
            for what in ("read", "stored"):
                if found[what] < 1 - 1 / 256:  # else it is the dense model that is as large
                    own = round(sparsity_of(found[what]), 3)
                    run("one mask", seed, own, num_experts=1)
                    low_rank(seed, found[what], plain["stored"])
            if random:
                with patch.object(clusters, "_k_means", random_centres):
                    run(f"{name}, random", seed, sparsity, **VARIANTS[name])
    for name, group in itertools.groupby(
        sorted(rows, key=lambda row: (row["name"], row["sparsity"])),
        key=lambda row: f"{row['name']}, {row['sparsity']:.1%} zeros",
    ):
        alike = list(group)
        losses = [row["loss"] for row in alike]
        deviation = f" +- {statistics.stdev(losses):.3f}" if len(alike) > 1 else ""
        print(
            f"{name:46} {statistics.mean(losses):.3f}{deviation}, stored {alike[0]['stored']:.3f}, "
            f"read {alike[0]['read']:.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
