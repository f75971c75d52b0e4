"""Sizes that are known before there is anything to store, against what is stored then."""

import pytest
import torch
from hypothesis import given, settings
from samples import CODECS, linear, pools

from wexpand_plugin.format.checks import check_pool
from wexpand_plugin.format.router import StoredRouter, router_bytes, rows_read
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.sizes import StoredBytes, row_bytes
from wexpand_plugin.format.values import codec


@pytest.mark.parametrize(
    ("how", "sparsity", "masked", "bytes_per_weight"),
    [
        (codec("bfloat16"), 0.5, True, 1.125),
        (codec("bfloat16"), 0.8, True, 0.525),
        (codec("bfloat16"), 0.0, False, 2.0),
        (codec("float32"), 0.5, True, 2.125),
        (codec("int8"), 0.5, True, 0.5 + 1 / 8 + 1 / 64),
        (codec("int4"), 0.5, True, 0.25 + 1 / 8 + 1 / 64),
        (codec("int4"), 0.0, False, 0.5 + 1 / 64),
        (codec("int3"), 0.5, True, 3 / 16 + 1 / 8 + 1 / 64),
        (codec("int2"), 0.0, False, 0.25 + 1 / 64),
        (codec("int4", 32), 0.5, True, 0.25 + 1 / 8 + 1 / 16),
    ],
)
def test_the_formulas_of_the_documentation(how, sparsity, masked, bytes_per_weight):
    columns = 1280
    kept = torch.tensor([round(columns * (1 - sparsity))])
    found = row_bytes(how, kept, columns, masked=masked)
    assert found.tolist() == [columns * bytes_per_weight]
    sizes = StoredBytes(how, torch.bfloat16)
    assert torch.equal(sizes.row(kept, columns), found)


def test_odd_widths_are_rounded_up():
    """21 columns: 3 bytes of mask, 3 scales of groups of 8, half a byte to spare."""
    assert row_bytes(codec("int4", 8), torch.tensor([5]), 21).tolist() == [3 + 3 + 6]
    assert row_bytes(codec("float16"), torch.tensor([0, 5]), 21).tolist() == [3, 13]


@given(pools())
@settings(deadline=None)
def test_predicted_is_stored(sample):
    pool, sizes = sample.pool, StoredBytes(sample.pool.codec, torch.bfloat16)
    pool = pool.smallest()
    rows = sizes.row(sample.keep.sum(dim=1), pool.in_features)
    assert torch.equal(rows, pool.row_bytes()) and torch.equal(pool.rows(), sample.pool.rows())
    fixed = sizes.fixed(pool.out_features, pool.in_features, pool.experts)
    stored = sum(pool.stored_bytes().values())
    assert rows.sum() + fixed == stored + router_bytes(pool.experts, pool.in_features)


@pytest.mark.parametrize("how", CODECS, ids=str)
def test_of_a_linear(how):
    """A byte of row map for each pair, and a float16 router; none with one expert."""
    sizes = StoredBytes(how, torch.bfloat16)
    assert sizes.dense(10, 20) == 400
    assert sizes.fixed(10, 20, 1) == 0
    assert sizes.fixed(10, 20, 4) == 4 * 10 + 4 * (2 * 20 + 4)
    router = StoredRouter(torch.zeros(4, 20).half(), torch.zeros(4))
    assert router.nbytes == router_bytes(4, 20)
    # a token reads one row of the map, of two levels of a router what it compares, and one bias
    assert sizes.read(10, 20, 1, 1) == 0 and sizes.read(10, 20, 4, 0) == 10
    assert sizes.read(10, 20, 4, 4) == 10 + router.nbytes
    assert sizes.read(10, 20, 2, 9, 3, True) == 10 + 1 + 3 * 10 + 6 * (2 * 20 + 4)


@pytest.mark.parametrize(
    ("experts", "clusters", "parents"), [(1, 1, 0), (1, 5, 0), (2, 2, 0), (2, 5, 3), (5, 5, 2)]
)
def test_clusters_cost_what_they_store(experts, clusters, parents):
    entry, tensors = linear(experts, False, clusters=clusters, parents=parents, cluster_bias=True)
    sizes = StoredBytes(entry.codec, torch.float32)
    fixed = sum(
        tensor.numel() * 2 if kind == "router_weight" else tensor.nbytes
        for kind, tensor in tensors.items()
        if kind in ("row_map", "router_weight", "router_bias", "cluster_expert")
    )
    assert sizes.fixed(3, 12, experts, clusters, parents) == fixed
    biases = tensors["cluster_bias"].nbytes + tensors["cluster_bias_scale"].nbytes
    assert sizes.fixed(3, 12, experts, clusters, parents, True) == fixed + biases


def test_a_token_reads_two_levels_of_a_router():
    """256 clusters of 16 parents: 16 rows and 16 of their children."""
    assert router_bytes(256, 20, 16) == 272 * 44 and router_bytes(256, 20) == 256 * 44
    assert router_bytes(1, 20) == 0
    assert [rows_read(256, 16), rows_read(40, 7), rows_read(40, 0)] == [32, 13, 40]


def test_one_row_that_is_not_full_means_masks_for_all():
    rows = torch.ones(2, 16, dtype=torch.bfloat16)
    rows[1, 3:] = 0
    right = [32 + 2, 6 + 2]
    sizes = StoredBytes(codec("bfloat16"), torch.bfloat16)
    assert sizes.row(torch.tensor([16, 3]), 16).tolist() == right
    assert RowPool.pack(rows).smallest().row_bytes().tolist() == right


def test_a_few_zeros_are_stored_rather_than_a_mask():
    rows = torch.ones(2, 16, dtype=torch.bfloat16)
    rows[1, 3] = 0
    sizes = StoredBytes(codec("bfloat16"), torch.bfloat16)
    assert sizes.row(torch.tensor([16, 15]), 16).tolist() == [32, 32]
    pool = RowPool.pack(rows)
    assert pool.row_bytes().tolist() == [34, 32]
    full = check_pool(pool.smallest())
    assert full.mask is None and torch.equal(full.rows(), rows)
    assert full.row_bytes().tolist() == [32, 32]
