"""Biases of clusters: rounded once, cut and joined by neurons; and which expert a cluster has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from samples import same_bits

from wexpand_plugin.format.clusters import ClusterBias, expert_of, tokens_per_expert


@given(
    arrays.arrays("float32", st.tuples(st.integers(1, 40), st.integers(1, 9)),
                  elements=st.floats(-2.0**18, 2.0**18, width=32)),
    st.sampled_from([1.0, 2.0**-10, 2.0**-20, 2.0**-30]),
)  # fmt: skip
@settings(deadline=None)
def test_pack_is_off_by_half_a_scale_at_most(values, size):
    bias = torch.from_numpy(values) * size
    packed = ClusterBias.pack(bias)
    assert packed.values.dtype == torch.int8 and packed.scale.dtype == torch.float16
    assert packed.values.shape == bias.shape and packed.scale.shape == bias.shape[1:]
    assert bool(packed.scale.isfinite().all()) and bool((packed.scale >= 0).all())
    error = (packed.decoded() - bias).abs()
    assert bool((error <= packed.scale.float() * 0.5001).all())
    # as fine as 8 bits and float16 allow
    finest = bias.abs().amax(dim=0) / 127 * 1.001 + 2**-24
    assert bool((packed.scale.float() <= finest).all())


def test_no_bias_is_stored_exactly():
    packed = ClusterBias.pack(torch.zeros(3, 2))
    assert not packed.decoded().any() and packed.nbytes == 3 * 2 + 2 * 2
    assert (packed.clusters, packed.out_features) == (3, 2)


def test_what_was_decoded_packs_to_the_same():
    first = ClusterBias.pack(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    again = ClusterBias.pack(first.decoded())
    torch.testing.assert_close(again.decoded(), first.decoded(), rtol=1e-3, atol=1e-6)


def test_biases_of_tokens():
    packed = ClusterBias.pack(torch.randn(4, 3))
    clusters = torch.tensor([3, 0, 3])
    assert torch.equal(packed.of(clusters), packed.decoded()[clusters])
    one = ClusterBias.pack(torch.randn(1, 3))
    assert torch.equal(one.of(None), one.decoded())


def test_take_and_concat():
    a, b = ClusterBias.pack(torch.randn(5, 4)), ClusterBias.pack(torch.randn(5, 3))
    one = ClusterBias.pack(torch.randn(1, 2))
    both = ClusterBias.concat([a, None, b, one], [4, 6, 3, 2])
    right = [a.decoded(), torch.zeros(5, 6), b.decoded(), one.decoded().expand(5, -1)]
    assert torch.equal(both.decoded(), torch.cat(right, dim=1))
    back = both.take(torch.arange(10, 13))
    assert same_bits(back.values, b.values) and same_bits(back.scale, b.scale)
    assert ClusterBias.concat([None, None], [1, 2]) is None
    with pytest.raises(ValueError):
        ClusterBias.concat([a, b], [4])


def test_tokens_per_expert():
    named = torch.tensor([1, 0, 0, 1], dtype=torch.uint8)
    assert tokens_per_expert([1, 20, 300, 4000], named, 3).tolist() == [320, 4001, 0]
    assert tokens_per_expert([1, 20], None, 2).tolist() == [1, 20]
    assert tokens_per_expert([1, 20], None, 1).tolist() == [21]


def test_expert_of():
    clusters = torch.tensor([4, 0, 2])
    assert expert_of(clusters, None, 1) is None
    assert expert_of(clusters, None, 5) is clusters
    named = torch.tensor([1, 0, 0, 1, 200], dtype=torch.uint8)
    found = expert_of(clusters, named, 201)
    assert found.tolist() == [200, 1, 0] and found.dtype == torch.int64
