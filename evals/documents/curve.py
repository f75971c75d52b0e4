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
    """The dial, tuned where that was run, beside the best of the others in as many bits."""
    found = results("size_curve")
    rows = found["rows"]
    lines: dict[float, list[str]] = {}
    for part in ("mlp", "all"):
        own = {float(name.split()[2]): (name, row)
               for series in ("ours", "ours, tuned")
               for name, row in of_series(rows, part, series)}  # fmt: skip
        for size, (name, row) in own.items():
            best = best_of_others(rows, part, row["bits_stored"])
            beside = "none was measured"
            if best is not None:
                beside = f"{best[0].partition(': ')[2]}: {best[1]:.3f}"
            loss = f"{row['loss'] - rows['dense']['loss']:.3f}{', tuned' * name.endswith('tuned')}"
            lines.setdefault(size, [f"{size:g}", *[""] * 4])
            place = 1 if part == "mlp" else 3
            if round(row["bits_stored"], 2) != size:
                loss += f" ({row['bits_stored']:.2f} bits)"
            lines[size][place : place + 2] = [loss, beside]
    setting = paragraph(
        f"Loss added to {found['model']} by the dial, nats per token, and by the best other that "
        "was measured in as many bits (up to 1% more): of llm-compressor's GPTQModifier and "
        "AWQModifier (which had an eighth of the calibration text), and of llama.cpp's types "
        f"(`{found['command']}`, evals/results/size_curve.json):"
    )
    head = ["bits per weight", "MLP linears", "best other", "all linears", "best other"]
    return f"{setting}\n\n{table(head, [lines[size] for size in sorted(lines, reverse=True)])}"


TABLES = (size_curve_mlp, size_curve_all, size_curve_pocket, size_curve_short)
