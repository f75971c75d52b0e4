"""Results as they are read, and numbers as they are printed."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["FOLDER", "machine", "paragraph", "percent", "results", "spread", "table"]

FOLDER = Path(__file__).resolve().parents[1] / "results"


def results(name: str) -> Any:
    """What evals/results/NAME.json holds."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "".join(f" {c} |" if c else " |" for c in line) for line in lines)


def paragraph(text: str) -> str:
    """Text in lines of at most 100 columns."""
    return textwrap.fill(
        " ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False
    )


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.3f} +- {stdev(values):.3f}"


def percent(share: float) -> str:
    """A share, in whole percent."""
    return f"{share:.0%}"


def machine(found: dict[str, Any]) -> str:
    """The machine that a benchmark ran on, in words."""
    what = "AVX-512" if "avx512f" in found["features"] else "AVX2 only"
    return f"{found['cores']} cores of an {found['cpu']} ({what}) without a GPU"
