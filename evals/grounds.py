"""Where ways to spend bytes are compared: a model, text to calibrate on, and text held out.

`PocketGround` is the pocket model on its corpus, as in `evals.recipe`; `RealGround` another model
on WikiText-2, as in `evals.real_model`, with as many tokens to calibrate on as the pocket model
has. Both run a recipe end to end, and both hand out a model and its calibration windows for what
no recipe can say.
"""

import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evals import recipe as pocket
from evals.allocation import held_out_texts, training_texts
from evals.perplexity import held_out_loss, load_model
from evals.pocket import MODEL, corpus
from evals.real_model import CONTEXT, compressed, held_out, text_loss, wikitext

__all__ = ["Ground", "PocketGround", "RealGround"]

Modifiers = dict[str, dict[str, Any]]


class Ground(Protocol):
    """A model, text to calibrate on, and text held out."""

    batch: int
    """windows of a calibration batch"""

    def measure(self, modifiers: Modifiers, seed: int) -> dict[str, float]:
        """Compress by a recipe of these: held-out loss, and bytes stored and read over dense."""
        ...

    def dense(self) -> Any:
        """The model itself."""
        ...

    def windows(self, seed: int) -> Tensor:
        """Calibration tokens [windows, context]."""
        ...

    def loss(self, model: Any) -> float:
        """Held-out loss of what has become of the model."""
        ...


class PocketGround:
    """The pocket model and its corpus."""

    batch = 1

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def measure(self, modifiers: Modifiers, seed: int) -> dict[str, float]:
        asked = {"compress_stage": {"compress_modifiers": modifiers}}
        return pocket.measure(str(MODEL), asked, "pocket", seed)

    def dense(self) -> Any:
        return load_model(MODEL)

    def windows(self, seed: int) -> Tensor:
        texts = training_texts("pocket", seed)
        return corpus.token_rows(texts, self._tokenizer, pocket.CONTEXT)[
            : pocket.TOKENS // pocket.CONTEXT
        ]

    def loss(self, model: Any) -> float:
        return held_out_loss(
            model, self._tokenizer, held_out_texts("pocket"), tokens=pocket.TOKENS,
            context=pocket.CONTEXT, progress=False,
        ).loss  # fmt: skip


class RealGround:
    """Another model and WikiText-2.

    :param data: folder with its files; None: from the hub
    """

    batch = 4

    def __init__(self, model: Path, data: Path | None) -> None:
        from transformers import AutoTokenizer

        self._model = model
        self._valid, self._test = wikitext(data)
        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def measure(self, modifiers: Modifiers, seed: int) -> dict[str, float]:
        """The seed is one of the recipe's keys: the calibration text has none to draw."""
        from wexpand_plugin.tools.inspect import inspect

        with tempfile.TemporaryDirectory() as folder:
            asked = compressed(
                modifiers, self._model, self._valid, Path(folder), tokens=pocket.TOKENS
            )
            with asked as (saved, _seconds):
                sizes = inspect(saved)
                return {
                    "loss": held_out(saved, self._test),
                    "stored": sizes.linear_bytes / sizes.dense_bytes,
                    "read": sizes.bytes_per_token / sizes.dense_bytes,
                }

    def dense(self) -> Any:
        return load_model(self._model)

    def windows(self, seed: int) -> Tensor:
        ids = self._tokenizer(self._valid).input_ids[: pocket.TOKENS]
        return torch.tensor(ids).view(-1, CONTEXT)

    def loss(self, model: Any) -> float:
        return text_loss(model, self._tokenizer, self._test)
