"""Candidates: what is selected, also from a shortlist, are the versions that were granted."""

import pytest
import torch
from torch import Tensor
from weigh import Weigh

from wexpand_plugin.method.allocation import Allocation, AllocationProblem, choose_versions
from wexpand_plugin.method.candidates import Candidates, allocate_model, full_expansion, propose
from wexpand_plugin.method.clusters import Router
from wexpand_plugin.method.masks import MaskStructure
from wexpand_plugin.method.merge_tree import merge_tree
from wexpand_plugin.method.settings import Settings
from wexpand_plugin.method.solvers.sparsegpt import solve
from wexpand_plugin.method.statistics import GroupStatistics
from wexpand_plugin.method.versions import RowVersions, SolvedRows


class Packed:
    """Rows that are kept in another form."""

    def __init__(self, rows: SolvedRows):
        self.hidden = rows.weights.clone()

    def __getitem__(self, index: Tensor) -> SolvedRows:
        return SolvedRows(self.hidden[index])


def candidates(experts: int = 4, rows: int = 12, width: int = 20) -> tuple[Candidates, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tree = merge_tree(torch.randn(experts, 3, generator=generator), torch.ones(experts))
    versions = torch.randn(tree.nodes, rows, width, generator=generator)
    versions[torch.rand(versions.shape, generator=generator) < 0.5] = 0
    errors = torch.rand(tree.nodes, experts, rows, generator=generator)
    problem = AllocationProblem(tree, errors, torch.ones(tree.nodes, rows, dtype=torch.bool),
                                torch.ones(tree.nodes, rows))  # fmt: skip
    place = torch.arange(tree.nodes * rows).view(tree.nodes, rows)
    return Candidates(SolvedRows(versions.flatten(0, 1)), place, errors, 100.0, problem), versions


def check(stored: RowVersions, use: Tensor, versions: Tensor) -> None:
    """`stored` holds, for each expert, exactly the rows of `versions` in `use`, each once."""
    rows = torch.arange(use.shape[1])
    assert stored.row_map.dtype == torch.uint8 and stored.row_map.shape == use.shape
    assert len(stored.rows.weights) == sum(len(use[:, r].unique()) for r in rows)
    assert torch.equal(stored.dense(), versions[use, rows])


@pytest.mark.parametrize("price", [0.0, 0.05, 0.2, 10.0])
def test_select_gives_what_was_chosen(price):
    found, versions = candidates()
    choice = choose_versions(found.problem, price)
    stored = found.select(choice.use)
    check(stored, choice.use, versions)
    assert len(stored.rows.weights) == int(choice.granted.sum())
    change = sum(float(found.errors[choice.use[e, r], e, r]) for e in range(4) for r in range(12))
    assert stored.error == pytest.approx((change / 100) ** 0.5)


@pytest.mark.parametrize("wide", [0.0, 0.05])
@pytest.mark.parametrize("price", [0.1, 0.3, 10.0])
def test_a_shortlist_can_be_chosen_from_again(wide, price):
    found, versions = candidates()
    short = found.shortlist([choose_versions(found.problem, w) for w in (wide, 0.2)], Packed)
    assert len(short.rows.hidden) < len(found.rows.weights)
    choice = choose_versions(short.problem, price)
    check(short.select(choice.use), choice.use, versions)


def test_a_shortlist_keeps_base_versions_that_nobody_used():
    found, versions = candidates()
    leaves = torch.zeros(7, 12, dtype=torch.bool)
    leaves[:4] = True
    own = torch.arange(4)[:, None].expand(4, 12)
    short = found.shortlist([Allocation(own, leaves)], Packed)
    check(short.base(), torch.full((4, 12), 6), versions)
    check(short.full(), own, versions)


def test_full_and_base_versions():
    found, versions = candidates()
    assert torch.equal(found.full().dense(), versions[:4])
    assert torch.equal(found.base().dense(), versions[6].expand(4, 12, 20))
    again = RowVersions.full(SolvedRows(versions[:4]), 0.0)
    assert torch.equal(again.dense(), versions[:4]) and len(again.rows.weights) == 48


def statistics(hold_out: bool) -> tuple[GroupStatistics, Tensor]:
    generator = torch.Generator().manual_seed(3)
    router = Router(torch.randn(3, 16, generator=generator), torch.zeros(3))
    found = GroupStatistics(16, router, hold_out=hold_out)
    rows = torch.randn(6, 200, 16, generator=generator)
    for batch in rows:
        found.add(batch)
    found.flush()
    return found, rows.flatten(0, 1)


WEIGHT = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
ROW = MaskStructure.parse("row")


def test_an_empty_cluster_gets_the_base_version():
    found, _ = statistics(False)
    found.sums[1], found.solved_tokens[1], found.tokens[1] = 0, 0, 0
    (experts,) = full_expansion([WEIGHT], found, Settings(0.5, num_experts=3))
    plain = solve(WEIGHT, found.total()[None], 0.5, ROW).weights[0]
    torch.testing.assert_close(experts.weights[1], plain, atol=1e-5, rtol=0)


def test_working_memory_changes_nothing():
    """All Hessians are solved at once, or one after another."""
    found, _ = statistics(True)
    for weights in ([WEIGHT], [WEIGHT[:4], WEIGHT[4:]]):
        much, little = (
            Settings(0.5, num_experts=3, size_budget=1.0, stored_bytes=Weigh(), max_bytes=size)
            for size in (1 << 20, 1)
        )
        for a, b in zip(
            full_expansion(weights, found, much), full_expansion(weights, found, little),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(a.weights, b.weights)
        for one, other in zip(
            propose(weights, [None] * len(weights), found, much),
            propose(weights, [None] * len(weights), found, little),
            strict=True,
        ):
            torch.testing.assert_close(one.rows.weights, other.rows.weights)
            torch.testing.assert_close(one.errors, other.errors)


def test_errors_are_the_closed_form():
    found, _ = statistics(True)
    settings = Settings(0.5, num_experts=3, size_budget=1.0, stored_bytes=Weigh())
    (proposal,) = propose([WEIGHT], [None], found, settings)
    tree = proposal.problem.tree
    for node in range(tree.nodes):
        version = proposal.rows[proposal.place[node]].weights
        kept = (version != 0).sum(dim=1)
        assert torch.equal(proposal.problem.cost[node], Weigh().row(kept, 16))
        for expert in tree.members[node].nonzero().flatten().tolist():
            change = version - WEIGHT
            expected = ((change @ found.sums[expert]) * change).sum(dim=1)
            torch.testing.assert_close(
                proposal.errors[node, expert], expected, atol=1e-3, rtol=1e-3
            )
    energy = sum(float(((WEIGHT @ s) * WEIGHT).sum()) for s in found.sums)
    assert proposal.energy == pytest.approx(energy, rel=1e-4)


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
    problem = found.problem._replace(errors=found.problem.errors * 9)
    louder = Candidates(found.rows, found.place, found.errors * 9, 900.0, problem)
    choices = allocate_model([found, louder], [1.0, 1.0], 50.0)
    assert torch.equal(choices[0].granted, choices[1].granted)
    silent = Candidates(found.rows, found.place, found.errors * 0, 0.0, problem)
    assert all(c.use.max() < 7 for c in allocate_model([found, silent], [1.0, 1.0], 50.0))


def test_errors_of_a_wide_linear_are_those_of_its_inputs():
    """Wider than one strip of the symmetric sums, of which the lower half is not read."""
    torch.manual_seed(0)
    x, weight = torch.randn(600, 300), torch.randn(5, 300)
    statistics = GroupStatistics(300, Router(x[:2], torch.zeros(2)), hold_out=True)
    statistics.add(x)
    statistics.flush()
    settings = Settings(0.5, num_experts=2, size_budget=1.0, stored_bytes=Weigh())
    (found,) = propose([weight], [None], statistics, settings)
    change = found.rows[found.place[-1]].weights.float() - weight
    energy = 0.0
    for expert in range(2):
        upper = statistics.sums[expert].triu()
        symmetric = upper + upper.triu(1).t()
        right = ((change @ symmetric) * change).sum(dim=1)
        torch.testing.assert_close(found.errors[-1, expert], right, rtol=1e-3, atol=1e-3)
        energy += float(((weight @ symmetric) * weight).sum())
    assert found.energy == pytest.approx(energy, rel=1e-4)
