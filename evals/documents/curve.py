"""The dial beside what one would take instead, size by size: tables of evals.size_curve."""

from evals.size_curve_picture import best_of_others, of_series

from .results import paragraph, results, table

__all__ = ["TABLES"]


def size_curve_mlp() -> str:
    """The dial beside other quantisers, MLP linears."""
    return _size_curve("mlp", "MLP linears")


def size_curve_all() -> str:
    """The same of all linears of the blocks."""
    return _size_curve("all", "all linears of the blocks")


def size_curve_pocket() -> str:
    """The same of the pocket model, all linears."""
    return _size_curve("all", "all linears of the blocks", "size_curve_pocket")


def _size_curve(part: str, what: str, file: str = "size_curve") -> str:
    found = results(file)
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
        size, tuned, how = name.partition(" tuned")
        tuned = f",{tuned}{how}" if tuned else ""
        label = f"**{size.replace('ours', 'dial at')} bits{tuned}**" if own else name
        lines.append([label, f"{row['bits_stored']:.2f}", f"{row['loss'] - dense:.3f}", predicted])
    head = ["", "bits per weight", "loss added", "predicted, untuned"]
    setting = (
        f"{found['model']}, {what}, over the dense loss of {dense:.3f} (`{found['command']}`, "
        f"evals/results/{file}.json):"
    )
    return f"{paragraph(setting)}\n\n{table(head, lines)}"


def size_curve_short() -> str:
    """The dial on all linears, also tuned, beside the best of the others in as many bits."""
    found = results("size_curve")
    rows = found["rows"]
    dense = rows["dense"]["loss"]
    lines: dict[float, list[str]] = {}
    for place, series in ((1, "ours"), (2, "ours, tuned")):
        for name, row in of_series(rows, "all", series):
            size, bits = float(name.split()[2]), row["bits_stored"]
            line = lines.setdefault(size, [f"{size:g}", "", "", "none was measured"])
            line[place] = f"{row['loss'] - dense:.3f}"
            if (best := best_of_others(rows, "all", bits)) is not None:
                name, added = best
                other = f"{rows[name]['bits_stored']:.2f}"
                line[3] = f"{name.partition(': ')[2]}, {other} bits: {added:.3f}"
    setting = paragraph(
        f"Loss added to {found['model']}, all linears of its blocks, nats per token: by the dial, "
        "without and with tuning, and by the best other that was measured in as many bits (up to "
        "1% more): of llm-compressor's GPTQModifier, AWQModifier (which had an eighth of the "
        "calibration text) and AutoRoundModifier (which tunes, 50 steps a block), and of "
        "llama.cpp's types "
        f"(`{found['command']}`, evals/results/size_curve.json):"
    )
    head = ["bits per weight", "the dial", "tuned", "best other"]
    return f"{setting}\n\n{table(head, [lines[size] for size in sorted(lines, reverse=True)])}"


TABLES = (size_curve_mlp, size_curve_all, size_curve_pocket, size_curve_short)
