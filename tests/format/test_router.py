"""The stored router: as narrow as it can be without loss, and what its logits choose."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from wexpand_plugin.format.router import StoredRouter, choice, first_children, narrowest


def test_narrowest_is_exact():
    assert narrowest(torch.empty(3, 4, device="meta")).dtype == torch.float32
    exact = torch.tensor([[0.5, -0.25], [65504.0, 2**-24]])
    assert narrowest(exact).dtype == torch.float16
    assert torch.equal(narrowest(exact).float(), exact)
    for other in (torch.tensor([0.1]), torch.tensor([1e6]), torch.tensor([1e-9])):
        assert narrowest(other).dtype == torch.float32
        assert torch.equal(narrowest(other), other)


@st.composite
def logits(draw):
    """(logits, parents); whole numbers, so that many are equal."""
    clusters = draw(st.integers(1, 40))
    parents = draw(st.one_of(st.just(0), st.integers(1, clusters)))
    shape = (draw(st.integers(0, 5)), parents + clusters)
    found = draw(arrays.arrays("float32", shape, elements=st.integers(-3, 3).map(float)))
    return torch.from_numpy(found), parents


@given(logits())
@settings(deadline=None)
def test_choice_is_the_first_of_the_best(case):
    values, parents = case
    clusters = values.shape[1] - parents
    right = []
    for row in values.tolist():
        first, end = 0, clusters
        if parents:
            best = row[:parents].index(max(row[:parents]))
            first, end = best * clusters // parents, (best + 1) * clusters // parents
        children = row[parents + first : parents + end]
        right.append(first + children.index(max(children)))
    found = choice(values, parents)
    assert found.dtype == torch.int64 and found.tolist() == right


def test_every_cluster_has_one_parent():
    for clusters in (2, 33, 40, 255, 4096):
        for parents in {2, 7, 33, clusters} & set(range(clusters + 1)):
            first = first_children(torch.arange(parents + 1), clusters, parents)
            counts = first.diff()
            assert first[0] == 0 and first[-1] == clusters
            assert counts.min() >= clusters // parents and counts.max() <= -(-clusters // parents)


def test_no_logit_leads_out_of_range():
    values = torch.full((3, 9 + 40), float("nan"))
    values[1, 4] = values[2, 9 + 39] = 1
    found = choice(values, 9)
    assert found.min() >= 0 and found.max() < 40


def test_route_is_the_choice_among_logits():
    generator = torch.Generator().manual_seed(0)
    router = StoredRouter(
        torch.randn(47, 12, generator=generator).half(), torch.randn(47, generator=generator), 7
    )
    x = torch.randn(100, 12, generator=generator)
    right = x @ router.weight.float().t() + router.bias
    assert router.clusters == 40 and torch.equal(router.route(x), choice(right, 7))
    assert torch.equal(router.route(x.bfloat16()), router.route(x.bfloat16().float()))
    assert len(router.route(x).unique()) > 20
