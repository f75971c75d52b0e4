"""The tree in which similar experts are merged, two by two and nearest first.

Leaves are the experts, the root stands for all tokens. A version of a neuron that is solved for a
node serves the experts below it (`allocation`). Where there are more clusters than experts, the
tree of the clusters, cut, says which clusters are an expert. Which pair is nearest is Ward's rule
with each leaf counted by its tokens. Not scipy's `linkage`, nor scikit-learn's: both take every
leaf for one observation and know no weights, and experts differ in tokens a hundredfold.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MergeTree", "flat_tree", "merge_tree"]

SAME = 0.5
"""share of a node's tokens that a child has which is left out as too much like it"""


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

    def cut(self, sets: int) -> Tensor:
        """The leaves in so many sets, as they are before the last sets - 1 merges of two.

        :return: the number of each leaf's set, uint8 [leaves]; sets are numbered by their first
            leaves
        """
        merges = self.children[: self.experts - sets]
        merged = {child for pair in merges for child in pair}
        roots = [n for n in range(self.experts + len(merges)) if n not in merged]
        members = self.members[roots]
        order = members.int().argmax(dim=1).argsort()
        return members[order].int().argmax(dim=0).to(torch.uint8)

    def thinned(self, tokens: Tensor, same: float = SAME) -> "MergeTree":
        """Without inner nodes that have more than `same` of the tokens of the node above them.

        What is solved for such a node is nearly what is solved for the one above. Their children
        are moved up. Where one leaf has most tokens, the tree is a chain, and this much shorter.

        :param tokens: of each leaf [leaves]
        """
        own = self.members.double() @ tokens.double().cpu()
        kept = self.nodes - 1
        below: dict[int, tuple[int, ...]] = {}
        waiting = [kept]
        while waiting:
            node = waiting.pop()
            found, open_ = [], list(self.children[node - self.experts])
            while open_:
                child = open_.pop(0)
                if child >= self.experts and own[child] > same * own[node]:
                    open_ = [*self.children[child - self.experts], *open_]
                else:
                    found.append(child)
            below[node] = tuple(found)
            waiting += [child for child in found if child >= self.experts]
        nodes = [*range(self.experts), *sorted(below)]
        number = {node: place for place, node in enumerate(nodes)}
        children = [tuple(number[c] for c in below[n]) for n in sorted(below)]
        return MergeTree(children, self.members[nodes])


def merge_tree(means: Tensor, tokens: Tensor) -> MergeTree:
    """Merge leaves by Ward's rule: the pair whose union adds least to the spread of the inputs.

    Of equal pairs, the one whose nodes come first.

    :param means: mean input of each leaf [leaves, in]
    :param tokens: tokens of each leaf [leaves]; a leaf without tokens merges first
    """
    leaves = len(means)
    sizes, centres = tokens.double().cpu().clone(), means.double().cpu()
    both = sizes.unsqueeze(1) + sizes
    costs = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
    costs *= sizes.unsqueeze(1) * sizes / both.clamp(min=1)
    costs.fill_diagonal_(torch.inf)
    nearest = costs.amin(dim=1)
    # a node lies in a slot, the one made of two others in the slot of the first
    node = torch.arange(leaves)
    members = torch.zeros(2 * leaves - 1, leaves, dtype=torch.bool)
    members[:leaves].fill_diagonal_(True)
    children: list[tuple[int, ...]] = []
    for new in range(leaves, 2 * leaves - 1):
        rows = (nearest == nearest.min()).nonzero().squeeze(1)
        row, column = (costs[rows] == nearest.min()).nonzero(as_tuple=True)
        pairs = torch.stack((node[rows[row]], node[column]), dim=1).tolist()
        first, second = min((min(pair), max(pair)) for pair in pairs)
        a, b = (int((node == number).nonzero()) for number in (first, second))
        children.append((first, second))
        members[new] = members[first] | members[second]
        # what a merge with the new node would cost (Lance and Williams' formula for Ward's rule)
        three = (sizes + sizes[a] + sizes[b]).clamp(min=1)
        cost = (sizes + sizes[a]) * costs[a] + (sizes + sizes[b]) * costs[b]
        cost = (cost - sizes * costs[a, b]) / three
        cost[[a, b]] = torch.inf
        cost = torch.where(node < 0, torch.inf, cost)
        stale = (costs[:, a] == nearest) | (costs[:, b] == nearest)
        costs[a], costs[:, a], costs[b], costs[:, b] = cost, cost, torch.inf, torch.inf
        node[a], node[b] = new, -1
        sizes[a] += sizes[b]
        nearest = torch.minimum(nearest, cost)
        nearest[b], stale[a] = torch.inf, True
        stale &= node >= 0
        nearest[stale] = costs[stale].amin(dim=1)
    return MergeTree(children, members)


def flat_tree(experts: int) -> MergeTree:
    """A root over all leaves and no nodes between: nothing is shared but the root's versions."""
    members = torch.cat([torch.eye(experts), torch.ones(1, experts)]).bool()
    return MergeTree([tuple(range(experts))], members)
