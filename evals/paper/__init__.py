"""The paper's claims, and its reviewers' questions, asked of the models at hand.

One script per experiment, all with the same options, and `python -m evals.paper` for all of them on
one model (`make evidence`: on both). An experiment is a module with

    QUESTION                 what it asks, in a sentence
    measure(study, seed)     everything it measures with one seed, as JSON; `frame.Skipped` where
                             it does not apply to the model
    claims(found)            the hypotheses, from what `measure` returned for each seed (`verdicts`)
    draw(found, figure)      its figure, from the same of every model: {model: [of each seed]}
    CAPTION                  what the figure shows

`study.Study` is the model with its texts, recordings, routers and scores, shared by experiments.
evals.documents writes docs/evidence.md from the JSON files.
"""

from pathlib import Path

__all__ = ["EXPERIMENTS", "RESULTS"]

EXPERIMENTS = (
    "distributions",
    "entangled_neurons",
    "improvement",
    "disentangling",
    "other_text",
    "blimp",
)
"""names of modules here, in the order they are run and shown"""

RESULTS = Path(__file__).resolve().parents[1] / "results" / "evidence"
"""RESULTS/MODEL/EXPERIMENT.json"""
