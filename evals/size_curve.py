"""Loss against the size of the weights, on a real model: our dial beside what one would take.

    python -m evals.size_curve [NAME ...] [--data FOLDER] [--model DIR] [--llama PYTHON]
                               [--keep FOLDER] [--tokens 65536]
    python -m evals.size_curve_picture FILE.png

SmolLM2-135M-Instruct, calibrated and measured as in `evals.real_model`, on the same tokens in the
same windows; `--data pocket --model evals/pocket/model --json FILE` is the pocket model on its own
text. A NAME is one row, or a pattern of several as "mlp: ours*": a set of linears (all
linears of the blocks; those of MLPs alone, the rest stays bfloat16), what was done to them, and how
far. Each row is written to the JSON file as it comes, and those that it has are not run again. With
another number of `--tokens` to calibrate on, rows are named by it, too; "tuned in 4" is 4 epochs.

Bits are stored bits per targeted weight, everything that a value needs included:

- ours: `sparsity: auto` at a `size_budget`, without tuning and tuned; counted from the checkpoint,
  linears that it leaves dense among them. What it predicts for itself stands beside it.
- GPTQ, AWQ: llm-compressor's, uniform, groups of 64 (576 columns are no multiple of 128); counted
  as the values and 16 bits for each scale; AWQ, and where said GPTQ, has zero points, too. Files of
  3 bits are larger than that. AWQ has llm-compressor's own mappings and grid, and AWQ_TOKENS tokens
  of the same text, as it runs each block's modules 20 times over them for each of its mappings.
- SparseGPT: 16-bit values and a bit for every weight.
- llama.cpp: `evals.llama_types`, with an importance matrix of the same calibration text. It needs
  `--llama`, the Python of an environment as in `evals.bench.llama`. Rows of 576 columns do not
  fit its K- and IQ-types, and get larger ones; 1536 columns do.

The weights of this SmolLM2 come from a Q4_1 file where there is no hub (see `get_model`): groups of
32 columns that lie on 16 levels. Types with groups of 32 (Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL) find
these levels again or nearly so; that flatters llama.cpp's types, which use them, and nothing of
ours looks for it.
"""

import json
import os
import shutil
import subprocess
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from evals.llama_types import GGUF_NAMES
from evals.paper.inputs import label
from evals.pocket import MODEL as POCKET
from evals.processes import ROOT
from evals.real_model import (
    CONTEXT,
    HELD_OUT,
    TOKENS,
    calibration,
    compressed,
    get_model,
    gptq,
    held_out,
    wikitext,
)

__all__ = ["LLAMA", "MODIFIERS", "RESULTS", "SIZES"]

TARGETS = {"all": ["Linear"], "mlp": ["re:.*mlp.*"]}
SIZES = (8.25, 6, 5, 4.25, 3.25, 2.5, 2)
"""bits per weight of the dial"""
BITS = (8, 4, 3, 2)
AWQ_TOKENS = 8192
TYPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_S", "Q2_K", "IQ2_S", "IQ2_XXS")
RESULTS = ROOT / "evals" / "results" / "size_curve.json"


def _dial(bits: float, targets: list[str], epochs: int) -> dict[str, Any]:
    keys = {"sparsity": "auto", "values": "auto", "size_budget": bits / 16, "num_experts": 1,
            "tune_epochs": epochs, "targets": targets, "ignore": ["re:.*lm_head"]}  # fmt: skip
    return {"SparseExpansionModifier": keys}


def _awq(bits: int, targets: list[str]) -> dict[str, Any]:
    rounding = gptq(bits, targets, symmetric=False, modifier="QuantizationModifier")
    return {"AWQModifier": {"n_grid": 20}} | rounding


def _autoround(bits: int, targets: list[str]) -> dict[str, Any]:
    """AutoRound, which tunes rounding block by block: its authors' quick setting, not compiled."""
    found = gptq(bits, targets, modifier="AutoRoundModifier")
    found["AutoRoundModifier"] |= {"iters": 50, "enable_torch_compile": False}
    return found


def _sparsegpt(structure: str, targets: list[str]) -> dict[str, Any]:
    keys = {"sparsity": 0.5, "mask_structure": structure, "targets": targets, "ignore": ["lm_head"]}
    return {"SparseGPTModifier": keys}


def _modifiers() -> dict[str, tuple[dict[str, Any], float | None]]:
    found: dict[str, tuple[dict[str, Any], float | None]] = {}
    for part, targets in TARGETS.items():
        found |= {f"{part}: ours {b:g}": (_dial(b, targets, 0), None) for b in SIZES}
        found |= {f"{part}: ours {b:g} tuned": (_dial(b, targets, 8), None) for b in SIZES}
        found |= {f"{part}: ours {b:g} tuned in 4": (_dial(b, targets, 4), None) for b in SIZES}
        for bits in BITS:
            zeros = bits + (16 + bits) / 64
            found[f"{part}: GPTQ {bits}"] = gptq(bits, targets), bits + 16 / 64
            found[f"{part}: AWQ {bits}"] = _awq(bits, targets), zeros
            found[f"{part}: AutoRound {bits}"] = _autoround(bits, targets), bits + 16 / 64
            if bits < 4:
                keys = gptq(bits, targets, symmetric=False)
                found[f"{part}: GPTQ {bits} zero points"] = keys, zeros
        for name, structure in {"50%": "0:0", "2:4": "2:4"}.items():
            found[f"{part}: SparseGPT {name}"] = _sparsegpt(structure, targets), 16 * 0.5 + 1
    return found


MODIFIERS = _modifiers()
"""name -> modifiers of the recipe, and bits per weight where no checkpoint of ours says them"""
LLAMA = {"llama.cpp F32": ("all", "F32")} | {
    f"{part}: llama.cpp {kind}": (part, kind) for part in TARGETS for kind in TYPES
}
"""name -> part and type; F32 is not quantised, and shows that llama.cpp runs the same model"""


def our_sizes(saved: Path, dense: Path, part: str) -> dict[str, Any]:
    """Bits per weight stored and read over all linears of `part`, and what was predicted."""
    from wexpand_plugin.tools.inspect import inspect

    sizes = inspect(saved)
    names = tuple(name for name in GGUF_NAMES if part == "all" or name.startswith(part))
    every = [linear for linear in inspect(dense).linears if linear.name.endswith(names)]
    ours = {linear.name for linear in sizes.linears}
    left = sum(linear.stored_bytes for linear in every if linear.name not in ours)
    weights = sum(linear.in_features * linear.out_features for linear in every)
    kinds: dict[str, int] = {"dense": len(every) - len(ours)}
    for linear in sizes.linears:
        kind = f"{linear.values.split(',')[0]} {linear.sparsity:.0%}"
        kinds[kind] = kinds.get(kind, 0) + 1
    return {
        "bits_stored": 8 * (sizes.linear_bytes + left) / weights,
        "bits_read": 8 * (sizes.bytes_per_token + left) / weights,
        "predicted": sum(sizes.made_by.get("predicted_loss", {}).values()),
        "kinds": kinds,
    }


def run(
    name: str,
    model: Path,
    valid: str,
    test: str,
    out: Path,
    keep: Path | None = None,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """A row of MODIFIERS. `keep` is a folder that the model goes to, under the row's name."""
    modifiers, bits = MODIFIERS[name]
    context = _context(model)
    if "AWQModifier" in modifiers:
        tokens = AWQ_TOKENS
        _allow_awq()
    made = compressed(modifiers, model, valid, out, tokens=tokens, context=context)
    with made as (saved, seconds):
        found = {"loss": held_out(saved, test, context), "seconds": seconds}
        if keep is not None:
            shutil.copytree(saved, keep / name.replace(": ", "-").replace(" ", "-"))
        if bits is None:
            return found | our_sizes(saved, model, name.partition(":")[0])
    return found | {"bits_stored": bits, "bits_read": bits}


def _allow_awq() -> None:
    """AWQModifier pins what it keeps in memory, which fails where there is no accelerator."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.current_accelerator() is None:
        IntermediatesCache.pin_memory = lambda *_, **__: None


def _context(model: Path) -> int:
    """Tokens of a window: CONTEXT, or the pocket model's, which was trained on shorter ones."""
    return 256 if model.name == POCKET.name else CONTEXT


def run_llama(
    name: str, python: Path, model: Path, valid: str, test: str, out: Path
) -> dict[str, Any]:
    """A row of LLAMA; files that all of them need stay in `out`."""
    part, kind = LLAMA[name]
    command = [str(python), "-m", "evals.llama_types"]
    dense, rows, means = (out / f"{model.name}.{end}" for end in ("gguf", "npy", "npz"))
    if not dense.exists():
        subprocess.run([*command, "write", str(model), str(dense)], check=True, cwd=ROOT)
    if not rows.exists():
        np.save(rows, _windows(model, test))
    if not means.exists():
        np.savez(means, **_mean_squares(model, valid, out))  # type: ignore[arg-type]
    begin = time.monotonic()
    target = out / f"{model.name}.quantised.gguf"
    files = [dense.resolve(), kind, part, rows.resolve(), means.resolve(), target.resolve()]
    with (out / "llama.log").open("w") as log:
        done = subprocess.run(
            [*command, "measure", *map(str, files)], cwd=ROOT, env=os.environ,
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    target.unlink(missing_ok=True)
    if done.returncode:
        end = (out / "llama.log").read_text(errors="replace")[-1500:]
        raise SystemExit(f"{name}: llama.cpp ended with {done.returncode}\n{end}")
    found = json.loads(done.stdout.splitlines()[-1])
    if kind == "F32":
        found |= {"bits_stored": 16, "bits_read": 16}  # what its values need
    return found | {"seconds": round(time.monotonic() - begin)}


def _windows(model: Path, test: str) -> np.ndarray:
    """The windows of `text_loss`, int32 [windows, length]."""
    from transformers import AutoTokenizer

    from evals.pocket.corpus import token_rows

    tokenizer, length = AutoTokenizer.from_pretrained(model), _context(model)
    rows = token_rows([test[: HELD_OUT * 8]], tokenizer, length)[: HELD_OUT // length]
    return rows.numpy().astype(np.int32)


def _mean_squares(model: Path, valid: str, out: Path) -> dict[str, np.ndarray]:
    """An importance matrix: of each linear, by its GGUF name, mean squared inputs [in] over the
    calibration tokens that the recipes have."""
    import torch

    from evals.perplexity import load_model
    from wexpand_plugin.compress.loading import load_inputs

    file = calibration(valid, out)
    length = _context(model)
    inputs = load_inputs(str(model), str(file), samples=TOKENS // length, max_seq_length=length)
    file.unlink()
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + args[0].double().square().mean(dim=(0, 1))

        return hook

    dense = load_model(model)
    for name, module in dense.named_modules():
        _, _, place = name.partition("layers.")
        block, _, inner = place.partition(".")
        if inner in GGUF_NAMES:
            module.register_forward_pre_hook(watch(f"blk.{block}.{GGUF_NAMES[inner]}.weight"))
    with torch.no_grad():
        for row in inputs.rows:
            dense.model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    return {name: (s / len(inputs.rows)).float().numpy() for name, s in sums.items()}


def _texts(data: Path | None) -> tuple[str, str]:
    """Calibration text and held-out text."""
    if str(data) != "pocket":
        return wikitext(data)
    from evals.pocket.corpus import files

    both = ("\n".join(text for _, text in files(split)) for split in ("train", "validation"))
    valid, test = (text[: 8 * TOKENS] for text in both)
    return valid, test


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Rows, or patterns; all.")] = None,
    data: Annotated[Path | None, typer.Option(help="WikiText-2's folder, or pocket.")] = None,
    model: Annotated[Path | None, typer.Option(help="Another model's directory.")] = None,
    out: Annotated[Path, typer.Option(help="Where models go.")] = Path("runs/size_curve"),
    llama: Annotated[Path | None, typer.Option(help="Python with llama.cpp.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder for models, to be kept.")] = None,
    tokens: Annotated[int, typer.Option(help="Ours, GPTQ's and SparseGPT's.")] = TOKENS,
    json_file: Annotated[Path, typer.Option("--json")] = RESULTS,
) -> None:
    """Loss and bits per weight of each row; the file is written after each."""
    known = list(MODIFIERS) + (list(LLAMA) if llama else [])
    wanted = [n for pattern in names or ("*",) for n in known if fnmatchcase(n, pattern)]
    if not wanted:
        raise SystemExit(f"{names} are none of {', '.join([*MODIFIERS, *LLAMA])} (with --llama)")
    out.mkdir(parents=True, exist_ok=True)
    directory = model or get_model(out)
    valid, test = _texts(data)
    begin = {"command": "python -m evals.size_curve", "model": label(str(directory)), "rows": {}}
    for name in dict.fromkeys(["dense", *wanted]):
        # read again each time: another process may have added rows
        results = json.loads(json_file.read_text()) if json_file.exists() else begin
        plain = tokens == TOKENS or name == "dense" or name in LLAMA
        row = name if plain else f"{name}, {tokens} tokens"
        if (found := results["rows"].get(row)) is None:
            if name == "dense":
                loss = held_out(directory, test, _context(directory))
                found = {"loss": loss, "bits_stored": 16, "bits_read": 16}
            elif llama and name in LLAMA:
                found = run_llama(name, llama, directory, valid, test, out)
            else:
                found = run(name, directory, valid, test, out, keep, tokens)
            results = json.loads(json_file.read_text()) if json_file.exists() else begin
            results["rows"][row] = found
            json_file.write_text(json.dumps(results, indent=1) + "\n")
        added = found["loss"] - results["rows"]["dense"]["loss"]
        print(f"{row:24} {found['bits_stored']:6.3f} bits ({added:+.4f})  {found}", flush=True)


if __name__ == "__main__":
    typer.run(main)
