"""(g) What the method costs, side by side: time, memory, bytes stored and read, decode speed.

Each pair of columns is of another benchmark and model, and a row has what was measured of it.
"""

from typing import Any

from .results import machine, paragraph, results, table

__all__ = ["TABLES"]

HEAD = ("", "CPU time", "peak memory", "bits stored", "... read", "disk MB", "MB read",
        "decode of 1", "... of 16")  # fmt: skip


def _compressing() -> dict[str, list[str]]:
    """Over SparseGPTModifier, by number of experts."""
    return {
        name: [f"{row['cpu_ratio']:.1f}x", f"{row['peak_ratio']:.1f}x"]
        for name, row in results("compress")["median"].items()
    }


def _bits() -> dict[str, list[str]]:
    """Per weight, of SmolLM2's MLP linears; of the dial's sizes from its own curve."""
    rows: dict[str, Any] = {
        f"dial, {name.split()[-1]} bits": row
        for name, row in results("size_curve")["rows"].items()
        if name.startswith("mlp: ours") and "tuned" not in name
    }
    served = results("serve_contenders")["models"]
    rows |= {name: row for name, row in results("real_model")["rows"].items() if name in served}
    return {
        name: [f"{row['bits_stored']:.2f}", f"{row.get('bits_read', row['bits_stored']):.2f}"]
        for name, row in rows.items()
    }


def _serving() -> dict[str, list[str]]:
    """Our formats in vLLM, beside dense: size, bytes read per token, speed over dense."""
    found = results("serve_contenders")
    speed = {(row["model"], row["what"]): row["ratio"] for row in found["rows"]}
    return {
        name: [
            f"{model['disk'] / 1e6:.0f}", f"{model['read_per_token'] / 1e6:.0f}",
            *(f"{speed[name, step]:.2f}x" for step in ("decode 1", "decode 16")),
        ]
        for name, model in found["models"].items()
        if model["read_per_token"] is not None
    }  # fmt: skip


def costs() -> str:
    """Everything by configuration; empty where it was not measured."""
    parts = _compressing(), _bits(), _serving()
    widths = 2, 2, 4
    names = dict.fromkeys(name for part in parts for name in part)
    lines = [
        [name, *(cell for part, n in zip(parts, widths, strict=True)
                 for cell in part.get(name, [""] * n))]
        for name in names
    ]  # fmt: skip
    return table(HEAD, lines)


def costs_setting() -> str:
    """Where each column is from."""
    compress, served = results("compress"), results("serve_contenders")
    real, curve = results("real_model"), results("size_curve")
    return paragraph(
        "CPU time and peak memory of compressing a small random Llama, of what llm-compressor's "
        f"SparseGPTModifier takes (`{compress['command']}`, evals/results/compress.json). Bits per "
        f"weight stored and read per token, MLP linears of {real['model']} "
        f"(`{real['command']}`, `{curve['command']}`, real_model.json and size_curve.json there). "
        f"Size on disk, linears' bytes read per token and decode speed over dense of "
        f"{served['layers']} blocks of TinyLlama's shape in vLLM, {machine(served['machine'])} "
        f"(`{served['command']} --llama PYTHON`, serve_contenders.json)."
    )


TABLES = (costs, costs_setting)
