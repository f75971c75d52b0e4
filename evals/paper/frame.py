"""The options that all experiments share, and the files that they fill.

    --model DIR    the pocket model unless said otherwise; smollm2: SmolLM2-135M-Instruct, which is
                   fetched unless runs/real_model has it
    --data FOLDER  texts (see `texts`); what it lacks comes from the hub
    --seeds N      how many times all is measured, with other text, clusters and chance
    --tokens N     calibration tokens
    --json FOLDER  where NAME.json goes; evals/results/evidence/MODEL
    --quick        one seed and less of everything, to see that all runs; not into evals/results
"""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.pocket import MODEL

from . import EXPERIMENTS, RESULTS
from .inputs import label
from .study import Study

__all__ = ["Skipped", "experiment", "experiments", "run"]

QUICK_TOKENS = 4096
QUICK = Path("runs/evidence")


class Skipped(Exception):
    """What an experiment raises where it has nothing to say about a model, and why."""


def run(name: str, study: Study, seed: int, folder: Path) -> None:
    """Measure one experiment with one seed and add it to FOLDER/NAME.json, unless it is there."""
    module = import_module(f"evals.paper.{name}")
    file = folder / f"{name}.json"
    content: dict[str, Any] = {"command": f"python -m evals.paper.{name}", **study.setting}
    old = json.loads(file.read_text(encoding="utf8")) if file.exists() else {}
    seeds = old.pop("seeds", {}) if {k: old.get(k) for k in content} == content else {}
    if str(seed) not in seeds:
        begin = time.process_time()
        try:
            found = module.measure(study, seed)
        except Skipped as reason:
            print(f"{content['model']}, {name}: skipped, {reason}", flush=True)
            return
        seeds[str(seed)] = {"cpu_seconds": round(time.process_time() - begin)} | found
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_short(content | {"seeds": seeds}))
        file.write_text(text.replace('{"', '\n{"').strip() + "\n", encoding="utf8")
    seconds = seeds[str(seed)].get("cpu_seconds")
    print(f"{content['model']}, {name}, seed {seed}: {seconds} s of CPU time", flush=True)


def print_claims(name: str, folder: Path) -> None:
    """Print what the results of an experiment say, if it was not skipped."""
    file = folder / f"{name}.json"
    if not file.exists():
        return
    found = json.loads(file.read_text(encoding="utf8"))["seeds"]
    for claim in import_module(f"evals.paper.{name}").claims(list(found.values())):
        print(f"{claim.verdict:22} {claim.found:16} {claim.hypothesis}: {claim.measure}")


def _short(value: Any) -> Any:
    """Numbers of four digits: what a figure can show."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    return [_short(one) for one in value] if isinstance(value, list) else value


def experiments(
    names: Annotated[list[str] | None, typer.Argument(help=", ".join(EXPERIMENTS))] = None,
    model: Annotated[str, typer.Option(help="A model's directory.")] = str(MODEL),
    data: Annotated[Path | None, typer.Option(help="Folder of texts.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    folder: Annotated[Path | None, typer.Option("--json", help="Folder for results.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only to see that all runs.")] = False,
) -> None:
    """Run all experiments, or some, with each seed on one model, then print what they say."""
    if unknown := set(names or ()) - set(EXPERIMENTS):
        raise SystemExit(f"{min(unknown)!r} is not one of {', '.join(EXPERIMENTS)}")
    names = names or list(EXPERIMENTS)
    if model == "smollm2":
        from evals.real_model import get_model

        model = str(get_model(Path("runs/real_model")))
    folder = folder or (QUICK if quick else RESULTS) / label(model)
    study = Study(model, data, min(tokens, QUICK_TOKENS) if quick else tokens, quick)
    for seed in range(1 if quick else seeds):
        for name in names:
            run(name, study, seed, folder)
    for name in names:
        print_claims(name, folder)


def experiment(file: str) -> None:
    """The command of one experiment, which is the module in `file`."""
    sys.argv.insert(1, Path(file).stem)
    typer.run(experiments)
