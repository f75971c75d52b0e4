"""Statistics of an input group: every row once, and a uniform sample."""

import pytest
import torch
from test_candidates import statistics

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.clusters import Router, fit_router
from wexpand_plugin.method.statistics import GroupStatistics, quadratic


@pytest.mark.parametrize("hold_out", [False, True])
def test_statistics_count_and_sum_every_row(hold_out):
    found, rows = statistics(hold_out)
    assert int(found.tokens.sum()) == 1200
    torch.testing.assert_close(found.total(), rows.t() @ rows / 1200, atol=1e-4, rtol=1e-4)
    if not hold_out:
        labels = (rows @ found.router.weight.t()).argmax(dim=1)
        for expert in range(3):
            part = rows[labels == expert]
            torch.testing.assert_close(found.sums[expert], part.t() @ part, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(found.mean_inputs()[expert], part.mean(dim=0))


def test_squared_outputs_of_few_rows_and_of_many():
    """Of a few the rows are kept, of many the sum alone."""
    generator = torch.Generator().manual_seed(3)
    width, counts = 40, (9, 0, 10, 300, 11)
    router = Router(torch.eye(len(counts), width), torch.zeros(len(counts)))
    found = GroupStatistics(width, router, hold_out=True)
    rows = torch.randn(sum(counts), width, generator=generator)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows[torch.arange(len(rows)), labels] += 20
    for part in rows.split(15):  # too few to hold any out
        found.add(part)
        found.flush()
    weight = torch.randn(7, width, generator=generator)
    for expert, count in enumerate(counts):
        part = rows[labels == expert].double()
        assert len(part) == count
        expected = (part @ weight.double().t()).square().sum(dim=0)
        torch.testing.assert_close(found.squares(weight, expert).double(), expected, rtol=1e-4,
                                   atol=1e-4)  # fmt: skip
        torch.testing.assert_close(quadratic(weight, found.sums[expert]).double(), expected,
                                   rtol=1e-4, atol=1e-2)  # fmt: skip
    assert [kept is not None for kept in found._few] == [True, True, True, False, False]


@pytest.mark.parametrize("shift", [0, 3000])
@pytest.mark.parametrize("clusters", [1, 5, 40])
def test_sums_within_clusters(clusters, shift):
    """Batch by batch and in float32, also where the means are far larger than what is around."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(30, 400, 12, generator=generator) + 3 * torch.randn(30, 1, 12)
    rows[..., :3] += shift
    router = None if clusters == 1 else fit_router(rows.flatten(0, 1), clusters, restarts=1)
    experts = torch.arange(clusters) % 3 if clusters > 1 else None
    found = GroupStatistics(12, router, cluster_expert=experts, within=True)
    for batch in rows:
        found.add(batch)
    found.flush()
    every = rows.flatten(0, 1)
    labels = found.route(every)
    expected = torch.zeros(found.experts, 12, 12, dtype=torch.float64)
    for cluster in labels.unique():
        part = every[labels == cluster].double()
        torch.testing.assert_close(
            found.mean_inputs()[cluster].double(), part.mean(dim=0), rtol=1e-5, atol=1e-4
        )
        apart = part - part.mean(dim=0)
        expected[found.cluster_expert[cluster]] += apart.t() @ apart
    torch.testing.assert_close(found.sums.double(), expected, rtol=1e-3, atol=2)
    assert torch.equal(found.tokens, torch.bincount(labels, minlength=clusters))
    total = expected.sum(dim=0) / len(every)
    torch.testing.assert_close(found.total().double(), total, rtol=1e-3, atol=1e-4)
    for expert in range(found.experts):
        part = every[found.cluster_expert[labels] == expert].double()
        torch.testing.assert_close(
            found.expert_means()[expert].double(), part.mean(dim=0), rtol=1e-5, atol=1e-4
        )


def test_what_cluster_biases_hold_out():
    router = Router(torch.randn(4, 6), torch.zeros(4))
    found, rows = GroupStatistics(6, router, within=True, hold_out=True), torch.randn(5, 64, 6)
    for batch in rows:
        found.add(batch)
    found.flush()
    known, labels = found.cluster_means(), router.route(rows.flatten(0, 1))
    assert int(known.held_out_tokens.sum()) == 5 * 4 and int(known.tokens.sum()) == 5 * 60
    for cluster in range(4):
        part = rows.flatten(0, 1)[labels == cluster]
        assert known.tokens[cluster] + known.held_out_tokens[cluster] == len(part)
        solved = known.means[cluster] * known.tokens[cluster]
        torch.testing.assert_close(
            solved + known.held_out_sums[cluster], part.sum(dim=0), atol=1e-3, rtol=1e-4
        )
    short = GroupStatistics(6, router, within=True, hold_out=True)
    for batch in rows:
        short.add(batch[:15])
    short.flush()
    with pytest.raises(WexpandError, match="sequences of 16 or more"):
        short.cluster_means()


def test_inputs_that_are_not_finite_are_refused():
    found = GroupStatistics(4, None)
    with pytest.raises(WexpandError, match="NaN"):
        found.add(torch.full((8, 4), torch.nan))
