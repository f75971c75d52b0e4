"""Row versions as the method hands them over, and what it asks of those who store them.

The method decides which rows a linear keeps; how a row is packed, and what it weighs packed, is
the business of a checkpoint format. Two protocols stand for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["RowVersions", "Rows", "SolvedRows", "StoredBytes"]


@dataclass(frozen=True)
class SolvedRows:
    """Rows as the solver leaves them."""

    weights: Tensor
    """[..., in] in the dtype of the dense weight, +0.0 where pruned"""
    scales: Tensor | None = None
    """of the grid that the weights lie on: float16 [..., groups]; None without a grid"""

    def __getitem__(self, index: Any) -> "SolvedRows":
        """Those at `index`, anything that indexes the dimensions before the last."""
        return self.apply(lambda part: part[index])

    def apply(self, change: Callable[[Tensor], Tensor]) -> "SolvedRows":
        """`change` of both tensors; it leaves the last dimension alone."""
        return SolvedRows(
            change(self.weights), None if self.scales is None else change(self.scales)
        )

    @classmethod
    def join(cls, parts: list["SolvedRows"], dim: int = 0) -> "SolvedRows":
        """Along a dimension, by default the first; `parts` are let go, one by one."""
        if len(parts) == 1:
            return parts[0]
        length = sum(part.weights.shape[dim] for part in parts)

        def longer(tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = length
            return tensor.new_empty(shape)

        found, start = parts[0].apply(longer), 0
        while parts:
            part = parts.pop(0)
            count = part.weights.shape[dim]
            found.weights.narrow(dim, start, count).copy_(part.weights)
            if found.scales is not None and part.scales is not None:
                found.scales.narrow(dim, start, count).copy_(part.scales)
            start += count
        return found


class Rows(Protocol):
    """Rows that may be kept packed. SolvedRows [n, in] are some."""

    def __getitem__(self, index: Tensor, /) -> SolvedRows:
        """The rows [len(index), in] with these numbers, in this order, repeats allowed."""
        ...


class StoredBytes(Protocol):
    """What things weigh in the format that they will be stored in, in bytes."""

    def row(self, kept: Tensor, in_features: int) -> Tensor:
        """Bytes of row versions of which `kept` weights are stored each, like `kept`."""
        ...

    def fixed(
        self,
        out_features: int,
        in_features: int,
        experts: int,
        clusters: int = 0,
        parents: int = 0,
        biased: bool = False,
    ) -> int:
        """Bytes of an expanded linear that no row version adds to: row map, router, which expert
        each cluster uses, and cluster biases, if it is `biased`. No `clusters`: those of experts.
        """
        ...

    def read(
        self,
        out_features: int,
        in_features: int,
        experts: int,
        clusters: int,
        parents: int = 0,
        biased: bool = False,
    ) -> int:
        """Bytes of these that a token reads. No `clusters`: without the router, which the linears
        of an input group read once.
        """
        ...

    def dense(self, out_features: int, in_features: int) -> int:
        """Bytes of the dense weight."""
        ...


class RowVersions(NamedTuple):
    """The row versions of a linear, and which of them each expert uses."""

    rows: SolvedRows
    """[versions, in]; versions of a neuron lie together, neuron after neuron"""
    row_map: Tensor
    """uint8 [experts, out]: the number, within its neuron, of the version that an expert uses"""
    error: float
    """norm of the change of the linear's outputs over the norm of the dense outputs (no bias)"""
    cluster_bias: Tensor | None = None
    """float32 [clusters, out], added to the outputs of a cluster's tokens; None: nothing is"""

    @classmethod
    def full(
        cls, experts: SolvedRows, error: float, cluster_bias: Tensor | None = None
    ) -> "RowVersions":
        """Every expert with its own version of every neuron: `experts` [experts, out, in]."""
        count, out_features, _ = experts.weights.shape
        own = torch.arange(count, dtype=torch.uint8, device=experts.weights.device)
        rows = experts.apply(lambda part: part.transpose(0, 1).flatten(0, 1))
        row_map = own.unsqueeze(1).expand(count, out_features)
        return cls(rows, row_map, error, cluster_bias)

    def experts(self) -> SolvedRows:
        """The rows of each expert [experts, out, in]."""
        count = self.row_map.amax(dim=0).long() + 1
        first = count.cumsum(dim=0) - count
        return self.rows[(first + self.row_map).to(self.rows.weights.device)]

    def dense(self) -> Tensor:
        """The weight of each expert [experts, out, in]."""
        return self.experts().weights
