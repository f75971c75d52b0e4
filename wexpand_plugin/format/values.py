"""Value codecs: how a kept weight is stored.

A float codec stores it as it is. An integer codec stores q, and the weight is q times a scale that
a row version has for every group of columns (128 by default):

    codec       bits   q                         scale
    float32     32
    bfloat16    16
    float16     16
    int8         8     -128 to 127               float16 [versions, ceil(in/group)]
    int6         6      -32 to 31                likewise
    int5         5      -16 to 15                likewise
    int4         4       -8 to 7                 likewise
    int3         3       -7, -5, -3, ..., 5, 7   likewise
    int2         2       -3, -1, 1, 3            likewise

Group g holds the dense columns g * group to (g + 1) * group - 1, kept or not; the last one may be
shorter.

Of 3 and 2 bits q is odd. Of so few values none may be wasted: counted from zero there would be one
more below it than above, which weights, as many on either side, have no use for, and a zero, which
rows with a mask never store. On the pocket model's linears the squared error of full int2 is 0.75
of what -2 to 1 leave, and 0.92 with int3; with zeros in between 0.76 and 0.99 (evals/LOG.md).

What is stored is q, or (q - 1) / 2 where q is odd, in two's complement, as a stream of bits for
each row version, see `bits`: two int4 share a byte, the earlier one in the low half; eight int3
take three bytes, four int6 as well. A row version begins at a byte; bits that are left over are 0.
On disk no other order would be smaller or simpler; what a processor reads best differs between
processors, so a kernel lays values out anew when it loads them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WexpandError
from .bits import pack_fields, unpack_fields

__all__ = ["CODECS", "FLOATS", "GROUP", "ValueCodec", "codec", "codec_of"]

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "int3": 3, "int2": 2}
CODECS = (*FLOATS, *INTEGERS)
GROUP = 128
"""columns that share a scale, unless said otherwise"""
WIDEST = 1 << 20
"""columns that may; no linear has more"""


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
    def packed(self) -> bool:
        """Whether several weights share an element of `storage`."""
        return self.bits < self.storage.itemsize * 8

    @property
    def odd(self) -> bool:
        """Whether q is odd, so that no weight of a group with a scale is zero."""
        return self.bits < 4

    @property
    def largest(self) -> int:
        """The largest q of an integer codec."""
        return 2**self.bits - 1 if self.odd else 2 ** (self.bits - 1) - 1

    @property
    def lowest(self) -> int:
        """The smallest q of an integer codec."""
        return -self.largest if self.odd else -self.largest - 1

    def elements(self, kept: Tensor) -> Tensor:
        """Elements of `storage` that rows with so many kept weights take: int64, like `kept`."""
        wide = self.storage.itemsize * 8
        return (kept * self.bits + wide - 1) // wide

    def scales(self, in_features: int) -> int:
        """Scales of one row version."""
        return -(-in_features // self.group) if self.scaled else 0

    def quantise(self, rows: Tensor, scale: Tensor) -> Tensor:
        """q of dense `rows` [n, in], given their scales [n, groups]: int8 [n, in]."""
        wide = self._per_column(scale, rows.shape[1])
        q = torch.where(wide > 0, rows.float() / wide, 0)
        q = (q / 2).floor() * 2 + 1 if self.odd else q.round()
        return q.clamp(self.lowest, self.largest).to(torch.int8)

    def scale_of(self, rows: Tensor) -> Tensor:
        """Scales that reach the largest weight of each group: float16 [n, groups] of `rows`."""
        count = self.scales(rows.shape[1])
        group = min(self.group, rows.shape[1])
        padded = torch.nn.functional.pad(rows.abs().float(), (0, count * group - rows.shape[1]))
        largest = padded.view(len(rows), count, group).amax(dim=2)
        return (largest / self.largest).clamp(max=torch.finfo(torch.float16).max).half()

    def pack(self, q: Tensor, keep: Tensor) -> Tensor:
        """The kept of `q` (int8 or float, [n, in]) in storage form, row after row: 1-D."""
        stored = q.reshape(-1)[keep.reshape(-1)]  # one index a weight is faster than two
        if not self.packed:
            return stored.to(self.storage).contiguous()
        return pack_fields(self.fields(stored), keep.sum(dim=1), self.bits)

    def unpack(self, values: Tensor, kept: Tensor) -> Tensor:
        """`pack` undone: what rows with `kept` [n] weights store, one element a weight: 1-D."""
        if not self.packed:
            return values
        half = 2 ** (self.bits - 1)
        stored = (unpack_fields(values, kept, self.bits).to(torch.int8) ^ half) - half
        return stored * 2 + 1 if self.odd else stored

    def fields(self, q: Tensor) -> Tensor:
        """What is stored of each of `q` (int8), in the low bits of uint8."""
        return (q >> 1 if self.odd else q).to(torch.int8).view(torch.uint8)

    def decode(self, q: Tensor, scale: Tensor) -> Tensor:
        """Dense rows [n, in] float32 of dense `q` [n, in] and `scale` [n, groups]."""
        return q.float() * self._per_column(scale, q.shape[1])

    def _per_column(self, scale: Tensor, in_features: int) -> Tensor:
        group = min(self.group, in_features)
        return scale.float().repeat_interleave(group, dim=1)[:, :in_features]

    def __str__(self) -> str:
        return f"{self.name}, groups of {self.group}" if self.scaled else self.name


def codec(name: str, group: int = GROUP) -> ValueCodec:
    """The codec of this name; `group` matters for integers only.

    :raises WexpandError: no such codec, or a group that is not a positive multiple of 8, or is
        wider than any linear
    """
    if name in FLOATS:
        return ValueCodec(name)
    if name not in INTEGERS:
        raise WexpandError(f"values: {name!r} is not one of {', '.join(CODECS)}")
    if group < 8 or group % 8:
        raise WexpandError(f"value_group: {group} should be a multiple of 8, such as 32 or 128")
    if group > WIDEST:
        raise WexpandError(f"value_group: {group} should be at most {WIDEST}")
    return ValueCodec(name, group)


def codec_of(dtype: torch.dtype) -> ValueCodec:
    """The codec that stores weights of a float dtype as they are."""
    for name, float_ in FLOATS.items():
        if float_ == dtype:
            return ValueCodec(name)
    raise WexpandError(f"dtype {dtype} should be float32, bfloat16 or float16")
