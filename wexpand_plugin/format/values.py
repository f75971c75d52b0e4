"""Value codecs: how a kept weight is stored.

A float codec stores it as it is. An integer codec stores q, and the weight is q times a scale that
a row version has for every group of columns (128 by default):

    codec       bits   q             scale
    float32     32
    bfloat16    16
    float16     16
    int8         8     -128 to 127   float16 [versions, ceil(in/group)]
    int4         4       -8 to 7     float16 [versions, ceil(in/group)]

Group g holds the dense columns g * group to (g + 1) * group - 1, kept or not; the last one may be
shorter. Integers are two's complement. Two int4 share a byte, the earlier one in the low half, and
a row version begins at a byte: a half byte that is left over is 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WexpandError
from .bits import ranges, running

__all__ = ["CODECS", "FLOATS", "GROUP", "ValueCodec", "codec", "codec_of"]

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = {"int8": 8, "int4": 4}
CODECS = (*FLOATS, *INTEGERS)
GROUP = 128
"""columns that share a scale, unless said otherwise"""


@dataclass(frozen=True)
class ValueCodec:
    """One way to store the kept weights of a row version; made by `codec` or `codec_of`."""

    name: str
    """one of CODECS"""
    group: int = 0
    """columns that share a scale; 0 where there are no scales"""

    @property
    def bits(self) -> int:
        """Of one kept weight."""
        return INTEGERS.get(self.name) or FLOATS[self.name].itemsize * 8

    @property
    def storage(self) -> torch.dtype:
        """Of the checkpoint's 1-D `weight`: the float itself, int8, or uint8 for packed bits."""
        if self.name in FLOATS:
            return FLOATS[self.name]
        return torch.int8 if self.bits == 8 else torch.uint8

    @property
    def scaled(self) -> bool:
        """Whether there are scales."""
        return self.group > 0

    @property
    def largest(self) -> int:
        """The largest q of an integer codec; the smallest is -largest - 1."""
        return 2 ** (self.bits - 1) - 1

    def elements(self, kept: Tensor) -> Tensor:
        """Elements of `storage` that rows with so many kept weights take: int64, like `kept`."""
        per_element = self.storage.itemsize * 8 // self.bits
        return (kept + per_element - 1) // per_element

    def scales(self, in_features: int) -> int:
        """Scales of one row version."""
        return -(-in_features // self.group) if self.scaled else 0

    def quantise(self, rows: Tensor, scale: Tensor) -> Tensor:
        """q of dense `rows` [n, in], given their scales [n, groups]: int8 [n, in]."""
        wide = self._per_column(scale, rows.shape[1])
        q = torch.where(wide > 0, rows.float() / wide, 0).round()
        return q.clamp(-self.largest - 1, self.largest).to(torch.int8)

    def scale_of(self, rows: Tensor) -> Tensor:
        """Scales that reach the largest weight of each group: float16 [n, groups] of `rows`."""
        count = self.scales(rows.shape[1])
        padded = torch.nn.functional.pad(
            rows.abs().float(), (0, count * self.group - rows.shape[1])
        )
        largest = padded.view(len(rows), count, self.group).amax(dim=2)
        return (largest / self.largest).clamp(max=torch.finfo(torch.float16).max).half()

    def pack(self, q: Tensor, keep: Tensor) -> Tensor:
        """The kept of `q` (int8 or float, [n, in]) in storage form, row after row: 1-D."""
        if self.bits != 4:
            return q[keep].to(self.storage).contiguous()
        counts = keep.sum(dim=1)
        # a row with an odd number of kept weights gets a zero after its last
        first = running(self.elements(counts) * 2)
        halves = torch.zeros(int(first[-1]), dtype=torch.uint8, device=q.device)
        places = ranges(first[:-1], first[:-1] + counts)
        halves[places] = q[keep].to(torch.uint8) & 0xF
        return halves[0::2] | (halves[1::2] << 4)

    def unpack(self, values: Tensor, kept: Tensor) -> Tensor:
        """`pack` undone: what rows with `kept` [n] weights store, one element a weight: 1-D."""
        if self.bits != 4:
            return values
        halves = torch.stack([values & 0xF, values >> 4], dim=1).flatten()
        first = running(self.elements(kept) * 2)[:-1]
        q = halves[ranges(first, first + kept)].to(torch.int8)
        return (q ^ 8) - 8

    def decode(self, q: Tensor, scale: Tensor) -> Tensor:
        """Dense rows [n, in] float32 of dense `q` [n, in] and `scale` [n, groups]."""
        return q.float() * self._per_column(scale, q.shape[1])

    def _per_column(self, scale: Tensor, in_features: int) -> Tensor:
        return scale.float().repeat_interleave(self.group, dim=1)[:, :in_features]

    def __str__(self) -> str:
        return f"{self.name}, groups of {self.group}" if self.scaled else self.name


def codec(name: str, group: int = GROUP) -> ValueCodec:
    """The codec of this name; `group` matters for integers only.

    :raises WexpandError: no such codec, or a group that is not a positive multiple of 8
    """
    if name in FLOATS:
        return ValueCodec(name)
    if name not in INTEGERS:
        raise WexpandError(f"values: {name!r} is not one of {', '.join(CODECS)}")
    if group < 8 or group % 8:
        raise WexpandError(f"value_group: {group} should be a multiple of 8, such as 32 or 128")
    return ValueCodec(name, group)


def codec_of(dtype: torch.dtype) -> ValueCodec:
    """The codec that stores weights of a float dtype as they are."""
    for name, float_ in FLOATS.items():
        if float_ == dtype:
            return ValueCodec(name)
    raise WexpandError(f"dtype {dtype} should be float32, bfloat16 or float16")
