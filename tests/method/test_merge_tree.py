"""The tree of experts: who is merged first, and against scipy where both can say."""

import itertools

import torch
from scipy.cluster.hierarchy import linkage

from wexpand_plugin.method.merge_tree import flat_tree, merge_tree


def test_merge_tree_joins_the_nearest_first():
    means = torch.tensor([[0.0], [10.0], [0.1], [10.3]])
    found = merge_tree(means, torch.tensor([5, 5, 5, 5]))
    assert found.children[0] == (0, 2) and set(found.children[1]) == {1, 3}
    assert found.members[-1].all() and found.members.sum(dim=1).tolist() == [1, 1, 1, 1, 2, 2, 4]


def test_an_expert_without_tokens_merges_first():
    found = merge_tree(torch.tensor([[0.0], [9.0], [0.5]]), torch.tensor([4, 0, 4]))
    assert 1 in found.children[0]


def test_equal_tokens_merge_as_scipys_ward_linkage():
    means = torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
    found = merge_tree(means, torch.full((12,), 7))
    expected = linkage(means.double().numpy(), "ward")[:, :2].astype(int)
    assert [set(pair) for pair in found.children] == [set(pair) for pair in expected.tolist()]


def test_a_flat_tree_shares_the_root_only():
    found = flat_tree(3)
    assert found.children == [(0, 1, 2)] and (found.experts, found.nodes) == (3, 4)
    assert found.members.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]


def test_leaves_of_any_size_merge_as_the_rule_says():
    """Each union of least cost, computed anew from the leaves."""
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(20, 4, generator=generator).double()
    tokens = torch.randint(0, 90, (20,), generator=generator)
    tokens[[4, 11]] = 0

    def spread(members: torch.Tensor) -> float:
        n = tokens[members].double().unsqueeze(1)
        centre = (n * means[members]).sum(dim=0) / n.sum().clamp(min=1)
        return float((n * (means[members] - centre).square()).sum())

    found = merge_tree(means, tokens)
    alive = list(range(20))
    for new, (a, b) in enumerate(found.children, 20):

        def cost(i: int, j: int) -> float:
            members = found.members
            return spread(members[i] | members[j]) - spread(members[i]) - spread(members[j])

        least = min(cost(i, j) for i, j in itertools.combinations(alive, 2))
        assert cost(a, b) <= least + 1e-9
        assert torch.equal(found.members[new], found.members[a] | found.members[b])
        alive = [n for n in alive if n not in (a, b)] + [new]
    assert tokens.tolist().count(0) == 2 and len(alive) == 1


def test_cut_into_sets():
    means = torch.tensor([[10.0], [0.0], [10.3], [0.1], [50.0]])
    tree = merge_tree(means, torch.ones(5))
    assert tree.cut(5).tolist() == [0, 1, 2, 3, 4] and tree.cut(1).tolist() == [0] * 5
    assert tree.cut(3).tolist() == [0, 1, 0, 1, 2] and tree.cut(2).tolist() == [0, 0, 0, 0, 1]
    many = merge_tree(torch.randn(300, 6), torch.randint(0, 50, (300,))).cut(16)
    assert many.dtype == torch.uint8 and many.unique().tolist() == list(range(16))


def test_a_child_with_most_of_the_tokens_is_left_out():
    means = torch.tensor([[0.0], [1.0], [30.0], [90.0]])
    tokens = torch.tensor([100, 4, 2, 80])
    whole = merge_tree(means, tokens)
    assert whole.children == [(0, 1), (2, 4), (3, 5)]
    thin = whole.thinned(tokens, 0.7)
    # 106 of 186 tokens are too few to be like the root's, 104 of 106 are not
    assert thin.children == [(2, 0, 1), (3, 4)]
    assert thin.members[4:].tolist() == [[True, True, True, False], [True] * 4]
    assert whole.thinned(tokens, 1.0).children == whole.children
    assert whole.thinned(tokens, 0.5).children == [(3, 2, 0, 1)]
