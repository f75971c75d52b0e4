"""The tree of experts: who is merged first, and against scipy where both can say."""

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
