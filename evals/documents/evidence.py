"""docs/evidence.md: hypotheses with verdicts, and the figure behind each.

The experiments are those of `evals.paper`, which also know what they claim and how they are drawn;
results are in evals/results/evidence/MODEL/EXPERIMENT.json.
"""

import hashlib
import json
from importlib import import_module
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from evals.paper import EXPERIMENTS, RESULTS

from .fill import ROOT
from .results import paragraph, table

__all__ = ["FIGURES", "TABLES", "digest", "draw", "drawn", "measured"]

FIGURES: Path = ROOT / "docs" / "evidence"


def _files(name: str) -> dict[str, Path]:
    """The results of an experiment by model, the pocket model's first."""
    found = {file.parent.name: file for file in RESULTS.glob(f"*/{name}.json")}
    return dict(sorted(found.items(), key=lambda item: (item[0] != "pocket", item[0])))


def _results(name: str) -> dict[str, dict[str, Any]]:
    return {k: json.loads(f.read_text(encoding="utf8")) for k, f in _files(name).items()}


def _models() -> list[str]:
    return list(dict.fromkeys(model for name in EXPERIMENTS for model in _files(name)))


def measured() -> list[str]:
    """The experiments that have results."""
    return [name for name in EXPERIMENTS if _files(name)]


def evidence_setting() -> str:
    """What was run on what."""
    said = []
    for model in _models():
        runs = [found[model] for name in EXPERIMENTS if model in (found := _results(name))]

        def each(key: str, runs: list[dict[str, Any]] = runs) -> str:
            return " or ".join(str(v) for v in sorted({run[key] for run in runs}))

        counts = sorted({len(run["seeds"]) for run in runs})
        seeds = f"{' or '.join(map(str, counts))} seed{'s' * (counts != [1])}"
        every = "all blocks" if runs[0]["every_block"] == 1 else "every third block"
        said.append(
            f"- {model}: MLP linears of {every}, {each('tokens')} tokens of {each('text')} to "
            f"calibrate on, {each('held_out_tokens')} held out, {seeds}."
        )
    return "\n".join(paragraph(line).replace("\n", "\n  ") for line in said)


def evidence_verdicts() -> str:
    """A line for each hypothesis, and what was measured."""
    models, parts = _models(), []
    for letter, name in zip(ascii_lowercase, EXPERIMENTS, strict=False):
        found = _results(name)
        if not found:
            continue
        module = import_module(f"evals.paper.{name}")
        claims = {m: module.claims(list(f["seeds"].values())) for m, f in found.items()}
        lines, measures = [], []
        for number, row in enumerate(zip(*claims.values(), strict=True), 1):
            by_model = dict(zip(claims, row, strict=True))
            one = row[0]
            cells = [
                f"**{by_model[m].verdict}** {by_model[m].found}" if m in by_model else ""
                for m in models
            ]
            lines.append([f"{letter}{number}", one.hypothesis, *cells])
            mark = f"at {'most' if one.at_most else 'least'} {one.mark:g}"
            measures.append(f"{letter}{number}: {one.measure}; {mark}.")
        head = ["", "", *(model.removesuffix("-Instruct") for model in models)]
        command = next(iter(found.values()))["command"]
        parts.append(
            f"### ({letter}) {module.QUESTION}\n\n{table(head, lines)}\n\n"
            f"{paragraph(' '.join([*measures, f'`{command}`']))}\n\n"
            f"![{name.replace('_', ' ')}](evidence/{name}.png)\n\n{paragraph(module.CAPTION)}"
        )
    return "\n\n".join(parts)


def digest(name: str) -> str:
    """Of the results that a figure shows."""
    sums = hashlib.sha256()
    for model, file in _files(name).items():
        sums.update(model.encode() + file.read_bytes())
    return sums.hexdigest()


def drawn(name: str) -> str | None:
    """The digest of the results that the figure was drawn from; None if there is none."""
    from PIL import Image

    file = FIGURES / f"{name}.png"
    if not file.exists():
        return None
    with Image.open(file) as image:
        return image.info.get("Description")


def draw(name: str) -> Path:
    """Write a figure."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"font.size": 8}
    from matplotlib import pyplot

    found = {m: list(f["seeds"].values()) for m, f in _results(name).items()}
    figure = pyplot.figure(figsize=(4.2 * len(found), 3.4), layout="constrained")
    import_module(f"evals.paper.{name}").draw(found, figure)
    file = FIGURES / f"{name}.png"
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=100, metadata={"Software": None, "Description": digest(name)})
    pyplot.close(figure)
    return file


TABLES = (evidence_setting, evidence_verdicts)
