"""Common tasks by lm-eval through vLLM, on files that are at hand: dense, ours, quantised.

    python -m evals.lm_tasks NAME=DIRECTORY [...] --data FOLDER [--items 500] [--dtype bfloat16]
                             [--serve-env .venvs/serve] [--json evals/results/lm_tasks.json]

ARC-easy, PIQA, BoolQ, WinoGrande, OpenBookQA and BLiMP, no examples given, with lm-eval's own
prompts. FOLDER holds `tasks/*.jsonl`, whose lines have "query", "choices" and "gold" (winogrande:
"context_options", "continuation", "gold"), and `blimp/*.jsonl`, BLiMP's 67 sets. Of each the same
`--items` are taken, drawn by a fixed seed, of BLiMP as many from each set as makes twice that many;
a standard error says what so few can tell, and "guess" what the most common answer comes to.

A row is a name and a model directory that vLLM can load, such as `evals.size_curve --keep` leaves;
one that the file has with as many items is not run again. Models quantised by llm-compressor, whose
3 bits vLLM cannot run, are written out dense first (`--decompress NAME=DIRECTORY`): the same
weights, so the same scores.
"""

import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from evals.processes import ROOT, failure, run_step

__all__ = ["TASKS", "choose", "guess", "write_tasks"]

QUESTION = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
TASKS: dict[str, dict[str, Any]] = {
    "arc_easy": QUESTION | {"doc_to_text": "{{query}}\nAnswer:"},
    "piqa": QUESTION | {"doc_to_text": "{{query}}Answer:"},
    "boolq": QUESTION | {"doc_to_text": "{{query}}\nAnswer:"},
    "openbook_qa": QUESTION,
    # two contexts, one continuation
    "winogrande": {
        "doc_to_text": "gold",
        "doc_to_choice": "{{context_options}}",
        "doc_to_target": "{{continuation}}",
    },
    "blimp": {
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
    },
}
"""name -> how lm-eval makes questions of its items"""
PREFIX = "local_"
"""before a task's name: lm-eval has tasks of the same names"""
SEED = 0
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
RESULTS = ROOT / "evals" / "results" / "lm_tasks.json"


def choose(data: Path, task: str, items: int) -> list[dict[str, Any]]:
    """The items of a task: always the same ones, in the files' order."""
    if task != "blimp":
        return list(_drawn(data / "tasks" / f"{task}.jsonl", items))
    files = sorted((data / "blimp").glob("*.jsonl"))
    if not files:
        raise SystemExit(f"{data / 'blimp'} should have BLiMP's files, *.jsonl")
    each = max(1, round(2 * items / len(files)))
    return [item for file in files for item in _drawn(file, each)]


def guess(task: str, items: list[dict[str, Any]]) -> float:
    """The accuracy of one answer for all `items`, the most common one."""
    if task == "blimp":  # the right sentence is the first by its name only
        return 0.5
    return Counter(item["gold"] for item in items).most_common(1)[0][1] / len(items)


def _drawn(file: Path, items: int) -> Iterator[dict[str, Any]]:
    if not file.exists():
        raise SystemExit(f"{file} does not exist; --data should be a folder with tasks/ and blimp/")
    lines = file.read_text(encoding="utf8").splitlines()
    places = range(len(lines))
    if items < len(lines):
        places = sorted(random.Random(SEED).sample(places, items))
    return (json.loads(lines[place]) for place in places)


def write_tasks(data: Path, folder: Path, items: int) -> None:
    """lm-eval's YAML and the items of each task, in `folder`."""
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True}
               for name in ("acc", "acc_norm")]  # fmt: skip
    for task, keys in TASKS.items():
        file = folder / f"{task}.jsonl"
        chosen = choose(data, task, items)
        file.write_text("".join(json.dumps(item) + "\n" for item in chosen), encoding="utf8")
        config = {
            "task": PREFIX + task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            **keys,
            "metric_list": metrics if task != "blimp" else metrics[:1],
            "metadata": {"version": 1.0},
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def score(model: Path, tasks: Path, out: Path, dtype: str, serve_env: Path) -> dict[str, Any]:
    """task -> {"acc": .., "acc_stderr": .., "items": ..} and, but for BLiMP, acc_norm."""
    log, found = out / "lm_eval.log", out / "found"
    run_step("lm_eval", [
        str(serve_env / "bin" / "lm_eval"), "--model", "vllm", "--model_args",
        f"pretrained={model},dtype={dtype},max_model_len=1024,gpu_memory_utilization=0.3",
        "--tasks", ",".join(PREFIX + task for task in TASKS), "--include_path", str(tasks),
        "--batch_size", "auto", "--output_path", str(found),
    ], log, 7200, OFFLINE | {"HF_DATASETS_CACHE": str(out / "cache")})  # fmt: skip
    file = next(found.rglob("results_*.json"), None)
    if file is None:
        raise failure("lm_eval", f"left no results in {found}", log)
    read = json.loads(file.read_text())
    rows = {}
    for task in TASKS:
        own = read["results"][PREFIX + task]
        keys = {"acc": "acc,none", "acc_stderr": "acc_stderr,none", "acc_norm": "acc_norm,none",
                "acc_norm_stderr": "acc_norm_stderr,none"}  # fmt: skip
        rows[task] = {key: own[long] for key, long in keys.items() if long in own}
        rows[task]["items"] = read["n-samples"][PREFIX + task]["effective"]
    return rows


def write_dense(model: Path, out: Path, dtype: str) -> Path:
    """A quantised model's weights as transformers computes with them, as a dense model in `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype),
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )  # fmt: skip
    plain = type(network)(network.config).to(getattr(torch, dtype))
    # scales and zero points go; the weights are what they and the integers made
    state = network.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return out


def _named(every: list[str] | None) -> dict[str, Path]:
    pairs = dict(text.partition("=")[::2] for text in every or ())
    for name, path in pairs.items():
        if not (Path(path) / "config.json").exists():
            raise SystemExit(f"{name}={path} should be NAME=DIRECTORY, of a model with config.json")
    return {name: Path(path) for name, path in pairs.items()}


def main(
    models: Annotated[list[str] | None, typer.Argument(help="NAME=DIRECTORY")] = None,
    data: Annotated[Path, typer.Option(help="Folder with tasks/ and blimp/.")] = Path("data"),
    decompress: Annotated[list[str] | None, typer.Option(help="As MODELS; dense first.")] = None,
    items: Annotated[int, typer.Option(min=2, help="Of each task; BLiMP has twice as many.")] = 500,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    serve_env: Annotated[Path, typer.Option()] = ROOT / ".venvs" / "serve",
    json_file: Annotated[Path, typer.Option("--json")] = RESULTS,
) -> None:
    """Scores of each model; the file is written after each."""
    plain, quantised = _named(models), _named(decompress)
    command = f"python -m evals.lm_tasks --items {items} --dtype {dtype}"
    begin = {"command": command, "dtype": dtype, "rows": {}}
    results = json.loads(json_file.read_text()) if json_file.exists() else begin
    if results["dtype"] != dtype:
        raise SystemExit(f"{json_file}: its dtype is {results['dtype']}, not {dtype}")
    results["guess"] = {task: guess(task, choose(data, task, items)) for task in TASKS}
    for name, path in (plain | quantised).items():
        known = results["rows"].get(name, {})
        if known.get("arc_easy", {}).get("items") != items:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder)
                (out / "tasks").mkdir()
                write_tasks(data, out / "tasks", items)
                model = write_dense(path, out / "dense", dtype) if name in quantised else path
                results["rows"][name] = score(model, out / "tasks", out, dtype, serve_env)
            _write(results, json_file)
        scores = results["rows"][name]
        print(f"{name:24}", *(f"{task} {row['acc']:.3f}" for task, row in scores.items()),
              flush=True)  # fmt: skip
    _write(results, json_file)


def _write(results: dict[str, Any], file: Path) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, file)


if __name__ == "__main__":
    typer.run(main)
