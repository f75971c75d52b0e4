"""The dial beside what one would take instead, size by size: tables of evals.size_curve."""

from .results import paragraph, results, table

__all__ = ["TABLES"]


def size_curve_mlp() -> str:
    """The dial beside other quantisers, MLP linears."""
    return _size_curve("mlp", "MLP linears")


def size_curve_all() -> str:
    """The same of all linears of the blocks."""
    return _size_curve("all", "all linears of the blocks")


def _size_curve(part: str, what: str) -> str:
    found = results("size_curve")
    dense = found["rows"]["dense"]["loss"]
    rows = {
        name.removeprefix(f"{part}: "): row
        for name, row in found["rows"].items()
        if name.startswith(f"{part}: ")
    }
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["bits_stored"]):
        predicted = f"{row['predicted']:.3f}" if "predicted" in row else ""
        own = name.startswith("ours")
        label = f"**{name.replace('ours', 'dial at')} bits**" if own else name
        label = label.replace(" tuned bits", " bits, tuned")
        lines.append([label, f"{row['bits_stored']:.2f}", f"{row['loss'] - dense:.3f}", predicted])
    head = ["", "bits per weight", "loss added", "predicted, untuned"]
    setting = (
        f"{found['model']}, {what}, over the dense loss of {dense:.3f} (`{found['command']}`, "
        "evals/results/size_curve.json):"
    )
    return f"{paragraph(setting)}\n\n{table(head, lines)}"


def size_curve_short() -> str:
    """The dial beside the best of the others, in two sentences."""
    rows = results("size_curve")["rows"]
    dense = rows["dense"]["loss"]
    kinds = {"GPTQ": "GPTQModifier", "AWQ": "AWQModifier", "llama.cpp": "llama.cpp's"}

    def said(name: str) -> str:
        kind, *rest = name.removeprefix("mlp: ").split()
        label = kinds[kind] + (f" {' '.join(rest)}" if kind == "llama.cpp" else "")
        row = rows[name]
        return f"{label} {row['loss'] - dense:.3f} at {row['bits_stored']:.2f}"

    lines = []
    for bits in ("4.25", "3.25", "2.5"):
        own = rows.get(f"mlp: ours {bits} tuned")
        if own is None:
            continue
        others = [
            name for name, row in rows.items()
            if name.startswith("mlp: ") and name.split()[1] in kinds
            and -0.1 < row["bits_stored"] - float(bits) < (0.3 if bits == "4.25" else 0.9)
        ]  # fmt: skip
        beside = "; ".join(map(said, sorted(others, key=lambda name: rows[name]["loss"])))
        lines.append(f"at {bits} bits per weight {own['loss'] - dense:.3f} ({beside})")
    return paragraph(
        f"Loss added to {results('size_curve')['model']}, nats per token, by the tuned dial on "
        f"its MLP linears: {', '.join(lines)}."
    )


TABLES = (size_curve_mlp, size_curve_all, size_curve_short)
