"""The main job on the embedded model: `make demo`, or python -m evals.demo --serve-env DIR

Dense; SparseGPT and expanded, at the sparsity and on the linears that the two recipes name; and all
linears by the dial: the held-out loss of each with transformers, a completion of the dial's model
from `vllm serve`, and dense and dial scored by `lm_eval --model vllm`. Every step is a command that
one could type; it is printed, and its output goes to a log beside the results.
"""

import importlib.metadata
import json
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.pocket import MODEL, corpus
from evals.processes import ROOT, StepFailed, failure, free_port, process, run_step

__all__ = ["Demo", "served", "table"]

TASKS = {"stdlib_choice": ("acc", "acc_norm"), "stdlib_perplexity": ("bits_per_byte",)}
PROMPT = "import unittest\n\nclass ReadTest(unittest.TestCase):\n    def test_read(self):"
PACKAGES = ("wexpand-plugin", "torch", "transformers", "compressed-tensors")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def served(vllm: Path, model: Path, dtype: str, log: Path, limit: float = 900) -> dict[str, str]:
    """Start `vllm serve`, ask for one greedy completion over HTTP, and stop the server."""
    name, port = "vllm serve", free_port()
    address = f"http://127.0.0.1:{port}"
    command = [
        str(vllm), "serve", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "pocket", "--dtype", dtype, "--max-model-len", "512",
    ]  # fmt: skip
    show(command)
    deadline = time.monotonic() + limit
    with process(command, log, OFFLINE) as server:
        while not answers(f"{address}/health"):
            if server.poll() is not None:
                raise failure(name, f"ended with exit code {server.returncode}", log)
            if time.monotonic() > deadline:
                raise failure(name, f"was not ready after {limit:.0f} s", log)
            time.sleep(1)
        body = {"model": "pocket", "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                text = json.load(reply)["choices"][0]["text"]
        except (OSError, ValueError, LookupError) as error:
            raise failure(name, f"did not answer a completion ({error})", log) from error
    if not text.strip():
        raise failure(name, f"answered nothing but {text!r}", log)
    return {"prompt": PROMPT, "text": text}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def show(command: Sequence[str]) -> None:
    print(f"    $ {shlex.join(command).replace(f'{ROOT}/', '')}", flush=True)


class Demo:
    """The steps, in order, and what they found."""

    def __init__(self, serve_env: Path, out: Path) -> None:
        import torch

        self.serve_bin, self.out = serve_env.absolute() / "bin", out.absolute()
        self.compress_bin = Path(sys.executable).parent
        # vLLM's GPU kernels are made for 16 bits; a CPU computes float32 as fast
        self.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        self.models = {
            "dense": MODEL,
            "sparsegpt": self.out / "sparsegpt",
            "expanded": self.out / "expanded",
            "dial": self.out / "dial",
        }
        self.results: dict[str, Any] = {name: {} for name in self.models}
        self.step, self.steps = 0, 13
        for path in (self.serve_bin / "vllm", self.serve_bin / "lm_eval"):
            if not path.exists():
                raise StepFailed(f"{path} does not exist; run 'make env-serve' first")

    def run(self) -> dict[str, Any]:
        """Everything; returns what results.json holds."""
        calibration = self.out / "calibration.jsonl"
        if self.out.exists():
            if any(self.out.iterdir()) and not calibration.exists():
                raise StepFailed(f"{self.out} holds something else; choose another --out")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True)
        with self.announce("calibration text from the standard library", "1 second"):
            texts = corpus.excerpts("train", count=160, characters=1000)
            calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        with self.announce("SparseGPT: prune, dense with zeros", "1 minute"):
            self.compress("pruned", "sparsegpt", calibration)
        with self.announce("... and packed, as vLLM serves it", "10 seconds"):
            pack = [self.compress_bin / "wexpand", "pack", self.out / "pruned"]
            self.command("pack", [*pack, self.models["sparsegpt"]])
        with self.announce("Sparse Expansion: 16 experts in the dense model's size", "2-10 min"):
            self.compress("expanded", "sparse_expansion_budget", calibration)
        with self.announce("the dial: all linears in a fifth of their bytes, tuned", "2-5 min"):
            self.compress("dial", "dial", calibration, "--size", "0.2")
        for name in self.models:
            with self.announce(f"held-out loss, {name}, with transformers", "1 minute"):
                self.loss(name)
        with self.announce("vllm serve: the dial's model over HTTP", "2 minutes"):
            self.results["served"] = served(
                self.serve_bin / "vllm", self.models["dial"], self.dtype, self.log("serve")
            )
            print(f"    {PROMPT!r} -> {self.results['served']['text']!r}")
        for name in ("dense", "dial"):
            with self.announce(f"lm_eval --model vllm: {name}", "2 minutes"):
                self.lm_eval(name)
        with self.announce("sizes", "a second"):
            self.sizes()
            self.results["versions"] = self.versions()
        return self.results

    @contextmanager
    def announce(self, what: str, expected: str) -> Iterator[None]:
        self.step += 1
        print(f"[{self.step}/{self.steps}] {what} (about {expected})", flush=True)
        start = time.monotonic()
        yield
        print(f"    done in {time.monotonic() - start:.0f} s", flush=True)

    def log(self, name: str) -> Path:
        return self.out / f"{name}.log"

    def command(self, name: str, command: Sequence[str | Path], limit: float = 3600) -> None:
        words = [str(word) for word in command]
        show(words)
        run_step(name, words, self.log(name), limit, OFFLINE)

    def compress(self, name: str, recipe: str, calibration: Path, *more: str) -> None:
        self.command(name, [
            self.compress_bin / "wexpand", "compress", MODEL, "--recipe", recipe, *more,
            "--dataset", calibration, "--output", self.out / name,
            "--max-seq-length", "256", "--samples", "128",
        ])  # fmt: skip

    def loss(self, name: str) -> None:
        found = self.out / f"loss_{name}.json"
        self.command(f"loss_{name}", [
            sys.executable, "-m", "evals.perplexity", self.models[name], "--json", found,
        ])  # fmt: skip
        self.results[name]["loss"] = json.loads(found.read_text())["loss"]
        print(f"    {self.results[name]['loss']:.4f} nats per token")

    def lm_eval(self, name: str) -> None:
        found = self.out / f"lm_eval_{name}"
        self.command(f"lm_eval_{name}", [
            self.serve_bin / "lm_eval", "--model", "vllm", "--model_args",
            f"pretrained={self.models[name]},dtype={self.dtype},max_model_len=512",
            "--tasks", ",".join(TASKS), "--include_path", ROOT / "evals" / "tasks",
            "--output_path", found,
        ])  # fmt: skip
        file = next(found.rglob("results_*.json"), None)
        if file is None:
            log = self.log(f"lm_eval_{name}")
            raise failure(f"lm_eval_{name}", f"left no results in {found}", log)
        scores = json.loads(file.read_text())["results"]
        self.results[name]["lm_eval"] = {
            task: {metric: scores[task][f"{metric},none"] for metric in metrics}
            for task, metrics in TASKS.items()
        }
        print(f"    {self.results[name]['lm_eval']}")

    def sizes(self) -> None:
        from wexpand_plugin.tools.inspect import inspect

        expanded = inspect(self.models["expanded"])
        linears = [linear.name for linear in expanded.linears]
        for name, directory in self.models.items():
            found = expanded if name == "expanded" else inspect(directory, linears)
            self.results[name] |= {
                "linear_bytes": found.linear_bytes,
                "bytes_per_token": found.bytes_per_token,
                "disk_bytes": found.disk_bytes,
            }

    def versions(self) -> dict[str, Any]:
        ask = (
            "import importlib.metadata as m, json, sys; "
            "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
        )
        serve = [self.serve_bin / "python", "-c", ask, *PACKAGES, "vllm", "lm_eval"]
        reply = subprocess.run(serve, check=True, capture_output=True, text=True, cwd=ROOT)
        compress = {name: importlib.metadata.version(name) for name in (*PACKAGES, "llmcompressor")}
        python = ".".join(map(str, sys.version_info[:3]))
        return {"python": python, "compress": compress, "serve": json.loads(reply.stdout)}


def table(results: dict[str, Any]) -> str:
    """The results as text, one line per model."""
    head = ("", "loss", "linears MB", "MB per token", "disk MB", "choice acc", "bits per byte")
    lines = [head]
    for name, found in results.items():
        if "loss" not in found:
            continue
        sizes = (found[key] / 1e6 for key in ("linear_bytes", "bytes_per_token", "disk_bytes"))
        scores = found.get("lm_eval")
        lines.append(
            (
                name,
                f"{found['loss']:.4f}",
                *(f"{size:.2f}" for size in sizes),
                f"{scores['stdlib_choice']['acc']:.3f}" if scores else "-",
                f"{scores['stdlib_perplexity']['bits_per_byte']:.3f}" if scores else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(
    serve_env: Annotated[Path, typer.Option(help="The environment with vLLM and lm-eval.")],
    out: Annotated[Path, typer.Option(help="Where everything goes; replaced.")] = Path("runs/demo"),
) -> None:
    """Compress, measure, serve and score the embedded model."""
    start = time.monotonic()
    try:
        demo = Demo(serve_env, out)
        results = demo.run()
    except StepFailed as error:
        raise SystemExit(str(error)) from None
    file = demo.out / "results.json"
    file.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{table(results)}\n")
    print(
        "loss: held-out, nats per token; linears: those of the MLPs, which all compress; lm_eval "
        f"by vLLM in {demo.dtype}.\nAll of it is in {out}/results.json; "
        f"{(time.monotonic() - start) / 60:.0f} minutes."
    )


if __name__ == "__main__":
    typer.run(main)
