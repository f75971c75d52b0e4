"""Granting row versions: against exhaustive search, and at the edges."""

import itertools

import pytest
import torch

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.allocation import (
    ALLOCATE_BY,
    AllocationProblem,
    allocate,
    choose_versions,
    neuron_values,
    numbered_versions,
    weighted,
)
from wexpand_plugin.method.merge_tree import MergeTree, merge_tree


def tree(experts: int, seed: int = 0) -> MergeTree:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(experts, 5, generator=generator)
    return merge_tree(means, torch.randint(1, 100, (experts,), generator=generator))


def problem(experts: int, rows: int, seed: int = 0, all_allowed: bool = False) -> AllocationProblem:
    generator = torch.Generator().manual_seed(seed)
    shape = tree(experts, seed)
    errors = torch.rand(shape.nodes, experts, rows, generator=generator, dtype=torch.float64)
    allowed = torch.rand(shape.nodes, rows, generator=generator) < 0.8
    allowed[-1] = True
    cost = 1 + torch.rand(shape.nodes, rows, generator=generator, dtype=torch.float64)
    return AllocationProblem(shape, errors, allowed | all_allowed, cost)


def spent(p: AllocationProblem, choice) -> float:
    return float(p.cost[choice.granted].sum())


def read(p: AllocationProblem, choice) -> float:
    """By a token, on average."""
    return float(p.cost.gather(0, choice.use).sum(dim=1) @ p.share)


SHARE = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("price", [0.0, 0.05, 0.3, 2.0])
@pytest.mark.parametrize("price_read", [0.0, 0.5])
def test_choice_is_the_best_of_all_subsets(seed, price, price_read):
    p = problem(4, 1, seed)._replace(share=SHARE)
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
        total += price_read * sum(float(p.cost[n, 0] * SHARE[e]) for e, n in enumerate(used))
        total += price * sum(float(p.cost[n, 0]) for n in range(nodes) if kept[n])
        best = min(best, total)
    choice = choose_versions(p, price, price_read)
    value = float(p.errors[choice.use[:, 0], torch.arange(4), 0].sum()) + price * spent(p, choice)
    value += price_read * read(p, choice)
    assert value == pytest.approx(best)
    assert set(choice.use[:, 0].tolist()) <= set(choice.granted[:, 0].nonzero().flatten().tolist())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_budget_is_met_within_one_percent_and_never_exceeded(share):
    p = problem(16, 400, all_allowed=True)
    low, high = float(p.cost[-1].sum()), spent(p, choose_versions(p, 0.0))
    budget = low + share * (high - low)
    (choice,) = allocate([p], budget)
    assert 0.99 * budget <= spent(p, choice) <= budget


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_two_budgets_are_met(part):
    """Long versions are good ones; what a token reads is bounded apart from what is stored."""
    p = problem(4, 300, all_allowed=True)._replace(share=SHARE)
    p.errors[:] = p.errors / p.cost.unsqueeze(1)
    p.cost[-1] = 1
    budget = 2.0 * 300
    (free,) = allocate([p], budget)
    assert 0.99 * budget <= spent(p, free) <= budget
    limit = 300 + part * (read(p, free) - 300)
    (bound,) = allocate([p], budget, limit)
    assert spent(p, bound) <= budget and 0.98 * limit <= read(p, bound) <= limit
    rows = torch.arange(300)
    lost = [sum(float(p.errors[c.use[e], e, rows].sum()) for e in range(4)) for c in (free, bound)]
    assert lost[0] < lost[1] < float(p.errors[-1].sum())
    with pytest.raises(WexpandError, match="read_budget: 299 bytes .* below about 300, the least"):
        allocate([p], budget, 299)


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


def test_versions_are_numbered_within_their_neuron():
    p = problem(4, 30)
    use = choose_versions(p, 0.1).use
    (node, neuron), row_map = numbered_versions(use)
    assert row_map.dtype == torch.uint8 and row_map.shape == (4, 30)
    assert neuron.tolist() == sorted(neuron.tolist()), "versions of a neuron lie together"
    for r in range(30):
        own = node[neuron == r]
        assert set(own.tolist()) == set(use[:, r].tolist()) and len(own) == len(own.unique())
        assert torch.equal(own[row_map[:, r].long()], use[:, r])


def test_256_experts_fit_a_byte():
    use = torch.arange(256).unsqueeze(1).expand(256, 3)
    versions, row_map = numbered_versions(use)
    assert versions.shape == (2, 768) and torch.equal(row_map.long(), use)


@pytest.mark.parametrize("rule", ALLOCATE_BY)
def test_rules_weight_neurons_and_keep_the_scale(rule):
    generator = torch.Generator().manual_seed(5)
    errors = torch.rand(7, 4, 12, generator=generator)
    rows, weight = torch.randn(256, 20, generator=generator), torch.randn(12, 20)
    values = neuron_values(rule, rows, weight, None, seed=0)
    seen = weighted(errors, rule, values)
    if rule == "gain":
        assert values is None and torch.equal(seen, errors)
        return
    assert values is not None and values.shape == (12,)
    share = values.float().clamp(min=0) / values.float().clamp(min=0).mean()
    plain = errors if ALLOCATE_BY[rule][0] else errors.mean(dim=2, keepdim=True)
    torch.testing.assert_close(seen, plain * share)
