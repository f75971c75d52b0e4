"""Bit masks and runs of places: the two pieces of index arithmetic that row pools are made of."""

import torch
from torch import Tensor

__all__ = ["bit_counts", "pack_bits", "ranges", "running", "unpack_bits"]


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
