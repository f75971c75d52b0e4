"""Row versions as the method hands them over, and what it asks of those who store them.

The method decides which rows a linear keeps; how a row is packed, and what it weighs packed, is
the business of a checkpoint format. Two protocols stand for it.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["RowVersions", "Rows", "StoredBytes"]


class Rows(Protocol):
    """Rows that may be kept packed. A Tensor [n, in] is one."""

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """The dense rows [len(index), in] with these numbers, in this order, repeats allowed."""
        ...


class StoredBytes(Protocol):
    """What things weigh in the format that they will be stored in, in bytes."""

    def row(self, kept: Tensor, in_features: int) -> Tensor:
        """Bytes of row versions of which `kept` weights are stored each, like `kept`."""
        ...

    def fixed(self, out_features: int, in_features: int, experts: int) -> int:
        """Bytes of an expanded linear that no row version adds to: row map and router."""
        ...

    def dense(self, out_features: int, in_features: int) -> int:
        """Bytes of the dense weight."""
        ...


class RowVersions(NamedTuple):
    """The row versions of a linear, and which of them each expert uses."""

    rows: Tensor
    """[versions, in]; versions of a neuron lie together, neuron after neuron"""
    row_map: Tensor
    """uint8 [experts, out]: the number, within its neuron, of the version that an expert uses"""
    error: float
    """norm of the change of the linear's outputs over the norm of the dense outputs (no bias)"""

    @classmethod
    def full(cls, experts: Tensor, error: float) -> "RowVersions":
        """Every expert with its own version of every neuron: `experts` [experts, out, in]."""
        count, out_features, _ = experts.shape
        own = torch.arange(count, dtype=torch.uint8, device=experts.device)
        rows = experts.transpose(0, 1).flatten(0, 1)
        return cls(rows, own.unsqueeze(1).expand(count, out_features), error)

    def dense(self) -> Tensor:
        """The weight of each expert [experts, out, in]."""
        count = self.row_map.amax(dim=0).long() + 1
        first = count.cumsum(dim=0) - count
        return self.rows[(first + self.row_map).to(self.rows.device)]
