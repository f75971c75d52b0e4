"""The loss that a plan predicts against the one that is measured, size by size.

    python -m evals.dial [--size 0.5 ...] [--read 0.2] [--model DIR] [--epochs 0] [--json FILE]

`wexpand compress` runs with `sparsity: auto` on all linears of the blocks and each `size_budget`,
and with fixed settings of about the same sizes; the checkpoints are read again by transformers for
the held-out loss. What was predicted stands in them. `--epochs` tunes; no prediction knows of that.
`--read` bounds what a token reads, and 16 experts share the rest of each size above it.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.allocation import held_out_texts, training_texts
from evals.paper.inputs import label
from evals.perplexity import held_out_loss, load_model
from evals.pocket import MODEL
from evals.processes import ROOT

__all__ = ["added"]

SIZES = (0.5, 0.3, 0.25, 0.2, 0.15, 0.12)
FIXED = {
    "int8": {"values": "int8", "sparsity": 0.0},
    "int6": {"values": "int6", "sparsity": 0.0},
    "int5": {"values": "int5", "sparsity": 0.0},
    "int4": {"values": "int4", "sparsity": 0.0},
    "int3": {"values": "int3", "sparsity": 0.0},
    "int2": {"values": "int2", "sparsity": 0.0},
    "int4, 50%": {"values": "int4", "sparsity": 0.5},
    "int4, 70%": {"values": "int4", "sparsity": 0.7},
    "int3, 50%": {"values": "int3", "sparsity": 0.5},
    "int2, 60%": {"values": "int2", "sparsity": 0.6},
}
TOKENS, SAMPLES, CONTEXT = 32768, 128, 256


def loss_of(model: Path | str, dataset: str) -> float:
    """Held-out loss, nats per token."""
    from transformers import AutoTokenizer

    return held_out_loss(
        load_model(model), AutoTokenizer.from_pretrained(model), held_out_texts(dataset),
        tokens=TOKENS, context=CONTEXT, progress=False,
    ).loss  # fmt: skip


def added(model: str, keys: dict[str, Any], dataset: str, dense: float, seed: int) -> dict:
    """Compress with these keys, read again: bytes stored and loss over those of dense."""
    import yaml

    from wexpand_plugin.compress.oneshot import compress
    from wexpand_plugin.tools.inspect import inspect

    keys = {"num_experts": 1, "targets": ["Linear"], "ignore": ["re:.*lm_head"]} | keys
    recipe = {"one_stage": {"one_modifiers": {"SparseExpansionModifier": keys}}}
    with tempfile.TemporaryDirectory() as folder:
        data, file, out = (Path(folder) / name for name in ("d.jsonl", "r.yaml", "out"))
        texts = training_texts(dataset, seed)
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        file.write_text(yaml.safe_dump(recipe))
        begin = time.monotonic()
        compress(
            model, file, str(data), out, seed=seed, max_seq_length=CONTEXT, samples=SAMPLES
        )
        seconds = time.monotonic() - begin
        sizes = inspect(out)
        predicted = sizes.made_by.get("predicted_loss", {})
        row = {
            "stored": sizes.linear_bytes / sizes.dense_bytes,
            "read": sizes.bytes_per_token / sizes.dense_bytes,
            "added": loss_of(out, dataset) - dense,
            "seconds": round(seconds),
        }
        kinds: dict[str, int] = {}
        for linear in sizes.linears:
            kind = f"{linear.values.split(',')[0]} {linear.sparsity:.0%}"
            kinds[kind] = kinds.get(kind, 0) + 1
    return row | {"kinds": kinds} | ({"predicted": sum(predicted.values())} if predicted else {})


def main(
    json_file: Annotated[Path, typer.Option("--json")] = ROOT / "evals" / "results" / "dial.json",
    model: Annotated[str, typer.Option(help="Model directory or id.")] = str(MODEL),
    dataset: Annotated[str, typer.Option(help="pocket, or a JSON list of texts.")] = "pocket",
    size: Annotated[list[float] | None, typer.Option(help="size_budget.")] = None,
    read: Annotated[float | None, typer.Option(help="read_budget.")] = None,
    epochs: Annotated[int, typer.Option(help="Of tuning.")] = 0,
    fixed: Annotated[bool, typer.Option(help="Fixed settings as well.")] = True,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Predicted and measured loss of each size."""
    dense = loss_of(model, dataset)
    runs: dict[str, dict[str, Any]] = {}
    for s in size or SIZES:
        name, keys = f"dial {s}", {"sparsity": "auto", "size_budget": s, "read_budget": read}
        if read is not None and read < s:
            name += f", {read} read"
            keys |= {"num_experts": 16, "budget_scope": "layer" if epochs else "model"}
        runs[name] = keys
    rows = []
    for name, keys in (runs | (FIXED if fixed else {})).items():
        found = added(model, keys | {"tune_epochs": epochs, "seed": seed}, dataset, dense, seed)
        rows.append({"run": name, "epochs": epochs} | found)
        print(json.dumps(rows[-1]), flush=True)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    asked = "" if read is None else f" --read {read}"
    content = {"command": f"python -m evals.dial --epochs {epochs} --seed {seed}{asked}",
               "model": label(model), "dense": dense, "rows": rows}  # fmt: skip
    json_file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
