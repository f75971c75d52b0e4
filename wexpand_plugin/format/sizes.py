"""What linears weigh on disk, known before there is anything to store.

A row version costs its kept values, a bit for every column, and its scales: 2(1-s) + 1/8 bytes per
weight in bfloat16 at sparsity s (1.125 at 50%, 0.525 at 80%, against 2 dense), (1-s)/2 + 1/8 + 1/64
in int4 with groups of 128 (0.39 at 50%), and 1/2 + 1/64 in int4 without a mask (3/8 + 1/64 in
int3, 1/4 + 1/64 in int2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .router import router_bytes, rows_read
from .values import ValueCodec

__all__ = ["StoredBytes", "row_bytes", "worth_masking"]


def row_bytes(codec: ValueCodec, kept: Tensor, in_features: int, *, masked: bool = True) -> Tensor:
    """Bytes of row versions that keep `kept` [n] of `in_features` weights: int64 [n].

    :param masked: whether there is a mask, which there is unless all rows of the linear are full
    """
    values = codec.elements(kept) * codec.storage.itemsize
    mask = (in_features + 7) // 8 if masked else 0
    return values + mask + 2 * codec.scales(in_features)


def worth_masking(codec: ValueCodec, kept: Tensor, in_features: int) -> bool:
    """Whether a linear whose row versions need to keep `kept` weights has a mask.

    Not if all rows are full, and not if storing the zeros as well, where the codec has a zero,
    takes no more bytes than a mask.
    """
    if bool((kept == in_features).all()):
        return False
    if codec.odd:
        return True
    masked = row_bytes(codec, kept, in_features).sum()
    full = row_bytes(codec, torch.full_like(kept, in_features), in_features, masked=False).sum()
    return bool(masked < full)


@dataclass(frozen=True)
class StoredBytes:
    """The sizes that an allocation decides on: what a linear and its row versions weigh."""

    codec: ValueCodec
    """of the kept weights"""
    dtype: torch.dtype
    """of the dense weights"""

    def row(self, kept: Tensor, in_features: int) -> Tensor:
        """Bytes of row versions [n] that keep so many weights: int64 [n]."""
        masked = worth_masking(self.codec, kept, in_features)
        stored = kept if masked else torch.full_like(kept, in_features)
        return row_bytes(self.codec, stored, in_features, masked=masked)

    def fixed(
        self,
        out_features: int,
        in_features: int,
        experts: int,
        clusters: int = 0,
        parents: int = 0,
        biased: bool = False,
    ) -> int:
        """Bytes of a linear that do not depend on its versions: row map, router, which expert a
        cluster has, and cluster biases.

        :param clusters: 0: as many as experts
        :param biased: whether each cluster has a bias
        """
        clusters = clusters or experts
        row_map = experts * out_features if experts > 1 else 0
        named = clusters if 1 < experts < clusters else 0
        biases = (clusters + 2) * out_features if biased else 0
        return row_map + named + biases + router_bytes(clusters, in_features, parents)

    def read(
        self,
        out_features: int,
        in_features: int,
        experts: int,
        clusters: int,
        parents: int = 0,
        biased: bool = False,
    ) -> int:
        """Bytes of these that a token reads: a row of the row map, of cluster biases one and their
        scales, and of the router what it compares.

        :param clusters: 0: without the router, which the linears of an input group read once
        """
        row_map = out_features if experts > 1 else 0
        biases = 3 * out_features if biased else 0
        named = int(1 < experts < clusters)
        rows = rows_read(clusters, parents) if clusters > 1 else 0
        return row_map + biases + named + rows * (2 * in_features + 4)

    def dense(self, out_features: int, in_features: int) -> int:
        """Bytes of the dense weight."""
        return out_features * in_features * self.dtype.itemsize
