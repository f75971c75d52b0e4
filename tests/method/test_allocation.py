"""Granting row versions: against exhaustive search, and at the edges."""

import itertools

import pytest
import torch

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.allocation import (
    Problem,
    Tree,
    allocate,
    choose_versions,
    merge_tree,
    stored_versions,
)


def tree(experts: int, seed: int = 0) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(experts, 5, generator=generator)
    return merge_tree(means, torch.randint(1, 100, (experts,), generator=generator))


def problem(experts: int, rows: int, seed: int = 0, all_allowed: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shape = tree(experts, seed)
    errors = torch.rand(shape.nodes, experts, rows, generator=generator, dtype=torch.float64)
    allowed = torch.rand(shape.nodes, rows, generator=generator) < 0.8
    allowed[-1] = True
    cost = 1 + torch.rand(shape.nodes, rows, generator=generator, dtype=torch.float64)
    return Problem(shape, errors, allowed | all_allowed, cost)


def spent(p: Problem, choice) -> float:
    return float(p.cost[choice.granted].sum())


def test_merge_tree_joins_the_nearest_first():
    means = torch.tensor([[0.0], [10.0], [0.1], [10.3]])
    found = merge_tree(means, torch.tensor([5, 5, 5, 5]))
    assert found.children[0] == (0, 2) and set(found.children[1]) == {1, 3}
    assert found.members[-1].all() and found.members.sum(dim=1).tolist() == [1, 1, 1, 1, 2, 2, 4]


def test_an_expert_without_tokens_merges_first():
    found = merge_tree(torch.tensor([[0.0], [9.0], [0.5]]), torch.tensor([4, 0, 4]))
    assert 1 in found.children[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("price", [0.0, 0.05, 0.3, 2.0])
def test_choice_is_the_best_of_all_subsets(seed, price):
    p = problem(4, 1, seed)
    nodes = p.tree.nodes
    ancestors = [[n for n in range(nodes) if p.tree.members[n, e]] for e in range(4)]
    ancestors = [sorted(a, key=lambda n: int(p.tree.members[n].sum())) for a in ancestors]
    best = float("inf")
    for kept in itertools.product([False, True], repeat=nodes):
        if any(k and not a for k, a in zip(kept, p.allowed[:, 0].tolist(), strict=True)):
            continue
        used = [next((n for n in a if kept[n]), None) for a in ancestors]
        if None in used:
            continue
        total = sum(float(p.errors[n, e, 0]) for e, n in enumerate(used))
        total += price * sum(float(p.cost[n, 0]) for n in range(nodes) if kept[n])
        best = min(best, total)
    choice = choose_versions(p, price)
    value = float(p.errors[choice.use[:, 0], torch.arange(4), 0].sum()) + price * spent(p, choice)
    assert value == pytest.approx(best)
    assert set(choice.use[:, 0].tolist()) <= set(choice.granted[:, 0].nonzero().flatten().tolist())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_budget_is_met_within_one_percent_and_never_exceeded(share):
    p = problem(16, 400, all_allowed=True)
    low, high = float(p.cost[-1].sum()), spent(p, choose_versions(p, 0.0))
    budget = low + share * (high - low)
    (choice,) = allocate([p], budget)
    assert 0.99 * budget <= spent(p, choice) <= budget


def test_more_budget_never_hurts():
    p = problem(8, 100)
    low = float(p.cost[-1].sum())
    errors = []
    for budget in (low, 1.5 * low, 2 * low, 4 * low, 100 * low):
        (choice,) = allocate([p], budget)
        rows = torch.arange(100)
        errors.append(sum(float(p.errors[choice.use[e], e, rows].sum()) for e in range(8)))
    assert errors == sorted(errors, reverse=True)


def test_base_only_and_unlimited():
    p = problem(8, 50, all_allowed=True)
    # a version is best for the tokens it was solved for
    p.errors[torch.arange(8), torch.arange(8)] = 0
    # the smallest budget that is accepted stores the base versions alone
    p.cost[:-1] = 10.0
    (base,) = allocate([p], float(p.cost[-1].sum()))
    assert (base.use == p.tree.nodes - 1).all() and base.granted[-1].all()
    (full,) = allocate([p], 1e9)
    assert torch.equal(full.use, torch.arange(8)[:, None].expand(8, 50))


def test_versions_that_are_not_allowed_are_not_granted():
    p = problem(8, 200)
    (choice,) = allocate([p], 1e9)
    assert not (choice.granted & ~p.allowed).any()


def test_the_model_scope_spends_where_errors_are():
    small, large = problem(4, 50, 1, True), problem(4, 50, 2, True)
    large = large._replace(errors=100 * large.errors)
    budget = 2.2 * float(small.cost[-1].sum() + large.cost[-1].sum()) / 2
    choices = allocate([small, large], budget)
    assert spent(large, choices[1]) > spent(small, choices[0])
    assert spent(small, choices[0]) + spent(large, choices[1]) <= budget


def test_too_small_a_budget_names_the_least():
    p = problem(4, 10)
    with pytest.raises(WexpandError, match="below .* the size of the base versions"):
        allocate([p], float(p.cost[-1].sum()) * 0.9)


def test_storage_order_and_row_map():
    p = problem(4, 30)
    choice = choose_versions(p, 0.1)
    order, row_map = stored_versions(choice)
    assert len(order) == int(choice.granted.sum()) and row_map.dtype == torch.uint8
    # versions of a neuron lie together, in the order of neurons, and are numbered within it
    first = torch.cumsum(choice.granted.sum(dim=0), 0) - choice.granted.sum(dim=0)
    rows = torch.arange(30).expand(4, 30)
    assert torch.equal(order[first + row_map], choice.use * 30 + rows)
