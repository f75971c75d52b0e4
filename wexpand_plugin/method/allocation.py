"""Which (neuron, expert) pairs get weights of their own, for a given number of bytes.

Full expansion stores experts x neurons row versions; most of them gain little over the version the
neuron already has. The experts of a group are merged into a binary tree (`merge_tree`), every node
of which can offer each neuron one row version, solved for the tokens of the experts below it: the
root's is the base version (plain SparseGPT), a leaf's is the expert's own (full expansion), the
ones between serve several similar experts at once. An expert uses the version of its nearest
ancestor that was granted one.

With err[v, c, r] = n_c dw_v^T H_c dw_v the squared output error that version v causes on the tokens
of expert c, and a price per byte, the best set of versions of a neuron follows from dynamic
programming over the tree (each node either inherits or pays for its own version), exactly and for
all neurons at once. The price is then bisected until the stored bytes meet the budget. Price 0 is
full expansion, an infinite price leaves the base version only. A token reads one version of each
neuron, whichever it is: where versions differ in length that has a price of its own (`prices`).

What counts as an error is a choice too (`ALLOCATE_BY`): neurons may be weighted by what their
outputs look like, and their own errors may be left out of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WexpandError
from .merge_tree import MergeTree
from .neurons import neuron_scores
from .prices import Prices, best_in_budgets

__all__ = [
    "ALLOCATE_BY",
    "Allocation",
    "AllocationProblem",
    "allocate",
    "choose_versions",
    "neuron_values",
    "numbered_versions",
    "weighted",
]

ALLOCATE_BY = {
    # name: (errors of the neuron's own versions count, field of NeuronScores that weights a neuron)
    "gain": (True, None),
    "wasserstein": (False, "wd"),
    "gain_wasserstein": (True, "wd"),
    "kurtosis": (False, "kurtosis"),
    "gain_kurtosis": (True, "kurtosis"),
    "random": (False, "random"),
}


class AllocationProblem(NamedTuple):
    """One linear's versions to choose from."""

    tree: MergeTree
    errors: Tensor
    """[nodes, experts, rows]; only entries of an expert below the node are read"""
    allowed: Tensor
    """bool [nodes, rows]: versions that may be granted (the root's always may)"""
    cost: Tensor
    """bytes of each version [nodes, rows]"""
    share: Tensor | None = None
    """share of the tokens that each expert has [experts]; None: the same"""


class Allocation(NamedTuple):
    """What was granted to the neurons of one linear."""

    use: Tensor
    """int64 [experts, rows]: the node whose version each (expert, neuron) uses"""
    granted: Tensor
    """bool [nodes, rows]: the versions to store"""


class _Paths:
    """A problem as the dynamic programming reads it, whatever the price.

    A node's path is what may lie nearest above it and be granted: nothing, the root, the root's
    child, and so on down to its parent. So the path of a child is its parent's and the parent.
    """

    def __init__(self, problem: AllocationProblem):
        tree, errors, allowed, cost, _ = self.problem = problem
        root = tree.nodes - 1
        self.above: list[list[int]] = [[] for _ in range(tree.nodes)]
        for node in range(root, tree.experts - 1, -1):
            for child in tree.children[node - tree.experts]:
                self.above[child] = [*self.above[node], node]
        blocked = torch.full_like(errors[0, :1], torch.inf)
        self.inherited = [
            torch.cat([blocked, errors[above, leaf]])
            for leaf, above in enumerate(self.above[: tree.experts])
        ]
        self.share = _shares(problem).to(errors)
        self.refused = torch.where(allowed, 0.0, torch.inf).to(errors)
        self.refused[root] = 0

    def choose(self, price: float, price_read: float = 0.0) -> Allocation:
        """See `choose_versions`."""
        tree, errors, _, cost, _ = self.problem
        bytes_ = price * cost + self.refused
        best: dict[int, Tensor] = {}
        take: list[Tensor] = []
        # error + price of the subtree of each node, for each place on its path [path, rows]
        for node in range(tree.nodes):
            if node < tree.experts:
                own, inherit = errors[node, node], self.inherited[node]
                if price_read:
                    reading = price_read * self.share[node] * cost[[*self.above[node], node]]
                    own = own + reading[-1]
                    inherit = torch.cat([inherit[:1], inherit[1:] + reading[:-1]])
            else:
                below = [best.pop(child) for child in tree.children[node - tree.experts]]
                both = below[0] + below[1] if len(below) == 2 else torch.stack(below).sum(dim=0)
                own, inherit = both[-1], both[:-1]
            own = own + bytes_[node]
            take.append(own < inherit)
            best[node] = torch.minimum(inherit, own)
        use = torch.empty(tree.experts, errors.shape[2], dtype=torch.int64, device=errors.device)
        granted = torch.zeros_like(self.refused, dtype=torch.bool)
        places = {tree.nodes - 1: torch.zeros_like(use[0])}
        for node in range(tree.nodes - 1, -1, -1):
            place = places.pop(node)
            granted[node] = take[node].gather(0, place.unsqueeze(0)).squeeze(0)
            place = torch.where(granted[node], len(self.above[node]) + 1, place)
            if node < tree.experts:
                path = torch.tensor([-1, *self.above[node], node], device=errors.device)
                use[node] = path[place]
            else:
                places |= dict.fromkeys(tree.children[node - tree.experts], place)
        return Allocation(use, granted)


def choose_versions(
    problem: AllocationProblem, price: float, price_read: float = 0.0
) -> Allocation:
    """The allocation with the smallest error + price * bytes, for each neuron (see the module).

    :param price_read: of a byte that a token reads
    """
    return _Paths(problem).choose(price, price_read)


class _Choices(NamedTuple):
    """Allocations of several problems, and what they come to."""

    each: list[Allocation]
    error: float
    stored: float
    read: float


def allocate(
    problems: Sequence[AllocationProblem],
    budget: float,
    read: float = float("inf"),
    fill: float = 0.9995,
) -> list[Allocation]:
    """Search the prices until the granted versions of all problems fill the budgets, never more.

    The errors of the problems must be comparable: with several linears, divide each one's by the
    energy of its outputs.

    :param budget: bytes of row versions that are stored
    :param read: bytes of row versions that a token reads, a mean over experts by their tokens
    :param fill: share of the budgets that is filled, if they can be filled so well
    :raises WexpandError: the base versions alone are larger than a budget
    """
    smallest = sum(float(p.cost[-1].sum()) for p in problems)
    if smallest > budget:
        raise WexpandError(
            f"size_budget: {budget:.0f} bytes for row versions is below {smallest:.0f}, "
            "the size of the base versions alone"
        )

    paths = [_Paths(p) for p in problems]

    def choose(prices: Prices) -> _Choices:
        each = [p.choose(*prices) for p in paths]
        error = stored = reading = 0.0
        for problem, choice in zip(problems, each, strict=True):
            use = choice.use.unsqueeze(0)
            error += float(problem.errors.gather(0, use).sum(dtype=torch.float64))
            stored += float(problem.cost[choice.granted].sum())
            rows = problem.cost.gather(0, choice.use).sum(dim=1, dtype=torch.float64)
            reading += float(rows @ _shares(problem))
        return _Choices(each, error, stored, reading)

    start = sum(float(p.errors[-1].sum()) for p in problems) / budget
    found = best_in_budgets(
        choose, lambda c: c[1:], budget, read, start=max(start, 1e-30), steps=20, full=fill
    )
    if found is None:
        least = sum(float(p.cost.min(dim=0).values.sum()) for p in problems)
        raise WexpandError(
            f"read_budget: {read:.0f} bytes for row versions is below about {least:.0f}, the least "
            "that a token reads of them"
        )
    return found[0].within.each


def _shares(problem: AllocationProblem) -> Tensor:
    """Share of the tokens that each expert has, float64 [experts]."""
    if problem.share is not None:
        return problem.share.to(problem.cost.device, torch.float64)
    experts = problem.tree.experts
    return torch.full((experts,), 1 / experts, dtype=torch.float64, device=problem.cost.device)


def numbered_versions(use: Tensor) -> tuple[Tensor, Tensor]:
    """Number the versions in use (`Allocation.use` [experts, rows]) neuron by neuron.

    :return: node and neuron of each version, int64 [2, versions], in storage order: those of a
        neuron lie together; and the row map, uint8 [experts, rows], the number of the version that
        an expert uses within its neuron
    """
    used = use.new_zeros(int(use.max()) + 1, use.shape[1], dtype=torch.bool)
    used.scatter_(0, use, True)
    number = used.cumsum(dim=0) - 1
    neuron, node = used.t().nonzero(as_tuple=True)
    return torch.stack((node, neuron)), number.gather(0, use).to(torch.uint8)


def neuron_values(
    allocate_by: str, rows: Tensor, weight: Tensor, bias: Tensor | None, seed: int
) -> Tensor | None:
    """What `allocate_by` says of each neuron of a linear [out]; None if it looks at errors only.

    :param rows: sample of the linear's inputs [n, in]
    """
    field = ALLOCATE_BY[allocate_by][1]
    if field is None:
        return None
    if field == "random":
        return torch.rand(len(weight), generator=torch.Generator().manual_seed(seed))
    return getattr(neuron_scores(rows, weight, bias, seed=seed), field)


def weighted(errors: Tensor, allocate_by: str, values: Tensor | None) -> Tensor:
    """Errors [nodes, experts, rows] as `allocate_by` sees them, given its `neuron_values`."""
    if not ALLOCATE_BY[allocate_by][0]:
        errors = errors.mean(dim=2, keepdim=True).expand_as(errors)
    if values is None:
        return errors
    values = values.float().clamp(min=0)
    return errors * (values / values.mean().clamp(min=1e-12)).to(errors.device)
