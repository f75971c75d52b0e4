"""The packed form: exact for any mask and codec, counted right, and refused where it is broken."""

import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from samples import CODECS, changed, masks, pools, rows_of, same_bits

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format import rowpool
from wexpand_plugin.format.bits import bit_counts, pack_bits, unpack_bits
from wexpand_plugin.format.checks import check_pool
from wexpand_plugin.format.rowpool import RowPool, finite, kept
from wexpand_plugin.format.values import codec

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
few = settings(deadline=None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_sees_one_value_anywhere(dtype):
    values = torch.full((3, 1001), torch.finfo(dtype).max, dtype=dtype)
    assert finite(values) and finite(-values) and finite(values[:0])
    for place in (0, 1500, values.numel() - 1):
        for bad in ("nan", "inf", "-inf"):
            damaged = values.clone()
            damaged.view(-1)[place] = float(bad)
            assert not finite(damaged)


@given(masks())
@few
def test_bits_round_trip(keep):
    packed = pack_bits(keep)
    assert packed.dtype == torch.uint8 and packed.shape == (len(keep), (keep.shape[1] + 7) // 8)
    assert torch.equal(unpack_bits(packed, keep.shape[1]), keep)
    assert torch.equal(bit_counts(packed), keep.sum(dim=1))
    # column 8j + b is bit b of byte j
    row, column = 0, keep.shape[1] - 1
    assert bool(packed[row, column // 8] >> (column % 8) & 1) == bool(keep[row, column])


# --- there and back


@given(pools())
@few
def test_rows_round_trip(sample):
    """Bit for bit for floats; integers lose nothing either where rows are multiples of scales."""
    pool, rows, versions = check_pool(sample.pool), sample.rows, len(sample.rows)
    same = torch.equal if pool.codec.scaled else same_bits
    assert same(pool.rows(), rows) and pool.rows().dtype == rows.dtype
    backwards = torch.arange(versions).flip(0).repeat(2)
    assert same(pool.rows(backwards), rows[backwards])
    assert same(pool.rows(backwards[:1]), rows[-1:])
    assert pool.rows(backwards[:0]).shape == (0, pool.in_features)
    assert pool.rows(dtype=torch.float16).dtype == torch.float16


@given(pools())
@few
def test_versions_lie_together_neuron_by_neuron(sample):
    pool, (experts, out) = sample.pool, sample.row_map.shape
    assert (pool.experts, pool.out_features, pool.versions) == (experts, out, len(sample.rows))
    assert pool.version_map().dtype == torch.int32
    assert pool.version_map().tolist() == [
        [sample.version(expert, neuron) for neuron in range(out)] for expert in range(experts)
    ]
    first = [sample.version(0, r) - int(sample.row_map[0, r]) for r in range(out)]
    assert pool.first_versions().tolist() == [*first, pool.versions]
    for expert in range(experts):
        assert torch.equal(pool.expert(expert), sample.expert(expert))


@given(pools())
@few
def test_what_a_version_holds_and_weighs(sample):
    pool, keep = sample.pool, sample.keep
    assert torch.equal(pool.kept(), keep.sum(dim=1)) and pool.nnz == keep.sum()
    assert (pool.mask is None) == bool(keep.all())
    starts = pool.starts()
    assert starts.dtype == torch.int64 and starts[0] == 0 and starts[-1] == pool.values.numel()
    for version in range(pool.versions):
        part = pool.values[int(starts[version]) : int(starts[version + 1])]
        if not pool.codec.scaled:
            assert same_bits(part, sample.rows[version, keep[version]])
        bits = int(keep[version].sum()) * pool.codec.bits
        assert part.nbytes == (bits + 7) // 8
    stored = pool.stored_bytes()
    assert pool.row_bytes().sum() == stored["values"] + stored["mask"] + stored["scale"]
    assert stored["row_map"] == (0 if pool.row_map is None else sample.row_map.numel())


@given(st.sampled_from(CODECS), masks(), st.data())
@few
def test_integers_come_within_half_a_step(how, keep, data):
    """Whatever the rows are; the scale is by default that of each group's largest weight."""
    values = data.draw(
        arrays.arrays("float32", tuple(keep.shape), elements=st.floats(-9, 9, width=32))
    )
    rows = torch.where(keep, torch.from_numpy(values), 0)
    rows[rows.abs() < 1e-2] = 0  # scales of denormals have few bits
    rows = rows if how.scaled else rows.to(how.storage)
    pool = check_pool(RowPool.pack(rows, keep=keep, codec=how))
    if how.scaled:
        half = pool.scale.float().repeat_interleave(how.group, dim=1)[:, : keep.shape[1]]
        half /= 1 if how.odd else 2  # odd integers lie two scales apart
        assert bool(((pool.rows() - rows).abs() <= half * 1.001).all())
    else:
        assert same_bits(pool.rows(), rows)
    assert torch.equal(pool.kept(), keep.sum(dim=1)), "a weight that rounds to zero stays kept"


@given(st.sampled_from(CODECS[:3]), masks(), st.data())
@few
def test_by_default_all_but_plus_zero_is_kept(how, keep, data):
    rows, _ = data.draw(rows_of(how, keep))
    pool = check_pool(RowPool.pack(rows))
    assert pool.codec == how and pool.row_map is None and same_bits(pool.rows(), rows)
    assert torch.equal(unpacked_mask(pool), kept(rows))
    assert torch.equal(kept(rows), (rows != 0) | torch.signbit(rows))


def unpacked_mask(pool: RowPool) -> torch.Tensor:
    return unpack_bits(pool.masked().mask, pool.in_features)


@given(pools(codec("float32"), experts=1), st.integers(1, 4), st.data())
@few
def test_experts_round_trip_and_share_equal_rows(sample, experts, data):
    """Each expert's neuron is one of the drawn rows: pools must not store more than differ."""
    rows, out = sample.rows, data.draw(st.integers(1, 5))
    choice = torch.from_numpy(
        data.draw(arrays.arrays("int64", (experts, out), elements=st.integers(0, len(rows) - 1)))
    )
    weight = rows[choice]
    pool = check_pool(RowPool.pack_experts(weight))
    assert pool.experts == experts and pool.out_features == out
    for expert in range(experts):
        # equal by value: rows that differ in the sign of a zero may be shared
        assert torch.equal(pool.expert(expert), weight[expert])
    assert out <= pool.versions <= sum(len(set(choice[:, r].tolist())) for r in range(out))
    if experts > 1:
        # numbered as experts come
        assert not pool.row_map[0].any()


# --- parts of a pool, and pools together


@pytest.mark.parametrize("chunk", [1, rowpool._CHUNK])
@given(pools(), st.data())
@few
def test_take(chunk, sample, data):
    pool, (experts, out) = sample.pool, sample.row_map.shape
    order = st.lists(st.integers(0, out - 1), min_size=1, max_size=out + 1)
    neurons = data.draw(st.none() | order.map(torch.tensor))
    start = data.draw(st.integers(0, pool.in_features - 1))
    stop = data.draw(st.integers(start + 1, pool.in_features))
    columns = data.draw(st.sampled_from([None, (start, stop)]))
    with mock.patch.object(rowpool, "_CHUNK", chunk):
        taken = check_pool(pool.take(neurons, columns))
    places = range(out) if neurons is None else neurons.tolist()
    part = slice(None) if columns is None else slice(*columns)
    same = torch.equal if pool.codec.scaled else same_bits
    for expert in range(experts):
        assert same(taken.expert(expert), sample.expert(expert)[places][:, part])
    versions = [v for r in places for v in versions_of(sample, r)]
    assert torch.equal(unpacked_mask(taken), sample.keep[versions][:, part]), "kept stays kept"
    assert taken.codec.name == pool.codec.name and (taken.mask is None) == (pool.mask is None)


def versions_of(sample, neuron: int) -> range:
    first = sample.version(0, neuron) - int(sample.row_map[0, neuron])
    return range(first, first + int(sample.row_map[:, neuron].max()) + 1)


def test_columns_that_begin_inside_a_group_of_scales():
    """Columns 0 to 15 have one scale, 16 to 31 another; from 8 on the groups are of 8."""
    rows = torch.cat([torch.full((1, 16), 7.0), torch.full((1, 16), 70.0)], dim=1)
    pool = RowPool.pack(rows, codec=codec("int4", 16))
    assert pool.scale.tolist() == [[1, 10]]
    taken = pool.take(columns=(8, 32))
    assert taken.codec.group == 8 and taken.scale.tolist() == [[1, 10, 10]]
    assert taken.rows().tolist() == [[7.0] * 8 + [70.0] * 16]
    taken = pool.take(columns=(16, 32))
    assert taken.codec.group == 16 and taken.scale.tolist() == [[10]]
    assert pool.take(columns=(3, 32)).codec.group == 1


@given(pools(columns=13, experts=3), pools(columns=13, experts=1), st.booleans())
@few
def test_concatenation_keeps_every_expert(many, one, reverse):
    """Any codecs, any masks; a linear with one expert gives all experts its rows."""
    parts = [one, many] if reverse else [many, one, many]
    joined = check_pool(RowPool.concat([part.pool for part in parts]))
    codecs = {part.pool.codec for part in parts}
    for expert in range(3):
        right = [part.expert(0 if part is one else expert) for part in parts]
        if len(codecs) > 1:
            right = [rows.to(joined.codec.storage) for rows in right]
        same = torch.equal if joined.codec.scaled or len(codecs) > 1 else same_bits
        assert same(joined.expert(expert), torch.cat(right))
    assert joined.codec.scaled == (len(codecs) == 1 and many.pool.codec.scaled)
    assert (joined.mask is None) == all(part.pool.mask is None for part in parts)


@pytest.mark.parametrize(
    ("names", "right"),
    [
        (["int8", "int3"], "float32"),
        (["int4", "bfloat16"], "bfloat16"),
        (["bfloat16", "float32"], "float32"),
        (["int8", "int8"], "int8"),
        # neither holds all values of the other
        (["bfloat16", "float16"], "float32"),
        (["float16", "bfloat16"], "float32"),
    ],
)
def test_mixed_codecs_decode_to_the_widest_float(names, right):
    rows = torch.randn(3, 20)
    pools = [
        RowPool.pack(
            rows if codec(name).scaled else rows.to(codec(name).storage), codec=codec(name)
        )
        for name in names
    ]
    assert RowPool.concat(pools).codec.name == right


def test_concatenation_of_one_expert_pools_has_no_row_map():
    pools = [RowPool.pack(torch.randn(2, 5)), RowPool.pack(torch.randn(3, 5))]
    joined = RowPool.concat(pools)
    assert joined.row_map is None and joined.mask is None and joined.out_features == 5
    assert torch.equal(joined.expert(0), torch.cat([pool.expert(0) for pool in pools]))


def test_pools_that_do_not_fit_together():
    def pool(experts, width):
        return RowPool.pack_experts(torch.randn(experts, 2, width))

    with pytest.raises(WexpandError, match=r"\[2, 3\] experts"):
        RowPool.concat([pool(2, 5), pool(3, 5)])
    with pytest.raises(WexpandError, match=r"\[5, 6\] input columns"):
        RowPool.concat([pool(2, 5), pool(2, 6)])


@pytest.mark.parametrize("chunk", [1, rowpool._CHUNK])
@given(pools())
@settings(max_examples=30, deadline=None)
def test_decoded_and_masked(chunk, sample):
    pool = sample.pool
    with mock.patch.object(rowpool, "_CHUNK", chunk):
        decoded = check_pool(pool.decoded(torch.float32))
    assert decoded.codec == codec("float32") and torch.equal(decoded.rows(), sample.rows.float())
    assert torch.equal(unpacked_mask(decoded), sample.keep)
    masked = check_pool(pool.masked())
    assert masked.mask is not None and torch.equal(masked.rows(), pool.rows())


def test_to_changes_floats_only():
    rows = torch.randn(3, 20)
    half = check_pool(RowPool.pack(rows).to(dtype=torch.float16))
    assert half.codec == codec("float16") and same_bits(half.rows(), rows.half())
    pool = RowPool.pack(rows, codec=codec("int4"))
    moved = check_pool(pool.to("cpu", torch.bfloat16))
    assert moved.codec == pool.codec and same_bits(moved.rows(), pool.rows())


# --- bytes


def test_bytes():
    """20 columns: 3 mask bytes a row. Two experts share neuron 0 and differ in neuron 1."""
    weight = torch.zeros(2, 2, 20, dtype=torch.bfloat16)
    weight[:, 0, :10] = 1
    weight[0, 1, :4], weight[1, 1, :6] = 1, 2
    pool = RowPool.pack_experts(weight)
    assert pool.versions == 3 and pool.nnz == 20
    assert pool.stored_bytes() == {"values": 40, "mask": 9, "scale": 0, "row_map": 4}
    assert pool.row_bytes().tolist() == [2 * 10 + 3, 2 * 4 + 3, 2 * 6 + 3]
    # a byte of the row map per neuron
    first, second = 2 * 14 + 6 + 2, 2 * 16 + 6 + 2
    assert pool.bytes_per_token() == (first + second) / 2
    assert pool.bytes_per_token(torch.tensor([3, 1])) == (3 * first + second) / 4
    assert pool.bytes_per_token(torch.tensor([0, 0])) == pool.bytes_per_token()
    one = RowPool.pack_experts(weight[:1])
    assert one.bytes_per_token() == 2 * 14 + 6, "one expert needs no row map"
    assert one.stored_bytes()["row_map"] == 0
    assert pool.to(dtype=torch.float32).stored_bytes()["values"] == 80


def test_bytes_of_integers_and_of_full_rows():
    """int4: 10, 4 and 5 kept weights take 5, 2 and 3 bytes; 20 columns have 3 groups of 8.

    Full rows have no mask.
    """
    weight = torch.zeros(3, 20)
    weight[0, :10] = weight[1, :4] = weight[2, :5] = 1
    pool = RowPool.pack(weight, codec=codec("int4", 8))
    assert pool.stored_bytes() == {"values": 5 + 2 + 3, "mask": 9, "scale": 18, "row_map": 0}
    assert pool.row_bytes().tolist() == [5 + 3 + 6, 2 + 3 + 6, 3 + 3 + 6]
    assert pool.bytes_per_token() == 10 + 9 + 18
    full = RowPool.pack(torch.ones(3, 21), codec=codec("int4"))
    assert full.stored_bytes() == {"values": 33, "mask": 0, "scale": 6, "row_map": 0}
    assert full.row_bytes().tolist() == [13, 13, 13]
    assert RowPool.pack(torch.ones(2, 20)).row_bytes().tolist() == [80, 80]


# --- what is refused


def pool() -> RowPool:
    """6 versions of 12 columns, 36 weights."""
    weight = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    weight[:, :, ::2] = 0
    return RowPool.pack_experts(weight)


def int4() -> RowPool:
    """2 versions of 12 columns, 5 weights each: 3 bytes each."""
    weight = torch.zeros(2, 12)
    weight[:, :5] = 1
    return RowPool.pack(weight, codec=codec("int4", 8))


def full() -> RowPool:
    return RowPool.pack(torch.ones(2, 12))


def bits_of(byte: int) -> torch.Tensor:
    return torch.full((6, 2), byte, dtype=torch.uint8)


REFUSALS = [
    ("weight: shape [1, 36] should be one-dim", pool(), dict(values=pool().values[None])),
    ("weight: dtype torch.float64 should be torch.float32", pool(),
     dict(values=pool().values.double())),
    ("weight: dtype torch.float16 should be torch.float32", pool(),
     dict(values=pool().values.half())),
    ("weight: holds NaN", pool(), dict(values=changed(pool().values, 3, float("nan")))),
    ("weight: holds NaN or infinite", pool(),
     dict(values=changed(pool().values, 3, -float("inf")))),
    ("weight_mask: rows keep 36 weights, which take 36 elements of NAME.weight, but it holds 35",
     pool(), dict(values=pool().values[1:])),
    ("weight: rows keep 12 weights, which take 12 elements of NAME.weight, but it holds 23",
     full(), dict(values=full().values[1:])),
    ("weight_mask: dtype torch.int8 should be uint8", pool(),
     dict(mask=pool().mask.to(torch.int8))),
    ("weight_mask: shape [6, 1] should be [versions, 2]", pool(), dict(mask=pool().mask[:, :1])),
    ("weight_mask: shape [12] should", pool(), dict(mask=pool().mask.view(-1))),
    ("weight_mask: sets a bit past column 11", pool(), dict(mask=pool().mask | bits_of(16))),
    ("weight_mask: rows keep 35 weights", pool(),
     dict(mask=changed(pool().mask, (0, 1), 0b00000010))),
    ("row_map: dtype torch.int64 should be uint8", pool(), dict(row_map=pool().row_map.long())),
    ("row_map: shape [6] should be [experts, out]", pool(), dict(row_map=pool().row_map.view(-1))),
    ("row_map: shape [0, 3] should", pool(), dict(row_map=pool().row_map[:0])),
    ("row_map: its neurons have 7 row versions together, by their largest numbers, but there are 6",
     pool(), dict(row_map=changed(pool().row_map, (1, 2), 2))),
    ("row_map: its neurons have 5 row versions together", pool(),
     dict(row_map=changed(pool().row_map, (1, 2), 0))),
    ("row_map: its neurons have 260 row versions", pool(),
     dict(row_map=changed(pool().row_map, (1, 2), 255))),
    ("weight_scale: there, or not there, against values of int4, groups of 8", int4(),
     dict(scale=None)),
    ("weight_scale: there, or not there, against values of float32", pool(),
     dict(scale=torch.ones(6, 1).half())),
    ("weight_scale: torch.float32 [2, 2] should be float16 [2, 2]", int4(),
     dict(scale=int4().scale.float())),
    ("weight_scale: torch.float16 [2, 1] should be float16 [2, 2]", int4(),
     dict(scale=int4().scale[:, 1:])),
    ("weight_scale: torch.float16 [1, 2] should", int4(), dict(scale=int4().scale[1:])),
    ("weight_scale: holds NaN", int4(), dict(scale=changed(int4().scale, (1, 1), float("nan")))),
    ("weight_scale: holds NaN, infinite or negative", int4(),
     dict(scale=changed(int4().scale, (1, 0), float("inf")))),
    ("weight_scale: holds NaN, infinite or negative", int4(),
     dict(scale=changed(int4().scale, (0, 0), -1))),
    ("weight: sets a bit past a row's last weight", int4(),
     dict(values=changed(int4().values, 2, 0x17))),
    ("weight: dtype torch.int8 should be torch.uint8", int4(),
     dict(values=int4().values.to(torch.int8))),
    ("weight_mask: rows keep 10 weights, which take 6 elements of NAME.weight, but it holds 5",
     int4(), dict(values=int4().values[1:])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "sound", "change"), REFUSALS, ids=[m[0][:50] for m in REFUSALS]
)
def test_validate_refuses(message, sound, change):
    check_pool(sound, "NAME")
    with pytest.raises(WexpandError, match=re.escape(f"NAME.{message}")) as error:
        check_pool(replace(sound, **change), "NAME")
    assert str(error.value).startswith(f"{error.value.tensor}: ")


def test_validate_accepts():
    assert check_pool(pool(), "NAME").versions == 6
    assert check_pool(pool().to(dtype=torch.float16))
    # a version that no expert uses; a scale of zero; a neuron without a weight
    assert check_pool(replace(pool(), row_map=changed(pool().row_map, 0, 1))).versions == 6
    assert check_pool(replace(int4(), scale=torch.zeros(2, 2).half()))
    assert check_pool(RowPool.pack(torch.zeros(2, 12))).nnz == 0
