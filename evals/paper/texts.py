"""Texts of several kinds, each with a part to calibrate on and a part that is held out.

    wikitext2    WikiText-2: validation to calibrate on, test held out
    tinystories  TinyStories: the first nine tenths of a thousand stories, and the rest
    shakespeare  tiny shakespeare: likewise, of its characters
    library      Python's standard library, as for the pocket model (`evals.pocket.corpus`)
    manual       the reference manual that comes with Python (`pydoc_data`): prose that is always
                 at hand; likewise

`data` is a folder with wikitext2/wiki.valid.tokens and wiki.test.raw, tinystories/*.json (a list of
texts) and shakespeare/input.txt. What it lacks comes from the hub; only blimp/*.jsonl, which
`blimp` asks, has to be there.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from evals.pocket import corpus

__all__ = ["KINDS", "Split", "pieces", "read", "rows"]

KINDS = ("wikitext2", "tinystories", "shakespeare", "library")
CHARACTERS = 4000
"""of a piece, at most; pieces are drawn at random, so that a text's whole length is seen"""

Split = Literal["train", "held out"]


def read(kind: str, split: Split, data: Path | None) -> list[str]:
    """The texts of one kind.

    :raises ValueError: there is no such kind
    """
    folder = None if data is None else data / kind
    if kind == "library":
        return [text for _, text in corpus.files("train" if split == "train" else "validation")]
    if kind == "wikitext2":
        from evals.real_model import wikitext

        return [wikitext(folder)[split == "held out"]]
    if kind == "manual":
        from pydoc_data.topics import topics

        texts = list(topics.values())
    elif kind == "tinystories":
        texts = _stories(folder)
    elif kind == "shakespeare":
        whole = _shakespeare(folder)
        at = len(whole) * 9 // 10
        return [whole[:at] if split == "train" else whole[at:]]
    else:
        raise ValueError(f"text: {kind!r} is not one of {', '.join((*KINDS, 'manual'))}")
    at = len(texts) * 9 // 10
    return texts[:at] if split == "train" else texts[at:]


def _stories(folder: Path | None) -> list[str]:
    if folder is not None and folder.is_dir():
        return json.loads(next(folder.glob("*.json")).read_text(encoding="utf8"))
    from datasets import load_dataset

    return load_dataset("roneneldan/TinyStories", split="train[:1000]")["text"][:]


def _shakespeare(folder: Path | None) -> str:
    if folder is not None and folder.is_dir():
        return (folder / "input.txt").read_text(encoding="utf8")
    from huggingface_hub import hf_hub_download

    name = "karpathy/tiny_shakespeare", "input.txt"
    return Path(hf_hub_download(*name, repo_type="dataset")).read_text(encoding="utf8")


def pieces(texts: Sequence[str], seed: int, characters: int = CHARACTERS) -> Iterator[str]:
    """All texts in pieces of at most about `characters`, each from a line's start, shuffled."""
    cut = []
    for text in texts:
        start = 0
        while start < len(text):
            end = start + characters
            if end < len(text):
                end = max(text.rfind("\n", start, end) + 1, start + characters // 2)
            cut.append(text[start:end])
            start = end
    random.Random(seed).shuffle(cut)
    return iter(cut)


def rows(texts: Sequence[str], tokenizer: Any, tokens: int, context: int, seed: int) -> Tensor:
    """Token ids of pieces drawn by `seed`: int64 [tokens // context, context].

    :raises ValueError: the texts are shorter than that
    """
    chosen, length = [], 0
    for piece in pieces(texts, seed):
        chosen.append(piece)
        length += len(piece)
        if length > 6 * tokens:  # characters, more than the tokens need
            break
    ids = corpus.token_rows(chosen, tokenizer, context)[: tokens // context]
    if len(ids) < tokens // context:
        raise ValueError(f"tokens: {tokens} are more than the {ids.numel()} that the text has")
    return ids
