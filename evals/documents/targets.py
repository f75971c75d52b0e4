"""What was aimed at beforehand, and whether the results meet it."""

from collections.abc import Iterator

from .results import results, table
from .speed import block_ratio

__all__ = ["TABLES"]

Row = tuple[str, float, float, bool]
"""what, target, found, whether less is better"""


def _accuracy() -> Iterator[Row]:
    rows = results("real_model")["rows"]
    for name, target in (("50% bfloat16", 0.15), ("50% int4", 0.20), ("80% bfloat16", 1.0)):
        every = {key: row for key, row in rows.items() if f"{key} ".startswith(f"{name} ")}
        best = min(every, key=lambda key: every[key]["loss"])
        found = every[best]["loss"] - rows["dense"]["loss"]
        what = best.partition(" tuned")[0]
        yield f"loss added on a real model, {what}, tuned", target, found, True


def _kernel() -> Iterator[Row]:
    cells = results("kernel_cpu_values")["results"]
    for tokens, values, sparsity, target in (
        (1, "int4", "0", 2.5), (1, "int4", "0.5", 3), (1, "int4", "0.8", 4),
        (1, "int8", "0.5", 2.3), (512, "int4", "0", 0.8), (512, "int4", "0.5", 0.8),
    ):  # fmt: skip
        found = block_ratio(cells, tokens=tokens, values=values, sparsity=sparsity)
        label = f"a block's linears, {values}, {float(sparsity):.0%} zeros"
        yield f"{label}, over dense, {tokens} token{'s' * (tokens > 1)}", target, found, False


def _serve() -> Iterator[Row]:
    rows = {(row["model"], row["what"]): row for row in results("serve_contenders")["rows"]}
    half, experts = "50% int4", "50% int4, 16 experts, size 0.5"
    one = rows[half, "decode 1"]
    yield f"vLLM over dense, {half}, 1 sequence", 2.5, one["ratio"], False
    theirs = rows["Q4_0", "decode 1"]["tokens_per_s"]
    yield f"... over llama.cpp's Q4_0, {half}, 1 sequence", 1, one["tokens_per_s"] / theirs, False
    for model in (half, experts):
        for step in ("decode 4", "decode 16", "prefill"):
            yield f"vLLM over dense, {model}, {step}", 1, rows[model, step]["ratio"], False


def _table(rows: Iterator[Row]) -> str:
    lines = []
    for what, target, found, less in rows:
        met = found <= target if less else found >= target
        sign = "at most" if less else "at least"
        lines.append([what, f"{sign} {target:g}", f"{found:.3g}", "met" if met else "**missed**"])
    return table(["", "target", "measured", ""], lines)


def targets_accuracy() -> str:
    """Targets of tuning."""
    return _table(_accuracy())


def targets_speed() -> str:
    """Targets of the CPU kernel, alone and in vLLM."""

    def rows() -> Iterator[Row]:
        yield from _kernel()
        yield from _serve()

    return _table(rows())


TABLES = (targets_accuracy, targets_speed)
