"""A sample of the rows of many batches, the same one in whatever order the batches come.

A data loader shuffles its batches anew, and each of several ranks (`ranks`) sees its own. What is
drawn at random hangs on neither: every batch has an identity, a number that follows from its
tokens, and what is drawn of a batch is drawn by its identity and the seed alone; or, where the
batches of all ranks are known beforehand (`group`), by its place among them sorted by identity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ranks

__all__ = ["RowSample", "generator_of", "mixed", "order_of"]


def mixed(seed: int, batch: int) -> int:
    """A number of 32 bits for a batch's identity: another seed gives another order of batches."""
    return (batch ^ seed * 0x9E3779B1) & 0xFFFFFFFF


def generator_of(seed: int, batch: int) -> torch.Generator:
    """Random numbers of a batch's own."""
    return torch.Generator().manual_seed(mixed(seed, batch))


def order_of(batches: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """Rank and number of the batches of all ranks, in an order that is the same however these
    share them, and another with another seed.

    :param batches: identities of this rank's
    """
    every = sorted(
        (mixed(seed, batch), rank, number)
        for rank, own in enumerate(ranks.gathered(list(batches)))
        for number, batch in enumerate(own)
    )
    return [(rank, number) for _, rank, number in every]


class RowSample:
    """A uniform sample of `size` rows (all of them if there are fewer).

    Each row draws a random key and the rows with the largest keys stay. Twice `size` rows are kept
    between prunings, so that most batches cost one comparison.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._rows: list[Tensor] = []
        self._keys = torch.empty(0, dtype=torch.float64)
        self._lowest_key = -1.0
        self._ordered = True

    def add(self, rows: Tensor, batch: int) -> None:
        """Take in `rows` [n, in] of the batch with this identity."""
        if not len(rows):
            return
        generator = generator_of(self.seed, batch)
        keys = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        better = keys > self._lowest_key
        self._rows.append(rows[better.to(rows.device)])
        self._keys = torch.cat([self._keys, keys[better]])
        self._ordered = False
        if len(self._keys) > 2 * self.size:
            self._prune()

    def _prune(self) -> None:
        self._keys, kept = self._keys.topk(min(self.size, len(self._keys)))
        rows = torch.cat(self._rows)
        self._rows = [rows[kept.to(rows.device)]]
        if len(kept) == self.size:
            self._lowest_key = float(self._keys[-1])
        self._ordered = True

    def join(self) -> None:
        """From now on a sample of what all ranks have seen."""
        if ranks.count() == 1:
            return
        rows = self.rows
        self._keys, self._rows = ranks.joined(self._keys), [ranks.joined(rows)]
        self._ordered = False

    @property
    def rows(self) -> Tensor:
        """The sample [at most size, in], in an order of its own."""
        if not self._ordered:
            self._prune()
        return self._rows[0] if self._rows else torch.empty(0)
