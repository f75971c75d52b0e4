"""The calibration batches: which of their tokens count, and what is known about them.

A token counts when the batch's attention_mask and, where there is one, its loss_mask say so;
padding does not. llm-compressor's pipelines read the data loader themselves, shuffled anew at each
pass, and hand on what the model's forward takes. So the loader is watched: what the batches of its
last pass said is what runs.
"""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from llmcompressor.core import active_session
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import WexpandError
from ..method import ranks

__all__ = [
    "MASKS",
    "CalibrationBatches",
    "Known",
    "about_rows",
    "counted_tokens",
    "identity",
    "run",
]

MASKS = ("attention_mask", "loss_mask")
"""where a batch has them, which of its tokens count"""


def counted_tokens(batch: Any) -> Tensor | None:
    """Which tokens of a batch count: booleans like its input_ids; None if it has none.

    :raises WexpandError: a mask that does not fit the token ids
    """
    ids = batch.get("input_ids")
    if ids is None:
        return None
    counts = torch.ones(ids.shape, dtype=torch.bool)
    for key in MASKS:
        mask = batch.get(key)
        if mask is None:
            continue
        if mask.shape != ids.shape:
            raise WexpandError(
                f"calibration: {key} {list(mask.shape)} should have the shape of input_ids, "
                f"{list(ids.shape)}: one value for each token"
            )
        counts &= mask.bool().cpu()
    return counts


def identity(ids: Tensor) -> int:
    """What a batch is known by in whatever order batches come: the crc32 of its token ids that
    count, int64."""
    return zlib.crc32(_bytes(ids))


def _bytes(ids: Tensor) -> bytes:
    return ids.cpu().numpy().astype("<i8").tobytes()


class Known(NamedTuple):
    """What is known of a batch."""

    counts: Tensor | None
    """which of its tokens count (`counted_tokens`)"""
    identity: int
    """as of `identity`; its number where it has no token ids"""

    @classmethod
    def of(cls, batch: Any, number: int = 0) -> "Known":
        """Of a batch as a data loader gives it."""
        counts = counted_tokens(batch)
        return cls(counts, number if counts is None else identity(batch["input_ids"].cpu()[counts]))

    @property
    def tokens(self) -> int:
        """How many count."""
        return 0 if self.counts is None else int(self.counts.sum())


def about_rows(loader: DataLoader | None) -> dict[str, Any]:
    """What tells one data loader's rows from another's, in whatever order it gives them."""
    rows, crc, tokens = 0, 0, 0
    for row in getattr(loader, "dataset", None) or ():
        rows += 1
        named = row if isinstance(row, Mapping) else {"input_ids": row}
        for key in ("input_ids", *MASKS):
            if (values := named.get(key)) is not None:
                ids = torch.as_tensor(values, dtype=torch.int64).flatten()
                crc = zlib.crc32(_bytes(ids), crc)
                tokens += len(ids) if key == "input_ids" else 0
    batch_size = getattr(loader, "batch_size", None)
    return {"rows": rows, "tokens": tokens, "crc32": f"{crc:08x}", "batch_size": batch_size}


def run(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits [..., vocabulary] of a batch; what it says of losses is left out."""
    known = {key: value for key, value in batch.items() if key not in ("loss_mask", "labels")}
    return model(**known, use_cache=False).logits


class CalibrationBatches:
    """What the batches of a data loader's last pass, or of the pass that goes on, are known by."""

    def __init__(self) -> None:
        self._loader: DataLoader | None = None
        self._kind: type[DataLoader] = DataLoader
        self.keep = False
        """whether to keep the batches"""
        self._begin()

    def _begin(self) -> None:
        self.known: list[Known] = []
        """of each batch"""
        self.tokens = 0
        """that count, in all batches"""
        self.batches: list[Mapping[str, Any]] = []
        """the batches themselves, if they are to be kept"""
        self._crc = 0

    def _see(self, batch: Any) -> None:
        known = Known.of(batch, len(self.known))
        if self.keep:
            self.batches.append(batch)
        if known.counts is not None:
            self._crc = zlib.crc32(_bytes(batch["input_ids"].cpu()[known.counts]), self._crc)
        self.tokens += known.tokens
        self.known.append(known)

    def current(self) -> Known:
        """What is known of the batch that runs now."""
        number = active_session().state.current_batch_idx
        return self.known[number] if 0 <= number < len(self.known) else Known(None, max(0, number))

    def about(self) -> dict[str, Any]:
        """What tells one run's data from another's; the crc32 is of the ids that count, int64, and
        with several ranks that of theirs, as text."""
        batches, tokens, crcs = zip(
            *ranks.gathered((len(self.known), self.tokens, f"{self._crc:08x}")), strict=True
        )
        crc = crcs[0] if len(crcs) == 1 else f"{zlib.crc32(''.join(crcs).encode()):08x}"
        return {"batches": sum(batches), "tokens_counted": sum(tokens), "crc32": crc}

    @classmethod
    def watch(cls, loader: DataLoader | None) -> "CalibrationBatches":
        """Of `loader`, until `release`; the same ones for all who watch it."""
        if isinstance(loader, _Watched):
            return loader.calibration_batches
        found = cls()
        if loader is not None:
            found._loader, found._kind = loader, type(loader)
            # the pipeline holds this very object, so it is its class that has to change
            loader.__class__ = type(f"Watched{found._kind.__name__}", (_Watched, found._kind), {})
            loader.calibration_batches = found  # type: ignore[attr-defined]
        return found

    def release(self) -> None:
        """Leave the loader as it was."""
        if self._loader is not None:
            self._loader.__class__, self._loader = self._kind, None


class _Watched(DataLoader):
    calibration_batches: CalibrationBatches

    def __iter__(self):
        self.calibration_batches._begin()
        for batch in super().__iter__():
            self.calibration_batches._see(batch)
            yield batch
