"""The tree in which similar experts are merged, two by two and nearest first.

Leaves are the experts, the root stands for all tokens. A version of a neuron that is solved for a
node serves the experts below it (`allocation`). Which pair is nearest is Ward's rule with each
expert counted by its tokens. Not scipy's `linkage`, nor scikit-learn's: both take every leaf for
one observation and know no weights, and experts differ in tokens a hundredfold.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MergeTree", "flat_tree", "merge_tree"]


class MergeTree(NamedTuple):
    """A tree over experts: nodes 0 to experts-1 are the leaves, the last node is the root."""

    children: list[tuple[int, ...]]
    """children of node experts + i"""
    members: Tensor
    """bool [nodes, experts]: which experts lie below each node (a leaf lies below itself)"""

    @property
    def experts(self) -> int:
        """Leaves of the tree."""
        return self.members.shape[1]

    @property
    def nodes(self) -> int:
        """Leaves, inner nodes and the root: 2 * experts - 1 in a binary tree."""
        return self.members.shape[0]


def merge_tree(means: Tensor, tokens: Tensor) -> MergeTree:
    """Merge experts by Ward's rule: the pair whose union adds least to the spread of the inputs.

    :param means: mean input of each expert [experts, in]
    :param tokens: tokens of each expert [experts]; an expert without tokens merges first
    """
    experts = means.shape[0]
    members = [torch.eye(experts, dtype=torch.bool)[e] for e in range(experts)]
    centres, sizes = list(means.double()), [float(n) for n in tokens]
    alive = list(range(experts))
    children: list[tuple[int, ...]] = []

    def cost(pair: tuple[int, int]) -> float:
        a, b = pair
        size = sizes[a] + sizes[b]
        apart = float((centres[a] - centres[b]).square().sum())
        return sizes[a] * sizes[b] / size * apart if size else 0.0

    while len(alive) > 1:
        a, b = min(itertools.combinations(alive, 2), key=cost)
        size = sizes[a] + sizes[b]
        share = sizes[a] / size if size else 0.5
        centres.append(share * centres[a] + (1 - share) * centres[b])
        sizes.append(size)
        members.append(members[a] | members[b])
        children.append((a, b))
        alive = [n for n in alive if n not in (a, b)] + [len(members) - 1]
    return MergeTree(children, torch.stack(members))


def flat_tree(experts: int) -> MergeTree:
    """A root over all leaves and no nodes between: nothing is shared but the root's versions."""
    members = torch.cat([torch.eye(experts), torch.ones(1, experts)]).bool()
    return MergeTree([tuple(range(experts))], members)
