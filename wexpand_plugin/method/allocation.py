"""Which (neuron, expert) pairs get weights of their own, for a given number of bytes.

Full expansion stores experts x neurons row versions; most of them gain little over the version the
neuron already has. The experts of a group are merged, two by two and nearest first, into a binary
tree: leaves are the experts, the root stands for all tokens. Every tree node can offer each neuron
one row version, solved for the tokens of the experts below it: the root's is the base version
(plain SparseGPT), a leaf's is the expert's own (full expansion), the ones between serve several
similar experts at once. An expert uses the version of its nearest ancestor that was granted one.

With err[v, c, r] = n_c dw_v^T H_c dw_v the squared output error that version v causes on the tokens
of expert c, and a price per byte, the best set of versions of a neuron follows from dynamic
programming over the tree (each node either inherits or pays for its own version), exactly and for
all neurons at once. The price is then bisected until the stored bytes meet the budget. Price 0 is
full expansion, an infinite price leaves the base version only.

Neurons may be weighted: errors are multiplied by a weight [experts, rows] before prices are
applied.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WexpandError

__all__ = [
    "Choice",
    "Problem",
    "Tree",
    "allocate",
    "choose_versions",
    "merge_tree",
    "stored_versions",
]


class Tree(NamedTuple):
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


def merge_tree(means: Tensor, tokens: Tensor) -> Tree:
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
    return Tree(children, torch.stack(members))


class Problem(NamedTuple):
    """One linear's versions to choose from."""

    tree: Tree
    errors: Tensor
    """[nodes, experts, rows]; only entries of an expert below the node are read"""
    allowed: Tensor
    """bool [nodes, rows]: versions that may be granted (the root's always may)"""
    cost: Tensor
    """bytes of each version [nodes, rows]"""


class Choice(NamedTuple):
    """What was granted to the neurons of one linear."""

    use: Tensor
    """int64 [experts, rows]: the node whose version each (expert, neuron) uses"""
    granted: Tensor
    """bool [nodes, rows]: the versions to store"""


def choose_versions(problem: Problem, price: float) -> Choice:
    """The choice with the smallest error + price * bytes, for each neuron (see the module)."""
    tree, errors, allowed, cost = problem
    root, none, rows = tree.nodes - 1, tree.nodes, errors.shape[2]
    memo: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    blocked = torch.full((rows,), torch.inf, dtype=errors.dtype, device=errors.device)

    def best(node: int, above: int) -> Tensor:
        """Error + price of the subtree, given the nearest granted node above (or `none`)."""
        if (node, above) in memo:
            return memo[node, above][0]
        if node < tree.experts:
            own = errors[node, node]
            inherit = blocked if above == none else errors[above, node]
        else:
            below = tree.children[node - tree.experts]
            own = torch.stack([best(child, node) for child in below]).sum(dim=0)
            inherit = torch.stack([best(child, above) for child in below]).sum(dim=0)
        own = own + price * cost[node]
        if node != root:
            own = torch.where(allowed[node], own, torch.inf)
        take = own < inherit
        memo[node, above] = torch.where(take, own, inherit), take
        return memo[node, above][0]

    best(root, none)
    use = torch.empty(tree.experts, rows, dtype=torch.int64, device=errors.device)
    granted = torch.zeros(tree.nodes, rows, dtype=torch.bool, device=errors.device)

    def descend(node: int, above: Tensor) -> None:
        """`above` [rows]: nearest granted node over `node`, which differs from row to row."""
        for a in above.unique().tolist():
            granted[node] |= (above == a) & memo[node, a][1]
        here = torch.where(granted[node], node, above)
        if node < tree.experts:
            use[node] = here
        else:
            for child in tree.children[node - tree.experts]:
                descend(child, here)

    descend(root, torch.full((rows,), none, device=errors.device))
    memo.clear()
    return Choice(use, granted)


def allocate(problems: Sequence[Problem], budget: float) -> list[Choice]:
    """Bisect the price until the granted versions of all problems fill `budget` bytes, never more.

    The errors of the problems must be comparable: with several linears, divide each one's by the
    energy of its outputs.

    :raises WexpandError: the base versions alone are larger than the budget
    """
    smallest = sum(float(p.cost[-1].sum()) for p in problems)
    if smallest > budget:
        raise WexpandError(
            f"size_budget: {budget:.0f} bytes for row versions is below {smallest:.0f}, "
            "the size of the base versions alone"
        )

    def spend(price: float) -> tuple[list[Choice], float]:
        choices = [choose_versions(p, price) for p in problems]
        bytes_ = sum(float(p.cost[c.granted].sum()) for p, c in zip(problems, choices, strict=True))
        return choices, bytes_

    choices, spent = spend(0.0)
    if spent <= budget:
        return choices
    # the price at which the first and the last version are bought lie many decades apart
    low, high = 0.0, sum(float(p.errors[-1].sum()) for p in problems) / budget
    while (result := spend(high))[1] > budget:
        low, high = high, 16 * max(high, 1e-30)
    choices, spent = result
    for _ in range(60):
        if spent >= 0.9995 * budget:
            break
        middle = (low * high) ** 0.5 if low else high / 64
        result = spend(middle)
        if result[1] <= budget:
            high, (choices, spent) = middle, result
        else:
            low = middle
    return choices


def stored_versions(choice: Choice) -> tuple[Tensor, Tensor]:
    """Number the granted versions neuron by neuron: flat index [versions], row map [experts, rows].

    :return: positions into a [nodes * rows] stack of candidate rows, in storage order, and the
        uint8 row map of numbers within each neuron
    """
    use, granted = choice
    rows = granted.shape[1]
    by_row = granted.t().flatten()
    order = by_row.nonzero().squeeze(1)
    node, row = order % granted.shape[0], order // granted.shape[0]
    number = torch.cumsum(granted, dim=0) - 1
    return node * rows + row, number.gather(0, use).to(torch.uint8)
