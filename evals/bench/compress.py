"""Compressing: ours (1, 4, 16 experts in full, 16 within a budget) beside SparseGPTModifier.

    python -m evals.bench.compress [--quick] [--rounds 3] [--shape TinyLlama-1.1B] [--json FILE]

Every contender runs in a process of its own, in turn, `rounds` times: wall time and CPU time of
`oneshot` without loading Python packages, and the peak memory of the process.

1. A random Llama (hidden 512, ffn 1376, 4 layers, float32), 64 x 256 calibration tokens, the same
   targets and sparsity. --quick ends here.
2. One block of the shape of a real model, with random weights: with and without budget and tuning.
   --shape says which; Llama-3-8B, of which a Hessian of down_proj alone has 0.8 GB, with few
   tokens and experts, and only if asked for.
3. How the CPU time that expanding a block takes grows with experts, tokens and width: exponents
   fitted to three points each, of a small block.

What bounds it: forward passes and Hessians cost the same for any number of experts (each token
belongs to one); Cholesky factors, the column loop and the pruned copies grow with them.
"""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.bench.compress_run import Run
from evals.bench.timing import write_json

__all__ = ["CONTENDERS", "GROWTH", "SHAPES"]

BASELINE = "SparseGPTModifier"
CONTENDERS: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "1 expert": {"num_experts": 1},
    "4 experts": {"num_experts": 4},
    "16 experts": {"num_experts": 16},
    "16 experts, size 1.0": {"num_experts": 16, "size_budget": 1.0},
}
SHAPES = {
    "TinyLlama-1.1B": (
        Run(hidden=2048, ffn=5632, layers=1, heads=32, kv_heads=4, samples=16),
        {
            BASELINE: None,
            "1 expert": {"num_experts": 1},
            "1 expert, tuned": {"num_experts": 1, "tune_epochs": 2},
            "4 experts": {"num_experts": 4},
            "4 experts, size 0.5": {"num_experts": 4, "size_budget": 0.5},
        },
    ),
    "Llama-3-8B": (
        Run(hidden=4096, ffn=14336, layers=1, heads=32, kv_heads=8, samples=8, length=128),
        {BASELINE: None, "1 expert": {"num_experts": 1}, "2 experts": {"num_experts": 2}},
    ),
}
SMALL = Run(hidden=256, ffn=688, layers=1, samples=32)
GROWTH: dict[str, tuple[float, list[tuple[float, Run]]]] = {
    # what grows: exponent that is expected at most, sizes and runs
    "experts": (1.0, [(n, SMALL.of({"num_experts": n})) for n in (4, 16, 64)]),
    "tokens": (
        1.0,
        [(n, Run(256, 688, 1, samples=n, modifier={"num_experts": 4})) for n in (32, 64, 128)],
    ),
    # Hessians grow with the square of the width, solving with its cube
    "width": (
        3.0,
        [
            (n, Run(n, n * 43 // 16, 1, samples=32, modifier={"num_experts": 4}))
            for n in (256, 512, 1024)
        ],
    ),
}


def run_once(run: Run) -> dict[str, float]:
    """Measure `run` in a process of its own."""
    child = subprocess.run(
        [sys.executable, "-m", "evals.bench.compress_run", run.text()],
        capture_output=True,
        text=True,
    )
    lines = [x for x in child.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{run} failed:\n{child.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def contest(
    base: Run, contenders: Mapping[str, dict[str, Any] | None], rounds: int, title: str
) -> dict[str, Any]:
    """All contenders in turn; prints a table: medians, and all runs."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, modifier in contenders.items():
            print(f"{title}, round {number + 1}/{rounds}: {name}", file=sys.stderr, flush=True)
            runs[name].append(run_once(base.of(modifier)))
    print(f"{title:24}{'wall s (min-max)':>22}{'ratio':>8}{'CPU s':>8}{'peak MiB':>10}{'ratio':>8}")
    summary = {}
    for name, found in runs.items():
        row = {key: statistics.median(run[key] for run in found) for key in found[0]}
        # ratios within a round, so that a slow minute of the machine counts for both
        for kind in ("wall", "cpu"):
            row[f"{kind}_ratio"] = statistics.median(
                a[f"{kind}_s"] / b[f"{kind}_s"] for a, b in zip(found, runs[BASELINE], strict=True)
            )
        row["peak_ratio"] = row["peak_mib"] / statistics.median(
            run["peak_mib"] for run in runs[BASELINE]
        )
        summary[name] = row
        walls = [run["wall_s"] for run in found]
        spread = f"{row['wall_s']:.1f} ({min(walls):.1f}-{max(walls):.1f})"
        print(
            f"{name:24}{spread:>22}{row['wall_ratio']:>7.2f}x{row['cpu_s']:>8.1f}"
            f"{row['peak_mib']:>10.0f}{row['peak_ratio']:>7.2f}x"
        )
    return {"median": summary, "runs": runs}


def exponents() -> dict[str, Any]:
    """How CPU seconds of expanding one block grow; prints a line for each."""
    found = {}
    for name, (expected, points) in GROWTH.items():
        print(f"growth with {name}", file=sys.stderr, flush=True)
        seconds = [run_once(run)["blocks_cpu_s"] for _, run in points]
        slope = fitted([size for size, _ in points], seconds)
        found[name] = {
            "exponent": slope,
            "expected_at_most": expected,
            "sizes": [size for size, _ in points],
            "blocks_cpu_s": seconds,
        }
        each = ", ".join(f"{size}: {s:.2f} s" for (size, _), s in zip(points, seconds, strict=True))
        print(f"exponent in {name}: {slope:.2f} (expected at most {expected}): {each}")
    return found


def fitted(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log sizes, by least squares."""
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, seconds)]).slope


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each contender.", min=1)] = 3,
    quick: Annotated[bool, typer.Option(help="The small model alone.")] = False,
    shape: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(SHAPES)}.")] = None,
    sparsity: Annotated[float, typer.Option(help="Of every contender.")] = 0.8,
) -> None:
    """Time and memory of compressing, alternating, with medians and spread."""
    asked = "".join(f" --shape {name}" for name in shape or ()) + " --quick" * quick
    found: dict[str, Any] = {"command": f"python -m evals.bench.compress{asked}"}
    found |= contest(Run(sparsity=sparsity), CONTENDERS, rounds, "hidden 512, 4 layers")
    if not quick:
        found["exponents"] = exponents()
        found["shapes"] = {
            name: contest(*SHAPES[name], rounds=1, title=name)
            for name in (shape or ["TinyLlama-1.1B"])
        }
    write_json(None if json_file is None else str(json_file), found)


if __name__ == "__main__":
    typer.run(main)
