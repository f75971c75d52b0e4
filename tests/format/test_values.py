"""Value codecs against a few lines of plain Python."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import CODECS, masks, rows_of, same_bits

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.values import GROUP, codec, codec_of

INTEGERS = [how for how in CODECS if how.scaled]


def rows_in_bytes(rows: list[list[int]], bits: int) -> bytes:
    """Integers of rows as docs/checkpoint-format.md says, one after another."""
    stored = b""
    for row in rows:
        numbers = [(q if bits > 3 else (q - 1) // 2) % 2**bits for q in row]
        stream = sum(number << bits * place for place, number in enumerate(numbers))
        stored += stream.to_bytes(-(-bits * len(row) // 8), "little")
    return stored


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int5", "int6", "int8"])
@given(masks(), st.data())
@settings(deadline=None)
def test_integers_in_bytes(name, keep, data):
    """Two's complement, the first in low bits, every row from a byte on, also an empty one."""
    how = codec(name)
    rows, scale = data.draw(rows_of(how, keep))
    q = torch.where(keep, how.quantise(rows, scale), 0)
    packed = how.pack(q, keep)
    right = rows_in_bytes([row[k].tolist() for row, k in zip(q, keep, strict=True)], how.bits)
    assert packed.dtype == how.storage and packed.dim() == 1
    assert packed.view(torch.uint8).numpy().tobytes() == right
    assert how.elements(keep.sum(dim=1)).sum() == len(right)
    assert torch.equal(how.unpack(packed, keep.sum(dim=1)), q[keep])


def test_nibbles_by_hand():
    q = torch.tensor([[1, -2, 7, 0], [-8, 0, 0, 0], [3, 4, 0, 0]], dtype=torch.int8)
    keep = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    packed = codec("int4").pack(q, keep)
    assert packed.tolist() == [0xE1, 0x07, 0x08, 0x43]
    assert codec("int4").unpack(packed, keep.sum(dim=1)).tolist() == [1, -2, 7, -8, 3, 4]
    assert codec("int4").pack(q, torch.zeros_like(keep)).numel() == 0


def test_threes_by_hand():
    """Odd integers: 1, -1, 3, -3, 7 and -7 are 0, -1, 1, -2, 3 and -4 in three bits each."""
    q = torch.tensor([[1, -1, 3, -3, 7, -7], [7, 0, 0, 0, 0, 0]], dtype=torch.int8)
    packed = codec("int3").pack(q, q != 0)
    stream = 0b100_011_110_001_111_000
    assert packed.tolist() == [stream & 255, stream >> 8 & 255, stream >> 16, 0b011]
    assert codec("int3").unpack(packed, torch.tensor([6, 1])).tolist() == [1, -1, 3, -3, 7, -7, 7]


@pytest.mark.parametrize(("name", "high"), [("int3", 7), ("int2", 3)])
def test_odd_integers(name, high):
    """Nearest of those on either side of zero, which they leave out."""
    how, scale = codec(name, 8), torch.ones(1, 1).half()
    rows = torch.tensor([[-high - 5.0, -high + 0.9, -1.9, -0.1, 0.1, 1.9, 2.1, high + 9.0]])
    assert how.quantise(rows, scale).tolist() == [[-high, -high, -1, -1, 1, 1, 3, high]]
    assert (how.lowest, how.largest) == (-high, high)


@pytest.mark.parametrize(("name", "low", "high"), [("int4", -8, 7), ("int8", -128, 127)])
def test_ranges(name, low, high):
    """Symmetric scales, rounding to the nearest, clamping what is beyond."""
    how, scale = codec(name, 8), torch.ones(1, 1).half()
    rows = torch.tensor([[low - 5.0, low, low + 0.4, -0.6, 0.4, high - 0.4, high, high + 9.0]])
    assert how.quantise(rows, scale).tolist() == [[low, low, low, -1, 0, high, high, high]]
    assert how.quantise(rows, scale).dtype == torch.int8 and how.largest == high


@pytest.mark.parametrize("how", INTEGERS, ids=str)
def test_scale_of(how):
    """Each group's largest weight over the largest number, in float16; the last is shorter."""
    rows = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    rows[1], rows[2, : how.group] = 0, 0
    scale = how.scale_of(rows)
    assert scale.dtype == torch.float16
    for row, scales in zip(rows.tolist(), scale, strict=True):
        groups = [row[start : start + how.group] for start in range(0, 20, how.group)]
        right = [max(abs(weight) for weight in group) / how.largest for group in groups]
        assert same_bits(scales, torch.tensor(right).half())
    decoded = how.decode(how.quantise(rows, scale), scale)
    assert decoded.dtype == torch.float32 and not decoded[1].any(), "a group of zeros has scale 0"
    largest = rows.abs().amax(dim=1)
    torch.testing.assert_close(decoded.abs().amax(dim=1), largest, rtol=1e-3, atol=0)


def test_scales_stay_finite():
    scale = codec("int4").scale_of(torch.full((1, 9), 1e30))
    assert bool(scale.isfinite().all()) and scale.dtype == torch.float16


def test_group_of_a_column():
    """Columns share a scale by their number, kept or not."""
    how = codec("int8", 8)
    scale = torch.tensor([[1.0, 2.0, 4.0]]).half()
    assert how.scales(17) == how.scales(24) == 3 and how.scales(16) == 2
    assert how.decode(torch.ones(1, 17, dtype=torch.int8), scale).tolist() == [
        [1.0] * 8 + [2.0] * 8 + [4.0]
    ]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_floats(name):
    how, dtype = codec(name), getattr(torch, name)
    assert how == codec_of(dtype) and how.storage == dtype and how.bits == dtype.itemsize * 8
    assert not how.scaled and how.scales(100) == 0 and str(how) == name
    rows = torch.tensor([[1.5, 0.0, -0.0], [2.0, 3.0, 4.0]], dtype=dtype)
    keep = torch.tensor([[True, False, True], [True, True, True]])
    assert same_bits(how.pack(rows, keep), rows[keep])
    assert torch.equal(how.elements(torch.tensor([0, 3])), torch.tensor([0, 3]))


def test_codecs_by_name():
    assert codec("int4").group == GROUP == 128 and codec("int8", 32).group == 32
    assert codec("float32", 32).group == 0, "floats have no groups"
    assert str(codec("int4", 64)) == "int4, groups of 64"
    assert (codec("int4").bits, codec("int4").storage) == (4, torch.uint8)
    assert (codec("int8").bits, codec("int8").storage) == (8, torch.int8)
    assert codec("int4").elements(torch.tensor([0, 1, 2, 3])).tolist() == [0, 1, 1, 2]
    assert codec("int3").elements(torch.tensor([0, 1, 3, 8, 9])).tolist() == [0, 1, 2, 3, 4]
    assert codec("int2").elements(torch.tensor([0, 1, 4, 5])).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("group", [0, -8, 4, 100])
def test_groups_are_whole_mask_bytes(group):
    with pytest.raises(WexpandError, match=f"value_group: {group} should be a multiple of 8"):
        codec("int8", group)


def test_unknown_codecs():
    with pytest.raises(WexpandError, match=re.escape("values: 'int7' is not one of float32, ")):
        codec("int7")
    with pytest.raises(WexpandError, match="dtype torch.int8 should be float32, bfloat16 or float"):
        codec_of(torch.int8)
