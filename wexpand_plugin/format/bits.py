"""Bit masks, runs of places, and fields of few bits: the index arithmetic that row pools are made
of.

Fields of b bits follow each other in a stream whose first bit is the lowest of its first byte: of
4 bits two make a byte, of 2 bits four, of 6 bits four make three bytes; of 3 bits eight make three
bytes, of 5 bits five, and some cross from one byte to the next.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "bit_counts", "pack_bits", "pack_fields", "ranges", "running", "unpack_bits", "unpack_fields",
]  # fmt: skip


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
    rows, width = mask.shape
    padded = mask.new_zeros(rows, (width + 7) // 8 * 8)
    padded[:, :width] = mask
    # eight bytes at once: counts of pairs of bits, of nibbles, of bytes, and their sum on top
    words = padded.view(torch.int64)
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56).sum(dim=1)


def running(counts: Tensor) -> Tensor:
    """0, and the running sum: int64 [n] -> int64 [n + 1]."""
    return torch.nn.functional.pad(torch.cumsum(counts, dim=0), (1, 0))


def ranges(starts: Tensor, ends: Tensor) -> Tensor:
    """starts[0] to ends[0] - 1, then starts[1] to ends[1] - 1, and so on: int64 [their sum]."""
    counts = ends - starts
    shift = starts - (torch.cumsum(counts, 0) - counts)
    places = torch.repeat_interleave(shift, counts)
    return places + torch.arange(len(places), device=places.device)


def pack_fields(fields: Tensor, counts: Tensor, bits: int, align: int = 1) -> Tensor:
    """Streams of fields, one after another: uint8 [bytes], spare bits zero.

    :param fields: the low `bits` (8 at most) of each count: uint8 [sum of counts]
    :param counts: fields of each stream: int64 [n]
    :param align: bytes, of which each stream takes a whole number
    """
    unit, size = _unit(bits)
    units = (counts + unit - 1) // unit
    first = running(units)
    padded = torch.zeros(int(first[-1]) * unit, dtype=torch.uint8, device=fields.device)
    padded[ranges(first[:-1] * unit, first[:-1] * unit + counts)] = fields & (2**bits - 1)
    words = sum(padded[n::unit].long() << bits * n for n in range(unit))
    assert isinstance(words, Tensor)
    whole = torch.stack([(words >> 8 * n).to(torch.uint8) for n in range(size)], dim=1).flatten()
    used = (counts * bits + 7) // 8
    to = running((used + align - 1) // align * align)
    packed = torch.zeros(int(to[-1]), dtype=torch.uint8, device=fields.device)
    from_ = first[:-1] * size
    packed[ranges(to[:-1], to[:-1] + used)] = whole[ranges(from_, from_ + used)]
    return packed


def unpack_fields(packed: Tensor, counts: Tensor, bits: int) -> Tensor:
    """`pack_fields` with `align` 1 undone: uint8 [sum of counts]."""
    unit, size = _unit(bits)
    first = running((counts + unit - 1) // unit)
    whole = torch.zeros(int(first[-1]) * size, dtype=torch.uint8, device=packed.device)
    to = first[:-1] * size
    whole[ranges(to, to + (counts * bits + 7) // 8)] = packed
    words = sum(whole[n::size].long() << 8 * n for n in range(size))
    assert isinstance(words, Tensor)
    every = [(words >> bits * n).to(torch.uint8) & (2**bits - 1) for n in range(unit)]
    from_ = first[:-1] * unit
    return torch.stack(every, dim=1).flatten()[ranges(from_, from_ + counts)]


def _unit(bits: int) -> tuple[int, int]:
    """The fewest fields that fill whole bytes, and the bytes."""
    return 8 // math.gcd(8, bits), bits // math.gcd(8, bits)
