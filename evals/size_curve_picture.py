"""The picture of `evals.size_curve`, and what the dial is worth beside the best of the others.

    python -m evals.size_curve_picture FILE.png [--json evals/results/size_curve.json]

Loss added, on a logarithmic axis, against bits stored (above) and bits that a token reads (below),
for all linears of the blocks and for those of MLPs alone. Printed: each row of ours beside the
least loss of any other in at most as many bits (a hundredth more is the same), and how well the
dial predicts its own loss before tuning: correlation of ranks, and the factor by which the middle
one of its predictions is off.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from evals.size_curve import RESULTS, TARGETS

__all__ = [
    "SERIES",
    "TITLES",
    "Rows",
    "best_of_others",
    "of_series",
    "prediction",
    "series_of",
]

SERIES = {
    "ours, tuned": ("#0072b2", "o-"),
    "ours": ("#56b4e9", "o--"),
    "GPTQ": ("#d55e00", "s-"),
    "AWQ": ("#cc79a7", "^-"),
    "AutoRound": ("#e69f00", "v-"),
    "SparseGPT": ("#8a929c", "x"),
    "llama.cpp": ("#009e73", "d"),
}
"""name -> colour and line"""
TITLES = {"all": "all linears of the blocks", "mlp": "MLP linears alone"}
FLOOR = 1e-4
"""nats; less is drawn here"""
SAME_SIZE = 0.01

Rows = dict[str, dict[str, Any]]


def series_of(name: str) -> tuple[str, str] | None:
    """(part, series) of a row; None: of no part, or tuned in another way than the others."""
    part, found, what = name.partition(": ")
    if not found or "tuned in" in what:
        return None
    first = what.split()[0]
    return part, "ours, tuned" if first == "ours" and what.endswith("tuned") else first


def of_series(rows: Rows, part: str, series: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and row, fewest bits first."""
    found = [(name, row) for name, row in rows.items() if series_of(name) == (part, series)]
    return sorted(found, key=lambda pair: pair[1]["bits_stored"])


def best_of_others(rows: Rows, part: str, bits: float) -> tuple[str, float] | None:
    """Name and loss added of the best row that is not ours, in at most so many bits."""
    dense = rows["dense"]["loss"]
    others = [
        (row["loss"] - dense, name)
        for series in SERIES
        if not series.startswith("ours")
        for name, row in of_series(rows, part, series)
        if row["bits_stored"] <= bits * (1 + SAME_SIZE)
    ]
    if not others:
        return None
    added, name = min(others)
    return name, added


def prediction(rows: Rows, part: str) -> tuple[float, float] | None:
    """Correlation of ranks between predicted and measured loss added of the dial's rows, and the
    median factor between them, of those that add at least FLOOR; None: fewer than three rows."""
    dense = rows["dense"]["loss"]
    pairs = [(r["predicted"], r["loss"] - dense) for _, r in of_series(rows, part, "ours")]
    if len(pairs) < 3:
        return None
    ranks = [np.argsort(np.argsort(values)) for values in zip(*pairs, strict=True)]
    factors = [abs(math.log(a / b)) for a, b in pairs if a > FLOOR and b > FLOOR]
    middle = math.exp(statistics.median(factors)) if factors else math.nan
    return float(np.corrcoef(*ranks)[0, 1]), middle


def report(rows: Rows) -> list[str]:
    """Lines to print."""
    dense, lines = rows["dense"]["loss"], []
    for part in TARGETS:
        for series in ("ours", "ours, tuned"):
            for name, row in reversed(of_series(rows, part, series)):
                line = f"{name:22} {row['bits_stored']:6.3f} bits  {row['loss'] - dense:+.4f}"
                if best := best_of_others(rows, part, row["bits_stored"]):
                    line += f"  best other {best[1]:+.4f} ({best[0].partition(': ')[2]})"
                lines.append(line + f"  predicted {row['predicted']:.4f}")
        if found := prediction(rows, part):
            lines.append(f"{part}: ranks correlate by {found[0]:.3f}, median factor {found[1]:.2f}")
    return lines


def plot(rows: Rows, model: str, file: Path) -> None:
    """The picture, in the format that the file's name ends in."""
    from matplotlib.figure import Figure

    from wexpand_plugin.tools.report.style import styled

    dense = rows["dense"]["loss"]
    with styled():
        figure = Figure(figsize=(9.6, 7.2), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for row_of_panels, (key, label) in zip(
            panels, {"bits_stored": "stored", "bits_read": "read by a token"}.items(), strict=True
        ):
            for axes, part in zip(row_of_panels, TARGETS, strict=True):
                for series, (colour, line) in SERIES.items():
                    found = [row for _, row in of_series(rows, part, series)]
                    losses = [max(row["loss"] - dense, FLOOR) for row in found]
                    axes.plot(
                        [row[key] for row in found], losses, line, color=colour, markersize=4.5,
                        label=series,
                    )  # fmt: skip
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.set_title(f"{model}, {TITLES[part]}")
                axes.set_xlabel(f"bits per weight, {label}")
        for axes in panels[:, 0]:
            axes.set_ylabel("loss added, nats per token")
        panels[0, -1].legend()
        figure.savefig(file)


def main(
    file: Annotated[Path, typer.Argument(help=".png, .svg or .pdf")],
    json_file: Annotated[Path, typer.Option("--json")] = RESULTS,
) -> None:
    """Draw what is in the JSON file, and print what it says."""
    results = json.loads(json_file.read_text())
    print("\n".join(report(results["rows"])))
    plot(results["rows"], results["model"], file)


if __name__ == "__main__":
    typer.run(main)
