"""vLLM itself: dense, plain sparse and expanded, side by side.

    python -m evals.bench.serve [--json FILE] [--hidden 2048 --ffn 5632 --layers 4]
                                [--dtype float32] [--sparsity 0.8] [--model DIR --expanded DIR]

Without models it makes synthetic ones of the given shape (`wexpand synth`: random weights and
masks; what is measured does not depend on their values). One engine per model is started, all stay
up, and they are asked in turn, so that a slow minute of the machine hits each of them. Prefill is
the time of a prompt with one token generated; decode is what each further token takes. Prompts are
random tokens, and every sequence of a batch is another, so that a batch meets many experts.

What bounds it: decoding one token reads every weight once, so its floor is bytes per token over the
memory's bandwidth; both are printed. Prefill is bound by arithmetic, of which the CPU kernel saves
the zeros' share above 40% sparsity (with bfloat16 instructions above 55%).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["Engine", "resident_bytes"]

PROMPT = 32


def resident_bytes() -> int:
    """Memory of this process [bytes]."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def child(model: str, dtype: str, longest: int) -> None:
    """Run one engine: jobs as JSON lines on stdin, answers on stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM's own output goes to the log
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype=dtype, max_model_len=longest, skip_tokenizer_init=True, max_num_seqs=16,
        max_num_batched_tokens=max(512, longest), enable_prefix_caching=False,
        disable_log_stats=True,
    )  # fmt: skip
    answers.write(json.dumps({"resident": resident_bytes()}) + "\n")
    import torch

    for line in sys.stdin:
        job = json.loads(line)
        generator = torch.Generator().manual_seed(job["seed"])
        ids = torch.randint(3, 250, (job["batch"], job["prompt"]), generator=generator)
        prompts: Any = [{"prompt_token_ids": row} for row in ids.tolist()]
        sampling = SamplingParams(
            temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        answers.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")


class Engine:
    """An engine in a process of its own."""

    def __init__(self, model: Path, dtype: str, longest: int, log: Path):
        cores = sorted(os.sched_getaffinity(0))
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            # all cores for the model: nothing else of this benchmark runs meanwhile
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        }  # fmt: skip
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "evals.bench.serve", "--child", str(model), "--dtype", dtype,
             "--longest", str(longest)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=os.environ | settings,
        )  # fmt: skip
        self.resident = self._answer()["resident"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended early:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def seconds(self, batch: int, prompt: int, tokens: int, seed: int) -> float:
        """Wall time of one `generate`."""
        job = {"batch": batch, "prompt": prompt, "tokens": tokens, "seed": seed}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def make_models(folder: Path, shape: Any, dtype: str, sparsity: float) -> dict[str, Path]:
    """Synthetic models of one shape; all linears of the blocks are sparse."""
    from wexpand_plugin.tools.synth import synth

    common: dict[str, Any] = dict(sparsity=sparsity, dtype=dtype, quiet=True, targets="all", seed=0)
    kinds: dict[str, dict[str, Any]] = {
        "dense": dict(experts=1, dense=True, budget=None),
        f"sparse {sparsity:.0%}": dict(experts=1, dense=False, budget=None),
        f"expanded {sparsity:.0%}, 16 experts, size 1.0": dict(experts=16, dense=False, budget=1.0),
    }
    models = {}
    for number, (name, values) in enumerate(kinds.items()):
        models[name] = folder / str(number)
        synth(models[name], shape, **common, **values)
    return models


def linear_bytes(models: dict[str, Path]) -> dict[str, tuple[float, float]]:
    """(stored, read per token) bytes of the linears of the blocks of each model."""
    from wexpand_plugin.tools.inspect import inspect

    names: list[str] = []
    for path in models.values():
        config = json.loads((path / "config.json").read_text())
        if "quantization_config" in config:
            names = [linear.name for linear in inspect(path).linears]
    found = {}
    for name, path in models.items():
        config = json.loads((path / "config.json").read_text())
        seen = inspect(path) if "quantization_config" in config else inspect(path, names)
        found[name] = (seen.linear_bytes, seen.bytes_per_token)
    return found


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    hidden: Annotated[int, typer.Option()] = 2048,
    ffn: Annotated[int, typer.Option()] = 5632,
    layers: Annotated[int, typer.Option()] = 4,
    heads: Annotated[int, typer.Option()] = 32,
    kv_heads: Annotated[int, typer.Option()] = 4,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    sparsity: Annotated[float, typer.Option()] = 0.8,
    model: Annotated[Path | None, typer.Option(help="A dense model instead.")] = None,
    expanded: Annotated[Path | None, typer.Option(help="... and its expanded version.")] = None,
    batches: Annotated[list[int] | None, typer.Option(help="1 4 16")] = None,
    prefill: Annotated[int, typer.Option(help="Prompt tokens of the prefill test.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens decoded per sequence.")] = 24,
    rounds: Annotated[int, typer.Option(min=2)] = 5,
    child_model: Annotated[str | None, typer.Option("--child", hidden=True)] = None,
    longest: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Decode and prefill speed of vLLM on dense, sparse and expanded models."""
    if child_model is not None:
        child(child_model, dtype, longest)
        return
    from evals.bench.timing import read_bandwidth, write_json
    from wexpand_plugin.tools.synth import Shape

    batches = batches or [1, 4, 16]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is not None and expanded is not None:
            models = {"dense": model, "expanded": expanded}
        else:
            shape = Shape(hidden, ffn, layers, heads, kv_heads, 1024, 2048)
            models = make_models(folder, shape, dtype, sparsity)
        sizes = linear_bytes(models)
        bandwidth = read_bandwidth()
        engines = {}
        for number, (kind, path) in enumerate(models.items()):
            print(f"starting {kind}", file=sys.stderr, flush=True)
            engines[kind] = Engine(path, dtype, prefill + tokens + 8, folder / f"{number}.log")
        seconds: dict[str, dict[str, list[float]]] = {kind: {} for kind in engines}
        for turn in range(rounds + 1):
            for kind, engine in engines.items():
                found = {"prefill": engine.seconds(1, prefill, 1, turn)}
                for batch in batches:
                    first = engine.seconds(batch, PROMPT, 1, turn)
                    whole = engine.seconds(batch, PROMPT, 1 + tokens, turn)
                    found[f"decode {batch}"] = (whole - first) / tokens
                if turn:  # the first turn warms up
                    for key, value in found.items():
                        seconds[kind].setdefault(key, []).append(value)
        resident = {kind: engine.resident for kind, engine in engines.items()}
        for engine in engines.values():
            engine.close()

    print(
        f"{dtype}, read bandwidth {bandwidth / 1e9:.1f} GB/s, {os.cpu_count()} cores; median of "
        f"{rounds} turns (quartiles); ratio: dense time over this one's, within a turn"
    )
    rows = []
    for kind in models:
        stored, read = sizes[kind]
        print(
            f"\n{kind}: linears {stored / 1e6:.1f} MB stored, {read / 1e6:.1f} MB read per token "
            f"(floor {1e3 * read / bandwidth:.2f} ms); process {resident[kind] / 1e6:.0f} MB"
        )
        for key, values in seconds[kind].items():
            low, median, high = statistics.quantiles(values, n=4, method="inclusive")
            pairs = zip(seconds["dense"][key], values, strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            count = prefill if key == "prefill" else int(key.split()[1])
            rows.append(
                {
                    "model": kind, "what": key, "median_s": median, "low_s": low, "high_s": high,
                    "tokens_per_s": count / median, "ratio": ratio,
                }
            )  # fmt: skip
            print(
                f"  {key:10} {1e3 * median:8.2f} ms ({1e3 * low:.2f}-{1e3 * high:.2f})  "
                f"{count / median:8.1f} tokens/s  {ratio:5.2f}x"
            )
    write_json(None if json_file is None else str(json_file), {
        "command": "python -m evals.bench.serve", "dtype": dtype, "sparsity": sparsity,
        "bandwidth": bandwidth, "resident": resident, "bytes": sizes, "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
