"""The row pool: every sparse row version of a linear, packed once.

A linear expanded into experts needs, for each (expert, neuron) pair, one sparse row of weights.
Many pairs share a row (all those without an own version use the base version), so the rows are
kept in a pool and a map points into it:

    values   [nnz]                          the kept weights, row version after row version,
                                            columns ascending
    mask     uint8 [versions, ceil(in/8)]   bit b of byte j set: column 8j+b is kept
    row_map  int32 [experts, out]           the row version that expert e uses for neuron r

Cost: one value per kept weight and one bit per weight, so 2(1-s) + 1/8 bytes per weight in
bfloat16 at sparsity s (1.125 at 50%, 0.525 at 80%), against 2 dense. Where a row starts inside
`values` is not stored: it is the running sum of the mask's bit counts (`row_starts`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WexpandError

__all__ = [
    "FLOATS",
    "RowPool",
    "bit_counts",
    "concat_pools",
    "finite",
    "kept",
    "pack_bits",
    "pack_experts",
    "pack_rows",
    "row_starts",
    "unpack_bits",
    "unpack_rows",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""the dtypes that values may have"""


@dataclass(frozen=True)
class RowPool:
    """The packed rows of one linear; `in_features` is the width that the mask's bytes round up."""

    values: Tensor
    mask: Tensor
    row_map: Tensor
    in_features: int

    @property
    def versions(self) -> int:
        """Row versions stored, for all neurons together."""
        return self.mask.shape[0]

    @property
    def experts(self) -> int:
        """Rows of the row map; 1 is plain sparse."""
        return self.row_map.shape[0]

    @property
    def out_features(self) -> int:
        """Neurons."""
        return self.row_map.shape[1]

    @property
    def nnz(self) -> int:
        """Weights kept, over all row versions; a kept one may be zero."""
        return self.values.numel()

    def stored_bytes(self) -> dict[str, int]:
        """Bytes on disk by kind: `values`, `mask`, `row_map`."""
        return {
            "values": self.values.numel() * self.values.element_size(),
            "mask": self.mask.numel(),
            "row_map": self.row_map.numel() * self.row_map.element_size(),
        }

    def bytes_per_token(self, tokens_per_expert: Tensor | None = None) -> float:
        """Bytes of values, mask and row map that one token reads: its own expert's rows only.

        `tokens_per_expert` [experts] weights the mean over experts; without it every expert counts
        the same.
        """
        row_bytes = bit_counts(self.mask) * self.values.element_size() + self.mask.shape[1]
        map_bytes = self.row_map.shape[1] * self.row_map.element_size() if self.experts > 1 else 0
        per_expert = row_bytes[self.row_map.long()].sum(dim=1).double() + map_bytes
        if tokens_per_expert is None or not tokens_per_expert.sum():
            return per_expert.mean().item()
        share = tokens_per_expert.double() / tokens_per_expert.sum()
        return (per_expert * share.to(per_expert.device)).sum().item()

    def expert(self, index: int) -> Tensor:
        """The dense weight [out, in] of expert `index`, zeros where pruned."""
        return unpack_rows(self, self.row_map[index])

    def to(self, *args, **kwargs) -> "RowPool":
        """The same pool on another device (a dtype, if given, applies to the values)."""
        values = self.values.to(*args, **kwargs)
        return RowPool(
            values, self.mask.to(values.device), self.row_map.to(values.device), self.in_features
        )

    def validate(self, name: str = "row pool") -> "RowPool":
        """Check every rule of the format; return self.

        Raises WexpandError naming `name`.weight, .weight_mask or .row_map, the value found and the
        value expected.
        """

        def refuse(tensor: str, problem: str) -> None:
            raise WexpandError(f"{name}.{tensor}: {problem}")

        if self.values.dim() != 1:
            refuse("weight", f"shape {list(self.values.shape)} should have one dimension, [nnz]")
        if self.values.dtype not in FLOATS:
            refuse("weight", f"dtype {self.values.dtype} should be float32, bfloat16 or float16")
        if self.mask.dtype != torch.uint8:
            refuse("weight_mask", f"dtype {self.mask.dtype} should be uint8")
        width = (self.in_features + 7) // 8
        if self.mask.dim() != 2 or self.mask.shape[1] != width:
            refuse(
                "weight_mask",
                f"shape {list(self.mask.shape)} should be [versions, {width}] "
                f"for {self.in_features} input columns",
            )
        if self.row_map.dtype != torch.int32:
            refuse("row_map", f"dtype {self.row_map.dtype} should be int32")
        if self.row_map.dim() != 2 or self.row_map.numel() == 0:
            refuse("row_map", f"shape {list(self.row_map.shape)} should be [experts, out]")
        low, high = (int(v) for v in self.row_map.aminmax())
        if low < 0 or high >= self.versions:
            refuse(
                "row_map",
                f"holds row version {low if low < 0 else high}, outside 0 to {self.versions - 1}",
            )
        spare = width * 8 - self.in_features
        if spare and bool((self.mask[:, -1] >> (8 - spare)).any()):
            refuse("weight_mask", f"sets a bit past column {self.in_features - 1}, the last one")
        kept = int(bit_counts(self.mask).sum())
        if kept != self.nnz:
            refuse("weight_mask", f"keeps {kept} weights but {name}.weight holds {self.nnz}")
        if not finite(self.values):
            refuse("weight", "holds NaN or infinite values")
        return self


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; as isfinite().all(), in one pass and without copies."""
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


def pack_bits(keep: Tensor) -> Tensor:
    """Booleans [rows, in] -> uint8 [rows, ceil(in/8)], little-endian bits, spare bits zero."""
    rows, columns = keep.shape
    width = (columns + 7) // 8
    padded = torch.zeros(rows, width * 8, dtype=torch.uint8, device=keep.device)
    padded[:, :columns] = keep
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (padded.view(rows, width, 8) * places).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, in_features: int) -> Tensor:
    """uint8 [rows, ceil(in/8)] -> booleans [rows, in]."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> places) & 1
    return bits.view(mask.shape[0], mask.shape[1] * 8)[:, :in_features].bool()


def bit_counts(mask: Tensor) -> Tensor:
    """Set bits of each row: uint8 [rows, bytes] -> int64 [rows]."""
    pairs = mask - ((mask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(dim=1, dtype=torch.int64)


def row_starts(mask: Tensor) -> Tensor:
    """Where each row version begins inside `values`: int64 [versions + 1], first 0, last nnz."""
    starts = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(bit_counts(mask), dim=0, out=starts[1:])
    return starts


def kept(weight: Tensor) -> Tensor:
    """Which weights to store: all but +0.0, so that unpacking restores every bit, -0.0 too."""
    return (weight != 0) | torch.signbit(weight)


def pack_rows(rows: Tensor, row_map: Tensor, keep: Tensor | None = None) -> RowPool:
    """Pack row versions [versions, in] that `row_map` [experts, out] points to.

    `keep` (booleans, like `rows`) says which weights are stored; by default all non-zero ones. A
    weight that is not kept must be zero in `rows`, it reads back as zero.
    """
    if keep is None:
        keep = kept(rows)
    return RowPool(
        rows[keep].contiguous(),
        pack_bits(keep),
        row_map.to(torch.int32).contiguous(),
        rows.shape[1],
    )


def pack_experts(weight: Tensor) -> RowPool:
    """Pack full experts [experts, out, in]; equal rows of one neuron are stored once."""
    experts, out_features, _ = weight.shape
    numbers = torch.arange(experts, device=weight.device).unsqueeze(1)
    same = numbers.expand(experts, out_features).clone()
    for expert in range(1, experts):
        for earlier in range(expert):
            same[expert] = torch.where(
                (same[expert] == expert) & (weight[expert] == weight[earlier]).all(dim=1),
                earlier,
                same[expert],
            )
    own = same == numbers
    index = torch.cumsum(own.flatten(), dim=0).view(experts, out_features) - 1
    return pack_rows(weight[own], index.gather(0, same))


def unpack_rows(pool: RowPool, versions: Tensor | None = None) -> Tensor:
    """Dense rows [len(versions), in] of these row versions (any order, repeats too), or of all."""
    if versions is None:
        keep, values = unpack_bits(pool.mask, pool.in_features), pool.values
    else:
        versions = versions.long()
        mask, starts = pool.mask[versions], row_starts(pool.mask)
        keep = unpack_bits(mask, pool.in_features)
        counts = bit_counts(mask)
        first = torch.repeat_interleave(
            starts[versions] - (torch.cumsum(counts, 0) - counts), counts
        )
        values = pool.values[first + torch.arange(first.numel(), device=first.device)]
    dense = torch.zeros(keep.shape, dtype=pool.values.dtype, device=pool.values.device)
    dense[keep] = values
    return dense


def concat_pools(pools: list[RowPool]) -> RowPool:
    """One pool for linears that share input and router, their neurons one after another.

    A pool with one expert (plain sparse, or a dense linear packed as full rows) joins by giving
    every expert its rows.
    """
    experts = max(pool.experts for pool in pools)
    if any(
        pool.experts not in (1, experts) or pool.in_features != pools[0].in_features
        for pool in pools
    ):
        raise WexpandError(
            f"row pools with {[pool.experts for pool in pools]} experts and "
            f"{[pool.in_features for pool in pools]} input columns cannot be joined"
        )
    maps, first = [], 0
    for pool in pools:
        maps.append(pool.row_map.expand(experts, -1) + first)
        first += pool.versions
    return RowPool(
        torch.cat([pool.values for pool in pools]),
        torch.cat([pool.mask for pool in pools]),
        torch.cat(maps, dim=1),
        pools[0].in_features,
    )
