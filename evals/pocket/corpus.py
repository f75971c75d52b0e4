"""Text that every machine has: the standard library of the Python that runs this.

One file in 20, chosen by the sha256 of its path, is held out: the pocket model never saw it, and
every number of the evals comes from it. Another Python has slightly different sources, so its
losses differ slightly from those of the model card; the split does not move.
"""

import hashlib
import random
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

__all__ = ["SPLITS", "dataset", "excerpts", "files", "token_rows"]

SPLITS = ("train", "validation")
LEFT_OUT = ("site-packages/", "lib2to3/tests/", "ensurepip/_bundled", "idlelib/Icons", "config-")


def files(split: str) -> list[tuple[str, str]]:
    """(path, text) of every file of `split`, in the order of the paths.

    Files below 400 bytes or above 300 kB, and those that are not UTF-8, belong to no split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(LEFT_OUT) or not 400 <= path.stat().st_size <= 300_000:
            continue
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        if held_out != (split == "validation"):
            continue
        try:
            chosen.append((name, path.read_text(encoding="utf8")))
        except UnicodeDecodeError:
            pass
    return chosen


def dataset(split: str) -> Dataset:
    """The files of `split` as a dataset with the columns "path" and "text"."""
    paths, texts = zip(*files(split), strict=True)
    return Dataset.from_dict({"path": list(paths), "text": list(texts)})


def excerpts(split: str, count: int, characters: int, seed: int = 0) -> list[str]:
    """`count` passages of about `characters` characters, from random files, starting at a line.

    A file is drawn in proportion to its length; nothing but `seed` and the sources decides.
    """
    texts = [text for _, text in files(split) if len(text) > 2 * characters]
    draw = random.Random(seed)
    passages = []
    for text in draw.choices(texts, weights=[len(text) for text in texts], k=count):
        start = text.rfind("\n", 0, draw.randrange(len(text) - characters)) + 1
        passages.append(text[start : start + characters])
    return passages


def token_rows(texts: Iterable[str], tokenizer: Any, length: int) -> torch.Tensor:
    """Token ids of all texts in one stream, cut into rows: int64 [rows, length].

    Each text follows the tokenizer's begin-of-sequence token, if it has one. No row is padded;
    what is left at the end is dropped.
    """
    if length < 2:
        raise ValueError(f"length: {length} tokens leave nothing to predict; use 2 or more")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded: Sequence[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    ids = torch.tensor([token for text in encoded for token in begin + text], dtype=torch.int64)
    return ids[: len(ids) // length * length].view(-1, length)
