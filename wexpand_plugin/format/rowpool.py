"""The row pool: every sparse row version of a linear, packed once.

A linear expanded into experts needs, for each (expert, neuron) pair, one sparse row of weights.
Many pairs share a row (all those without an own version use the base version), so the rows are
kept in a pool, neuron by neuron, and a map points into it:

    values   [elements]                     the kept weights, row version after row version,
                                            columns ascending, as the codec stores them
    mask     uint8 [versions, ceil(in/8)]   bit b of byte j set: column 8j+b is kept;
                                            none where every row is full
    scale    float16 [versions, groups]     of integer codecs only
    row_map  uint8 [experts, out]           which of neuron r's versions expert e uses; none
                                            with one expert, whose neurons have one version each

Neuron r owns as many versions as its column of the row map needs, its largest entry plus 1, so
where they begin is a running sum and not stored. The same goes for where a row begins inside
`values`: it is the running sum of the mask's bit counts.

`sizes.row_bytes` says what a row version costs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from ..errors import WexpandError
from .bits import bit_counts, pack_bits, ranges, running, unpack_bits
from .sizes import row_bytes, worth_masking
from .values import ValueCodec, codec_of

__all__ = ["MAX_EXPERTS", "RowPool", "finite", "kept"]

MAX_EXPERTS = 256
"""an entry of the row map is one byte"""
_CHUNK = 1 << 24
"""weights that are dense at once where a whole pool is worked through"""


@dataclass(frozen=True)
class RowPool:
    """The packed rows of one linear; `in_features` is the width that the mask's bytes round up."""

    codec: ValueCodec
    in_features: int
    values: Tensor
    mask: Tensor | None = None
    row_map: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def pack(
        cls,
        rows: Tensor,
        row_map: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        codec: ValueCodec | None = None,
        scale: Tensor | None = None,
    ) -> "RowPool":
        """Pack dense row versions [versions, in], those of a neuron one after another.

        :param row_map: uint8 [experts, out], see the module; none for one expert
        :param keep: which weights are stored, booleans like `rows`, by default all but +0.0; what
            is not kept must be zero in `rows`, it reads back as zero
        :param codec: by default the one that stores the dtype of `rows` as it is
        :param scale: of an integer codec [versions, groups]; by default the largest weight's
        """
        codec = codec or codec_of(rows.dtype)
        values, masks, scales, full = [], [], [], True
        some = max(1, _CHUNK // rows.shape[1])  # integers on their way take many bytes a weight
        for first in range(0, max(1, len(rows)), some):
            part = rows[first : first + some]
            own = kept(part) if keep is None else keep[first : first + some]
            if codec.scaled:
                own_scale = None if scale is None else scale[first : first + some]
                scales.append(codec.scale_of(part) if own_scale is None else own_scale)
                part = codec.quantise(part, scales[-1])
            values.append(codec.pack(part, own))
            masks.append(pack_bits(own))
            full = full and bool(own.all())
        return cls(
            codec,
            rows.shape[1],
            torch.cat(values),
            None if full else torch.cat(masks),
            None if row_map is None or len(row_map) == 1 else row_map.to(torch.uint8).contiguous(),
            torch.cat(scales) if scales else None,
        )

    @classmethod
    def pack_experts(
        cls, weight: Tensor, *, codec: ValueCodec | None = None, scale: Tensor | None = None
    ) -> "RowPool":
        """Pack full experts [experts, out, in]; equal rows of one neuron are stored once.

        :param codec, scale: as for `pack`; scales [experts, out, groups]
        """
        experts, out_features, _ = weight.shape
        # the first expert with the same row, then the number of that row among the neuron's own
        same = torch.arange(experts, device=weight.device).unsqueeze(1).repeat(1, out_features)
        sums = weight.sum(dim=2, dtype=torch.float32)  # equal where rows are
        for expert in range(1, experts):
            for earlier in range(expert):
                alike = (sums[expert] == sums[earlier]) & (same[expert] == expert)
                rows = alike.nonzero().squeeze(1)
                if len(rows):
                    equal = (weight[expert, rows] == weight[earlier, rows]).all(dim=1)
                    same[expert, rows[equal]] = earlier
        own = same == torch.arange(experts, device=weight.device).unsqueeze(1)
        number = torch.cumsum(own, dim=0) - 1
        if scale is not None:
            scale = scale.transpose(0, 1)[own.t()]
        rows = weight.transpose(0, 1)[own.t()]
        return cls.pack(rows, number.gather(0, same), codec=codec, scale=scale)

    @property
    def versions(self) -> int:
        """Row versions stored, for all neurons together."""
        if self.mask is not None:
            return self.mask.shape[0]
        if self.scale is not None:
            return self.scale.shape[0]
        return self.values.numel() // self.in_features

    @property
    def experts(self) -> int:
        """Rows of the row map; 1 is plain sparse."""
        return 1 if self.row_map is None else self.row_map.shape[0]

    @property
    def out_features(self) -> int:
        """Neurons."""
        return self.versions if self.row_map is None else self.row_map.shape[1]

    @property
    def nnz(self) -> int:
        """Weights kept, over all row versions; a kept one may be zero."""
        return int(self.kept().sum()) if self.codec.packed else self.values.numel()

    def kept(self) -> Tensor:
        """Weights that each row version keeps: int64 [versions]."""
        if self.mask is None:
            return self.values.new_full((self.versions,), self.in_features, dtype=torch.int64)
        return bit_counts(self.mask)

    def starts(self) -> Tensor:
        """Where each row version begins in `values`, and where the last ends: int64 [versions+1]"""
        return running(self.codec.elements(self.kept()))

    def first_versions(self) -> Tensor:
        """The first version of each neuron, and the number of all: int64 [out + 1]."""
        if self.row_map is None:
            return torch.arange(self.versions + 1, device=self.values.device)
        return running(self.row_map.amax(dim=0).long() + 1)

    def version_map(self) -> Tensor:
        """The row version that each expert uses for each neuron: int32 [experts, out]."""
        first = self.first_versions()[:-1]
        if self.row_map is None:
            return first.to(torch.int32).unsqueeze(0)
        return (first + self.row_map).to(torch.int32)

    def row_bytes(self) -> Tensor:
        """Bytes on disk of each row version: int64 [versions]."""
        masked = self.mask is not None
        return row_bytes(self.codec, self.kept(), self.in_features, masked=masked)

    def stored_bytes(self) -> dict[str, int]:
        """Bytes on disk by kind: `values`, `mask`, `scale`, `row_map`."""
        parts = {"values": self.values, "mask": self.mask, "scale": self.scale}
        return {
            kind: 0 if part is None else part.nbytes
            for kind, part in (parts | {"row_map": self.row_map}).items()
        }

    def bytes_per_token(self, tokens_per_expert: Tensor | None = None) -> float:
        """Bytes of values, mask, scales and row map that one token reads: its expert's rows only.

        `tokens_per_expert` [experts] weights the mean over experts; without it every expert counts
        the same.
        """
        per_expert = self.row_bytes()[self.version_map().long()].sum(dim=1).double()
        if self.row_map is not None:
            per_expert += self.row_map.shape[1]
        if tokens_per_expert is None or not tokens_per_expert.sum():
            return per_expert.mean().item()
        share = tokens_per_expert.double() / tokens_per_expert.sum()
        return (per_expert * share.to(per_expert.device)).sum().item()

    def rows(self, versions: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Dense rows [n, in] of these row versions (any order, repeats too), or of all.

        :param dtype: by default that of a float codec, float32 for an integer codec
        """
        some = self if versions is None else self._gather(versions.long())
        dense, _ = some.stored()
        if some.scale is not None:
            dense = some.codec.decode(dense, some.scale)
        return dense if dtype is None else dense.to(dtype)

    def stored(self, versions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is stored, dense and not yet scaled, and which weights are kept: both [n, in].

        Floats, or q in int8; zeros where pruned.
        """
        if versions is not None:
            return self._gather(versions.long()).stored()
        stored = self.codec.unpack(self.values, self.kept())
        if self.mask is None:
            dense = stored.view(-1, self.in_features)
            return dense, torch.ones_like(dense, dtype=torch.bool)
        keep = unpack_bits(self.mask, self.in_features)
        dense = torch.zeros(keep.shape, dtype=stored.dtype, device=stored.device)
        return dense.masked_scatter_(keep, stored), keep

    def expert(self, index: int) -> Tensor:
        """The dense weight [out, in] of expert `index`, zeros where pruned."""
        return self.rows(self.version_map()[index])

    def _gather(self, versions: Tensor) -> "RowPool":
        """These row versions (int64 [n]) as a pool of their own with one expert."""
        starts = self.starts()
        places = ranges(starts[versions], starts[versions + 1])
        return RowPool(
            self.codec,
            self.in_features,
            self.values[places],
            None if self.mask is None else self.mask[versions],
            None,
            None if self.scale is None else self.scale[versions],
        )

    def take(
        self, neurons: Tensor | None = None, columns: tuple[int, int] | None = None
    ) -> "RowPool":
        """The pool of these neurons (any order) and columns (from, to) only.

        Weights that were kept stay kept, zero or not. Where the first column begins inside a group
        of scales, the groups become as narrow as that needs.
        """
        pool = self
        if neurons is not None:
            first = self.first_versions()
            pool = self._gather(ranges(first[neurons], first[neurons + 1]))
            if self.row_map is not None:
                pool = replace(pool, row_map=self.row_map[:, neurons].contiguous())
        return pool if columns is None else pool._cut(*columns)

    def _cut(self, start: int, stop: int) -> "RowPool":
        """Columns `start` to `stop` - 1."""
        codec, scale = self.codec, None
        if self.scale is not None:
            codec = replace(codec, group=math.gcd(start, codec.group))
            fine = self.scale.repeat_interleave(self.codec.group // codec.group, dim=1)
            first = start // codec.group
            scale = fine[:, first : first + codec.scales(stop - start)].contiguous()
        values, masks = [], []
        for part in self._chunks():
            dense, keep = part.stored()
            values.append(codec.pack(dense[:, start:stop], keep[:, start:stop]))
            masks.append(pack_bits(keep[:, start:stop]))
        mask = None if self.mask is None else torch.cat(masks)
        return RowPool(codec, stop - start, torch.cat(values), mask, self.row_map, scale)

    def _chunks(self) -> Iterator["RowPool"]:
        """The row versions in runs of about _CHUNK weights, so that little is dense at once."""
        step = max(1, _CHUNK // self.in_features)
        starts = self.starts()
        for first in range(0, self.versions, step):
            last = min(first + step, self.versions)
            yield RowPool(
                self.codec,
                self.in_features,
                self.values[int(starts[first]) : int(starts[last])],
                None if self.mask is None else self.mask[first:last],
                None,
                None if self.scale is None else self.scale[first:last],
            )

    @classmethod
    def concat(cls, pools: list["RowPool"]) -> "RowPool":
        """One pool for linears that share input and router, their neurons one after another.

        A pool with one expert joins by giving every expert its rows; pools of different codecs by
        decoding all to the float that holds the floats among them; float32 where there are none.
        """
        experts, first = max(pool.experts for pool in pools), pools[0]
        if any(p.experts not in (1, experts) or p.in_features != first.in_features for p in pools):
            raise WexpandError(
                f"row pools with {[pool.experts for pool in pools]} experts and "
                f"{[pool.in_features for pool in pools]} input columns cannot be joined"
            )
        if any(pool.codec != first.codec for pool in pools):
            floats = [pool.codec.storage for pool in pools if not pool.codec.scaled]
            wide = reduce(torch.promote_types, floats or [torch.float32])
            pools = [pool.decoded(wide) for pool in pools]
        if any(pool.mask is None for pool in pools) != all(pool.mask is None for pool in pools):
            pools = [pool.masked() for pool in pools]
        maps = [
            torch.zeros(experts, p.out_features, dtype=torch.uint8, device=p.values.device)
            if p.row_map is None
            else p.row_map
            for p in pools
        ]
        masks = [pool.mask for pool in pools if pool.mask is not None]
        scales = [pool.scale for pool in pools if pool.scale is not None]
        return cls(
            pools[0].codec,
            first.in_features,
            torch.cat([pool.values for pool in pools]),
            torch.cat(masks) if masks else None,
            torch.cat(maps, dim=1) if experts > 1 else None,
            torch.cat(scales) if scales else None,
        )

    def smallest(self) -> "RowPool":
        """The same rows, without the mask where storing the zeros takes fewer bytes."""
        if self.mask is None or worth_masking(self.codec, self.kept(), self.in_features):
            return self
        values = []
        for part in self._chunks():
            dense, keep = part.stored()
            if not part._holds_zeros(keep):
                return self
            values.append(self.codec.pack(dense, torch.ones_like(keep)))
        return replace(self, values=torch.cat(values), mask=None)

    def _holds_zeros(self, keep: Tensor) -> bool:
        """Whether rows could store a zero wherever they do not `keep` [n, in] a weight."""
        if not self.codec.odd or self.scale is None:
            return True
        return not bool((self.codec.decode(torch.ones_like(keep), self.scale) * ~keep).any())

    def masked(self) -> "RowPool":
        """The same rows with a mask, be it of ones."""
        if self.mask is not None:
            return self
        ones = torch.ones(1, self.in_features, dtype=torch.bool, device=self.values.device)
        return replace(self, mask=pack_bits(ones).repeat(self.versions, 1))

    def recoded(self, how: ValueCodec) -> "RowPool":
        """The same integers in a codec that has them all, and the groups that there are."""
        parts = [how.pack(*part.stored()) for part in self._chunks()]
        return replace(self, codec=replace(how, group=self.codec.group), values=torch.cat(parts))

    def decoded(self, dtype: torch.dtype) -> "RowPool":
        """The same rows in a float codec."""
        if not self.codec.scaled:
            return self.to(dtype=dtype)
        parts = []
        for part in self._chunks():
            keep = slice(None) if part.mask is None else unpack_bits(part.mask, self.in_features)
            parts.append(part.rows(dtype=dtype)[keep].flatten())
        values = torch.cat(parts) if parts else self.values.new_empty(0, dtype=dtype)
        return RowPool(codec_of(dtype), self.in_features, values, self.mask, self.row_map)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "RowPool":
        """The same pool on another device; a dtype applies to the values of a float codec."""
        codec = self.codec
        if dtype is None or codec.scaled:
            dtype = codec.storage
        else:
            codec = codec_of(dtype)

        def move(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device or part.device)

        values = self.values.to(device or self.values.device, dtype)
        return RowPool(
            codec, self.in_features, values, move(self.mask), move(self.row_map), move(self.scale)
        )


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; as isfinite().all(), in one pass and without copies."""
    if values.dtype.itemsize == 1:  # for those of 8 bits torch knows no smallest
        values = values.float()
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


def kept(weight: Tensor) -> Tensor:
    """Which weights to store: all but +0.0, so that unpacking restores every bit, -0.0 too."""
    return (weight != 0) | torch.signbit(weight)
