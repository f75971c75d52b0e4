"""Compressing: ours (1, 4, 16 experts in full, 16 within a budget) beside SparseGPTModifier.

    python -m evals.bench.compress [--json FILE] [--rounds 3]

One model (a random Llama: hidden 512, ffn 1376, 4 layers, float32), 64 x 256 calibration tokens,
the same targets and sparsity. Every contender runs in a process of its own, in turn, `rounds`
times: wall time and CPU time of `oneshot` without loading Python packages, and the peak memory of
the process. What bounds it: forward passes and Hessians cost the same for any number of experts
(each token belongs to one); Cholesky factors, the column loop and the pruned copies grow with them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.bench.timing import write_json

__all__ = ["CONTENDERS", "measure"]

TARGETS = ["re:.*layers.*_proj$"]
CONTENDERS: dict[str, dict[str, Any]] = {
    "SparseGPTModifier": {},
    "1 expert": {"num_experts": 1},
    "4 experts": {"num_experts": 4},
    "16 experts": {"num_experts": 16},
    "16 experts, size 1.0": {"num_experts": 16, "size_budget": 1.0},
}


def make_model(directory: Path) -> None:
    """The random model, saved once for all runs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def measure(contender: str, model: Path, sparsity: float) -> dict[str, float]:
    """Run one contender in this process."""
    import resource
    import time

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from wexpand_plugin.compress.modifier import SparseExpansionModifier

    values = CONTENDERS[contender]
    if values:
        modifier: Any = SparseExpansionModifier(
            sparsity=sparsity, mask_structure="unstructured", targets=TARGETS, **values
        )
    else:
        modifier = SparseGPTModifier(sparsity=sparsity, targets=TARGETS)
    torch.manual_seed(0)
    rows = torch.randint(1, 1024, (64, 256)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 256] * 64})
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(1024)}, unk_token="t0"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=str(model), dataset=data, recipe=[modifier], max_seq_length=256,
        num_calibration_samples=64, processor=PreTrainedTokenizerFast(tokenizer_object=words),
    )  # fmt: skip
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "before_mib": before,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each contender.", min=1)] = 3,
    sparsity: Annotated[float, typer.Option(help="Of every contender.")] = 0.8,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    model: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time and memory of compressing, alternating, with medians and spread."""
    if only is not None and model is not None:
        print("RESULT " + json.dumps(measure(only, model, sparsity)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for number in range(rounds):
            for name in CONTENDERS:
                print(f"round {number + 1}/{rounds}: {name}", file=sys.stderr, flush=True)
                child = subprocess.run(
                    [sys.executable, "-m", "evals.bench.compress", "--only", name, "--model",
                     folder, "--sparsity", str(sparsity)],
                    capture_output=True, text=True,
                )  # fmt: skip
                lines = [x for x in child.stdout.splitlines() if x.startswith("RESULT ")]
                if not lines:
                    raise SystemExit(f"{name} failed:\n{child.stderr[-3000:]}")
                runs[name].append(json.loads(lines[0].removeprefix("RESULT ")))

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    print(f"{'':24}{'wall s (min-max)':>22}{'ratio':>8}{'CPU s':>8}{'peak MiB':>10}{'ratio':>8}")
    summary = {}
    for name in CONTENDERS:
        walls = [run["wall_s"] for run in runs[name]]
        row = {key: median(name, key) for key in runs[name][0]}
        # ratios within a round, so that a slow minute of the machine counts for both
        row["wall_ratio"] = statistics.median(
            a["wall_s"] / b["wall_s"]
            for a, b in zip(runs[name], runs["SparseGPTModifier"], strict=True)
        )
        row["peak_ratio"] = row["peak_mib"] / median("SparseGPTModifier", "peak_mib")
        summary[name] = row
        spread = f"{row['wall_s']:.1f} ({min(walls):.1f}-{max(walls):.1f})"
        print(
            f"{name:24}{spread:>22}{row['wall_ratio']:>7.2f}x{row['cpu_s']:>8.1f}"
            f"{row['peak_mib']:>10.0f}{row['peak_ratio']:>7.2f}x"
        )
    write_json(
        None if json_file is None else str(json_file),
        {"command": "python -m evals.bench.compress", "median": summary, "runs": runs},
    )


if __name__ == "__main__":
    typer.run(main)
