"""The packed form: exact for any mask, counted right, and refused where it is broken."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.rowpool import (
    RowPool,
    bit_counts,
    concat_pools,
    finite,
    pack_bits,
    pack_experts,
    pack_rows,
    row_starts,
    unpack_bits,
    unpack_rows,
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(t):
        return t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes()

    return bits(a) == bits(b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_sees_one_value_anywhere(dtype):
    values = torch.full((3, 1001), torch.finfo(dtype).max, dtype=dtype)
    assert finite(values) and finite(-values) and finite(values[:0])
    for place in (0, 1500, values.numel() - 1):
        for bad in ("nan", "inf", "-inf"):
            damaged = values.clone()
            damaged.view(-1)[place] = float(bad)
            assert not finite(damaged)


@st.composite
def masks(draw) -> torch.Tensor:
    """Booleans [rows, in]; some rows empty, some full."""
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 40)))
    keep = torch.from_numpy(draw(arrays.arrays(bool, shape)))
    for row in range(shape[0]):
        match draw(st.sampled_from(["as drawn", "empty", "full"])):
            case "empty":
                keep[row] = False
            case "full":
                keep[row] = True
    return keep


@st.composite
def sparse_rows(draw) -> torch.Tensor:
    """[rows, in] of any finite bit patterns, -0.0 and denormals too, zero where not kept."""
    keep, dtype = draw(masks()), draw(DTYPES)
    width = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}[dtype]
    bits = draw(arrays.arrays(f"int{width}", tuple(keep.shape)))
    values = torch.from_numpy(bits.copy()).view(dtype)
    values = torch.where(torch.isfinite(values), values, torch.ones((), dtype=dtype))
    return torch.where(keep, values, torch.zeros((), dtype=dtype))


@given(masks())
def test_bits_round_trip(keep):
    packed = pack_bits(keep)
    assert packed.dtype == torch.uint8 and packed.shape == (len(keep), (keep.shape[1] + 7) // 8)
    assert torch.equal(unpack_bits(packed, keep.shape[1]), keep)
    assert torch.equal(bit_counts(packed), keep.sum(dim=1))
    # column 8j + b is bit b of byte j
    row, column = 0, keep.shape[1] - 1
    assert bool(packed[row, column // 8] >> (column % 8) & 1) == bool(keep[row, column])


@given(sparse_rows())
def test_rows_round_trip_bit_for_bit(rows):
    versions = len(rows)
    pool = pack_rows(rows, torch.arange(versions).unsqueeze(0)).validate()
    assert same_bits(unpack_rows(pool), rows)
    assert same_bits(pool.expert(0), rows)
    backwards = torch.arange(versions).flip(0).repeat(2)
    assert same_bits(unpack_rows(pool, backwards), rows[backwards])
    starts = row_starts(pool.mask)
    assert starts[0] == 0 and starts[-1] == pool.nnz


@given(sparse_rows(), st.data())
def test_explicit_masks_may_keep_zeros(rows, data):
    """A solver's mask, not the values, says what is stored: zeros inside it survive as well."""
    more = torch.from_numpy(data.draw(arrays.arrays(bool, tuple(rows.shape))))
    keep = more | (rows != 0) | torch.signbit(rows)
    pool = pack_rows(rows, torch.arange(len(rows)).unsqueeze(0), keep).validate()
    assert pool.nnz == keep.sum() and same_bits(unpack_rows(pool), rows)


@given(sparse_rows(), st.integers(1, 4), st.data())
def test_experts_round_trip_and_share_equal_rows(rows, experts, data):
    """Each expert's neuron is one of the drawn rows: pools must not store more than differ."""
    out = data.draw(st.integers(1, 5))
    choice = torch.from_numpy(
        data.draw(arrays.arrays("int64", (experts, out), elements=st.integers(0, len(rows) - 1)))
    )
    weight = rows[choice]
    pool = pack_experts(weight).validate()
    for expert in range(experts):
        # equal by value: rows that differ in the sign of a zero may be shared
        assert torch.equal(pool.expert(expert), weight[expert])
    assert pool.versions <= sum(len(set(choice[:, r].tolist())) for r in range(out))
    assert pool.versions >= out


@given(sparse_rows(), st.integers(1, 3))
@settings(max_examples=30)
def test_concatenation_keeps_every_expert(rows, experts):
    many = pack_experts(torch.stack([rows.roll(e, dims=1) for e in range(experts)]))
    plain = pack_rows(rows, torch.arange(len(rows)).unsqueeze(0))
    joined = concat_pools([many, plain, many]).validate()
    for expert in range(experts):
        parts = [many.expert(expert), plain.expert(0), many.expert(expert)]
        assert same_bits(joined.expert(expert), torch.cat(parts))


def test_pools_that_do_not_fit_together():
    def pool(experts, width):
        return pack_experts(torch.randn(experts, 2, width))

    with pytest.raises(WexpandError, match=r"\[2, 3\] experts"):
        concat_pools([pool(2, 5), pool(3, 5)])
    with pytest.raises(WexpandError, match=r"\[5, 6\] input columns"):
        concat_pools([pool(2, 5), pool(2, 6)])


def test_bytes():
    """20 columns: 3 mask bytes a row. Two experts share neuron 0 and differ in neuron 1."""
    weight = torch.zeros(2, 2, 20, dtype=torch.bfloat16)
    weight[:, 0, :10] = 1
    weight[0, 1, :4], weight[1, 1, :6] = 1, 2
    pool = pack_experts(weight)
    assert pool.versions == 3 and pool.nnz == 20
    assert pool.stored_bytes() == {"values": 40, "mask": 9, "row_map": 16}
    first, second = 2 * 14 + 6 + 8, 2 * 16 + 6 + 8
    assert pool.bytes_per_token() == (first + second) / 2
    assert pool.bytes_per_token(torch.tensor([3, 1])) == (3 * first + second) / 4
    assert pool.bytes_per_token(torch.tensor([0, 0])) == pool.bytes_per_token()
    one = pack_experts(weight[:1])
    assert one.bytes_per_token() == 2 * 14 + 6, "one expert needs no row map"
    assert pool.to(torch.float32).stored_bytes() == {"values": 80, "mask": 9, "row_map": 16}


def pool() -> RowPool:
    weight = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    weight[:, :, ::2] = 0
    return pack_experts(weight)


def changed(tensor: torch.Tensor, place, value) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


REFUSALS = {
    "weight: shape [1, 36] should have one dimension": dict(values=pool().values[None]),
    "weight: dtype torch.float64 should be": dict(values=pool().values.double()),
    "weight: holds NaN": dict(values=changed(pool().values, 3, float("nan"))),
    "weight: holds NaN or infinite": dict(values=changed(pool().values, 3, float("inf"))),
    "weight_mask: keeps 36 weights but NAME.weight holds 35": dict(values=pool().values[1:]),
    "weight_mask: dtype torch.int8 should be uint8": dict(mask=pool().mask.to(torch.int8)),
    "weight_mask: shape [6, 1] should be [versions, 2]": dict(mask=pool().mask[:, :1]),
    "weight_mask: shape [12] should": dict(mask=pool().mask.view(-1)),
    "weight_mask: sets a bit past column 11": dict(mask=pool().mask | 16),
    "row_map: dtype torch.int64 should be int32": dict(row_map=pool().row_map.long()),
    "row_map: shape [6] should be [experts, out]": dict(row_map=pool().row_map.view(-1)),
    "row_map: shape [0, 3] should": dict(row_map=pool().row_map[:0]),
    "row_map: holds row version -1, outside 0 to 5": dict(
        row_map=changed(pool().row_map, (1, 2), -1)
    ),
    "row_map: holds row version 6, outside 0 to 5": dict(
        row_map=changed(pool().row_map, (1, 2), 6)
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_validate_refuses(message):
    broken = replace(pool(), **REFUSALS[message])
    with pytest.raises(WexpandError, match=re.escape(f"NAME.{message}")):
        broken.validate("NAME")


def test_validate_accepts():
    assert pool().validate("NAME").versions == 6
    assert replace(pool(), values=pool().values.half()).validate()
