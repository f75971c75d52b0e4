"""The documents of our lm-eval tasks, made from held-out standard library text when a task loads.

lm-eval calls `passages` and `next_line` (see the YAML files beside this one), so nothing has to be
downloaded or prepared. The documents depend on the seed and on the running Python's sources only.
"""

import random
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

# lm-eval loads this file by its path, not as a module of the package
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
corpus = import_module("evals.pocket.corpus")

__all__ = ["next_line", "passages"]


def passages(count: int = 64, characters: int = 1000, seed: int = 0, **_: Any) -> DatasetDict:
    """`count` held-out passages of about `characters` characters, in the column "text"."""
    texts = corpus.excerpts("validation", count, characters, seed)
    return DatasetDict({"validation": Dataset.from_dict({"text": texts})})


def next_line(
    count: int = 400, lines_before: int = 8, choices: int = 4, seed: int = 0, **_: Any
) -> DatasetDict:
    """`count` questions: which of `choices` lines follows `lines_before` lines of a held-out file.

    The wrong lines come from other held-out files and have the indentation of the right one, so
    that the shape of the code alone does not give the answer away.
    Columns: "context", "choices" (list of lines) and "answer" (the right one's place).
    """
    files = [(name, text.split("\n")) for name, text in corpus.files("validation")]
    by_indentation: dict[int, list[tuple[str, str]]] = {}
    for name, lines in files:
        for line in filter(_telling, lines):
            by_indentation.setdefault(_indentation(line), []).append((name, line))

    draw = random.Random(seed)
    documents = []
    long_enough = [(name, lines) for name, lines in files if len(lines) > 4 * lines_before]
    while len(documents) < count:
        name, lines = draw.choice(long_enough)
        at = draw.randrange(lines_before, len(lines))
        right, context = lines[at], lines[at - lines_before : at]
        elsewhere = by_indentation.get(_indentation(right), [])
        wrong = {line for other, line in draw.sample(elsewhere, min(16, len(elsewhere)))
                 if other != name and line != right}  # fmt: skip
        if not _telling(right) or len(wrong) < choices - 1 or max(map(len, context)) > 120:
            continue
        options = [right, *draw.sample(sorted(wrong), choices - 1)]
        draw.shuffle(options)
        documents.append(
            {
                "context": "\n".join(context) + "\n",
                "choices": options,
                "answer": options.index(right),
            }
        )
    return DatasetDict({"validation": Dataset.from_list(documents)})


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _telling(line: str) -> bool:
    return 12 <= len(line.strip()) <= 90
