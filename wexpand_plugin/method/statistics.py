"""What calibration needs of an input group: a sample of rows, and one Hessian per expert.

Inputs arrive batch by batch and are never all stored. Rows are buffered until there are enough of
them for efficient products, sorted by expert, and added to that expert's sum of x x^T.

Where row versions will be granted by gain, a sixteenth of each batch is held out from the
experts' Hessians, and a sample of it kept: a version is granted only if it also helps on rows it
was not solved for. Base versions see all rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import WexpandError
from .clusters import Router

__all__ = ["GroupStatistics", "RowSample"]

BUFFER_ROWS = 4096
HELD_OUT = 16
HELD_OUT_ROWS_PER_EXPERT = 256
SAMPLE_ROWS = 1024


class RowSample:
    """A uniform sample of `size` rows out of a stream of unknown length (all of it if shorter).

    Each row draws a random key and the rows with the largest keys stay. Twice `size` rows are kept
    between prunings, so that most batches cost one comparison.
    """

    def __init__(self, size: int, seed: int):
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: list[Tensor] = []
        self._keys = torch.empty(0, dtype=torch.float64)
        self._lowest_key = -1.0

    def add(self, rows: Tensor) -> None:
        """Take in more of the stream: `rows` [n, in]."""
        keys = torch.rand(len(rows), generator=self._generator, dtype=torch.float64)
        better = keys > self._lowest_key
        self._rows.append(rows[better.to(rows.device)])
        self._keys = torch.cat([self._keys, keys[better]])
        if len(self._keys) > 2 * self.size:
            self._prune()

    def _prune(self) -> None:
        if len(self._keys) > self.size:
            kept = self._keys.topk(self.size).indices.sort().values
            rows = torch.cat(self._rows)
            self._rows, self._keys = [rows[kept.to(rows.device)]], self._keys[kept]
            self._lowest_key = float(self._keys.min())

    @property
    def rows(self) -> Tensor:
        """The sample [at most size, in], in the order it was seen."""
        self._prune()
        self._rows = [torch.cat(self._rows)] if self._rows else [torch.empty(0)]
        return self._rows[0]


class GroupStatistics:
    """Sums over the calibration inputs of one input group.

    :param in_features: width of the inputs
    :param router: None for one expert
    :param hold_out: keep a sixteenth of the rows for `held_out`
    :param seed: of the held-out sample
    """

    def __init__(
        self,
        in_features: int,
        router: Router | None,
        *,
        hold_out: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.experts = 1 if router is None else len(router.bias)
        self.router = router
        self.hold_out = hold_out
        self.sums = torch.zeros(self.experts, in_features, in_features, device=device)
        """sum of x x^T per expert [experts, in, in] float32"""
        self.held_out_sum = self.sums.new_zeros(in_features, in_features) if hold_out else None
        """the same over all held-out rows [in, in]"""
        self.means = torch.zeros(self.experts, in_features, device=device)
        self.tokens = torch.zeros(self.experts, dtype=torch.int64)
        """rows per expert, held-out ones included"""
        self.solved_tokens = torch.zeros(self.experts, dtype=torch.int64)
        """rows per expert in `sums`"""
        self.held_out = RowSample(HELD_OUT_ROWS_PER_EXPERT * self.experts, seed)
        self.sample = RowSample(SAMPLE_ROWS, seed)
        """a few rows of all tokens, to report errors on"""
        self._buffer: list[Tensor] = []
        self._buffered = 0
        self._batches = 0

    def add(self, rows: Tensor) -> None:
        """Take in one batch of inputs [tokens, in]."""
        rows = rows.detach().to(self.sums.device, torch.float32)
        self.sample.add(rows)
        if self.hold_out:
            rows = self._split(rows)
        self._buffer.append(rows)
        self._buffered += len(rows)
        # rows are gathered so that each expert gets enough of them for an efficient product
        if self._buffered >= BUFFER_ROWS or self.experts == 1:
            self.flush()

    def _split(self, rows: Tensor) -> Tensor:
        """Hold out a run of rows that starts at another place in each batch."""
        size = len(rows) // HELD_OUT
        # steps of the golden ratio spread the starts evenly whatever the number of batches
        start = int((self._batches * 0.6180339887) % 1 * (len(rows) - size))
        self._batches += 1
        held = rows[start : start + size]
        if size and self.held_out_sum is not None:
            self.held_out.add(held)
            self.held_out_sum.addmm_(held.t(), held)
            self.tokens += torch.bincount(self._route(held), minlength=self.experts).cpu()
        return torch.cat([rows[:start], rows[start + size :]])

    def _route(self, rows: Tensor) -> Tensor:
        assert self.router is not None
        return self.router.route(rows)

    def flush(self) -> None:
        """Add the buffered rows to the sums; call once more at the end."""
        if not self._buffer:
            return
        if self.experts == 1:
            parts: Sequence[Tensor] = self._buffer
            counts = torch.tensor([self._buffered])
        else:
            rows = torch.cat(self._buffer)
            experts = self._route(rows)
            counts = torch.bincount(experts, minlength=self.experts).cpu()
            parts = rows[experts.argsort(stable=True)].split(counts.tolist())
        self._buffer, self._buffered = [], 0
        for expert, part in enumerate(parts):
            if len(part):
                self.sums[expert].addmm_(part.t(), part)
                self.means[expert] += part.sum(dim=0)
        self.tokens += counts
        self.solved_tokens += counts
        # a sum of rows is finite only if all of them are
        if not bool(torch.isfinite(self.means).all()):
            raise WexpandError("the calibration inputs hold NaN or infinite values")

    def total(self) -> Tensor:
        """Mean of x x^T over all rows [in, in]."""
        total = self.sums.sum(dim=0)
        if self.held_out_sum is not None:
            total += self.held_out_sum
        return total / max(1, int(self.tokens.sum()))

    def mean_inputs(self) -> Tensor:
        """Mean input of each expert [experts, in]."""
        return self.means / self.solved_tokens.clamp(min=1).unsqueeze(1).to(self.means)
