"""Grids: the values that a kept weight may take when it is stored in few bits.

A weight of a row version is q times a scale that it shares with the other columns of its group, q
an integer of `bits` bits. The solver rounds column by column, and what a weight loses is made up
for by the columns that come later (GPTQ, arXiv 2210.17323). As it takes columns in an order of its
own, a group's scale is chosen before, from the dense weights, zeros where they are likely to be
pruned: of a few scales, which clip the largest weight more or less, the one whose rounding error
costs least, each column's error counting with the weight that the solver gives it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GRIDS", "Grid"]

GRIDS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "int3": 3, "int2": 2}
"""name in a recipe -> bits"""

CLIPS = 12
"""scales that are tried: from the largest weight's own down to half of it"""


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits, with a float16 scale for every `group` columns of a row."""

    bits: int
    group: int

    @property
    def odd(self) -> bool:
        """Whether integers are odd. Of so few, one on either side is worth more than a zero."""
        return self.bits < 4

    @property
    def largest(self) -> int:
        """The largest integer."""
        return 2**self.bits - 1 if self.odd else 2 ** (self.bits - 1) - 1

    @property
    def pace(self) -> float:
        """Steps of training over those of four bits and more, as numbers lie further apart."""
        return 2.0 ** max(0, 4 - self.bits)

    def nearest(self, numbers: Tensor) -> Tensor:
        """The integers nearest to `numbers`."""
        if self.odd:
            return (numbers / 2).floor_().mul_(2).add_(1).clamp_(-self.largest, self.largest)
        return numbers.round().clamp_(-self.largest - 1, self.largest)

    def scales(self, columns: Tensor, importance: Tensor) -> Tensor:
        """The best scale of each row for one group of columns.

        :param columns: weights [experts, columns, rows], zeros where pruned
        :param importance: weight of a squared error in each column [experts, columns, 1]
        :return: [experts, rows] in `columns`' dtype, of values that float16 holds; 0 for a row of
            zeros
        """
        top = columns.abs().amax(dim=1, keepdim=True) / self.largest
        best = lowest = None
        pruned = columns == 0
        for clip in torch.linspace(1.0, 0.5, CLIPS).tolist():
            scale = (top * clip).half().to(columns)
            change = self.round(columns, scale).sub_(columns).masked_fill_(pruned, 0)
            error = change.square_().mul_(importance).sum(1, True)
            if best is None or lowest is None:
                best, lowest = scale, error
            else:
                better = error < lowest
                best = torch.where(better, scale, best)
                lowest = torch.where(better, error, lowest)
        assert best is not None
        return best.squeeze(1)

    def round(self, weights: Tensor, scale: Tensor) -> Tensor:
        """The values of the grid nearest to `weights`, given their `scale`, which may be 0."""
        return self.nearest((weights / scale).nan_to_num_(0.0, 0.0, 0.0)).mul_(scale)
