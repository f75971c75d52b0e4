"""Candidates: what is selected, also from a shortlist, are the versions that were granted."""

import pytest
import torch

pytest.importorskip("llmcompressor")
from wexpand_plugin.format.router import Router  # noqa: E402
from wexpand_plugin.format.rowpool import RowPool  # noqa: E402
from wexpand_plugin.method.allocation import Choice, Problem, choose_versions, merge_tree  # noqa: E402
from wexpand_plugin.method.candidates import (  # noqa: E402
    SCORES,
    Candidates,
    Settings,
    allocate_model,
    expand,
    propose,
    score_values,
    weigh,
)
from wexpand_plugin.method.solvers.sparsegpt import MaskStructure  # noqa: E402
from wexpand_plugin.method.statistics import GroupStatistics, RowSample  # noqa: E402


def candidates(
    experts: int = 4, rows: int = 12, width: int = 20
) -> tuple[Candidates, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tree = merge_tree(torch.randn(experts, 3, generator=generator), torch.ones(experts))
    versions = torch.randn(tree.nodes, rows, width, generator=generator)
    versions[torch.rand(versions.shape, generator=generator) < 0.5] = 0
    errors = torch.rand(tree.nodes, experts, rows, generator=generator)
    problem = Problem(tree, errors, torch.ones(tree.nodes, rows, dtype=torch.bool),
                      torch.ones(tree.nodes, rows))  # fmt: skip
    place = torch.arange(tree.nodes * rows)
    return Candidates(RowPool.pack(versions.flatten(0, 1)), place, problem, 1.0), versions


@pytest.mark.parametrize("price", [0.0, 0.05, 0.2, 10.0])
def test_select_packs_what_was_chosen(price):
    found, versions = candidates()
    choice = choose_versions(found.problem, price)
    pool = found.select(choice).validate()
    assert pool.versions == int(choice.granted.sum())
    for expert in range(4):
        expected = versions[choice.use[expert], torch.arange(12)]
        assert torch.equal(pool.expert(expert), expected)


@pytest.mark.parametrize("wide", [0.0, 0.05])
@pytest.mark.parametrize("price", [0.1, 0.3, 10.0])
def test_a_shortlist_can_be_chosen_from_again(wide, price):
    found, versions = candidates()
    short = found.shortlist([choose_versions(found.problem, w) for w in (wide, 0.2)])
    choice = choose_versions(short.problem, price)
    pool = short.select(choice).validate()
    for expert in range(4):
        assert torch.equal(pool.expert(expert), versions[choice.use[expert], torch.arange(12)])


def test_a_shortlist_keeps_base_versions_that_nobody_used():
    found, versions = candidates()
    rows = torch.arange(12)
    leaves = torch.zeros(7, 12, dtype=torch.bool)
    leaves[:4] = True
    short = found.shortlist([Choice(torch.arange(4)[:, None].expand(4, 12), leaves)])
    base = Choice(torch.full((4, 12), 6), torch.zeros(7, 12, dtype=torch.bool))
    base.granted[6] = True
    assert torch.equal(short.select(base).expert(2), versions[6, rows])


def statistics(hold_back: bool) -> tuple[GroupStatistics, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    router = Router(torch.randn(3, 16, generator=generator), torch.zeros(3))
    found = GroupStatistics(16, router, hold_back=hold_back)
    rows = torch.randn(6, 200, 16, generator=generator)
    for batch in rows:
        found.add(batch)
    found.flush()
    return found, rows.flatten(0, 1)


@pytest.mark.parametrize("hold_back", [False, True])
def test_statistics_count_and_sum_every_row(hold_back):
    found, rows = statistics(hold_back)
    assert int(found.tokens.sum()) == 1200
    torch.testing.assert_close(found.total(), rows.t() @ rows / 1200, atol=1e-4, rtol=1e-4)
    if not hold_back:
        labels = (rows @ found.router.weight.t()).argmax(dim=1)
        for expert in range(3):
            part = rows[labels == expert]
            torch.testing.assert_close(found.sums[expert], part.t() @ part, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(found.mean_inputs()[expert], part.mean(dim=0))


def test_an_empty_cluster_gets_the_base_version():
    found, _ = statistics(False)
    found.sums[1], found.solved_tokens[1], found.tokens[1] = 0, 0, 0
    weight = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
    settings = Settings(0.5, MaskStructure.parse("row"), num_experts=3)
    pool = expand([weight], found, settings)[0]
    plain = settings.solve(weight, found.total()[None], [10])[0]
    torch.testing.assert_close(pool.expert(1), plain, atol=1e-5, rtol=0)


def test_errors_are_the_closed_form():
    found, rows = statistics(True)
    weight = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
    settings = Settings(0.5, MaskStructure.parse("row"), num_experts=3, size_budget=1.0)
    proposal = propose([weight], [None], found, rows, settings)[0]
    tree = proposal.problem.tree
    for node in range(tree.nodes):
        version = proposal.pool.rows(torch.arange(node * 10, node * 10 + 10))
        for expert in tree.members[node].nonzero().flatten().tolist():
            change = version - weight
            expected = ((change @ found.sums[expert]) * change).sum(dim=1)
            torch.testing.assert_close(
                proposal.problem.errors[node, expert], expected, atol=1e-3, rtol=1e-3
            )


def test_row_sample_is_uniform_and_bounded():
    sample = RowSample(50, seed=1)
    for start in range(0, 5000, 100):
        sample.add(torch.arange(start, start + 100).float().unsqueeze(1))
    rows = sample.rows.flatten()
    assert len(rows) == 50 and len(rows.unique()) == 50 and torch.equal(rows, rows.sort().values)
    assert 1500 < rows.mean() < 3500
    short = RowSample(50, seed=1)
    short.add(torch.arange(7.0).unsqueeze(1))
    assert torch.equal(short.rows.flatten(), torch.arange(7.0))


def test_a_linear_whose_errors_reach_further_gets_more():
    found, _ = candidates()
    even = allocate_model([found, found], [1.0, 1.0], 50.0)
    assert torch.equal(even[0].granted, even[1].granted)
    early, late = allocate_model([found, found], [1.0, 0.25], 50.0)
    assert early.granted.sum() > late.granted.sum()
    spent = [float(found.problem.cost[c.granted].sum()) for c in (early, late)]
    assert sum(spent) <= 50


def test_errors_count_relative_to_the_outputs():
    found, _ = candidates()
    louder = Candidates(
        found.pool, found.place, found.problem._replace(errors=found.problem.errors * 9), 9.0
    )
    choices = allocate_model([found, louder], [1.0, 1.0], 50.0)
    assert torch.equal(choices[0].granted, choices[1].granted)


@pytest.mark.parametrize("score", SCORES)
def test_scores_weigh_neurons_and_keep_the_scale(score):
    generator = torch.Generator().manual_seed(5)
    errors = torch.rand(7, 4, 12, generator=generator)
    rows, weight = torch.randn(256, 20, generator=generator), torch.randn(12, 20)
    values = score_values(score, rows, weight, None, seed=0)
    weighed = weigh(errors, score, values)
    if score == "gain":
        assert values is None and torch.equal(weighed, errors)
        return
    assert values is not None and values.shape == (12,)
    share = values.float().clamp(min=0) / values.float().clamp(min=0).mean()
    plain = errors if SCORES[score][0] else errors.mean(dim=2, keepdim=True)
    torch.testing.assert_close(weighed, plain * share)
