"""Large models: tables of docs/large-models.md, computed and not measured."""

import math

from .results import paragraph, results, table

__all__ = ["TABLES"]

GPU_BYTES = 80e9


def large_compress() -> str:
    """Hours and memory of compressing."""
    lines = []
    for name, row in results("large")["rows"].items():
        for gpus, found in row["compress"].items():
            memory = f"{found['gpu_bytes'] / 1e9:.0f} GB"
            lines.append([
                f"`{name}`", gpus, f"{found['tokens'] // 1024}k",
                f"{found['plan_hours']:.1f}" if found["plan_hours"] else "",
                f"{found['hours']:.1f}",
                f"**{memory}**" if found["gpu_bytes"] > GPU_BYTES else memory,
                f"{found['main_bytes'] / 1e9:.0f} GB",
            ])  # fmt: skip
    head = ["recipe", "GPUs", "tokens", "hours for the plan", "hours in all", "memory of a GPU"]
    return table([*head, "main memory"], lines)


def large_serve() -> str:
    """Bytes of the models, and the most that memory lets a sequence decode."""
    found = results("large")
    dense = {"stored_bytes": found["dense_bytes"], "read_bytes": found["dense_bytes"]}
    rows = {"dense bfloat16": dense} | {f"`{n}`": r["serve"] for n, r in found["rows"].items()}
    sequence = next(iter(found["rows"].values()))["serve"]["sequence_bytes"]
    lines = []
    for name, row in rows.items():
        gpus = math.ceil((row["stored_bytes"] + sequence) / (0.9 * GPU_BYTES))
        most = [f"{speed / row['read_bytes']:.0f}" for speed in found["bytes_per_s"]]
        sizes = [f"{row[key] / 1e9:.0f} GB" for key in ("stored_bytes", "read_bytes")]
        lines.append([name, *sizes, str(gpus), *most])
    head = ["", "weights", "read per token", "GPUs of 80 GB"]
    return table([*head, "tokens/s at most, H100", "CPU server"], lines)


def large_assumed() -> str:
    """What the tables above take for granted."""
    found = results("large")
    said = paragraph(
        f"Computed by `{found['command']}` (evals/results/large.json), not measured. What it takes "
        "for granted of an H100, and of what is around it:"
    )
    lines = [[what, _number(value)] for what, value in found["assumed"]]
    return f"{said}\n\n{table(['', 'assumed'], lines)}"


def _number(value: float) -> str:
    for size, unit in ((1e12, "10^12"), (1e9, "10^9")):
        if value >= size:
            return f"{value / size:g} x {unit}"
    return f"{value:g}"


TABLES = (large_compress, large_serve, large_assumed)
