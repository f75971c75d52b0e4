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


def choose_versions(
    problem: AllocationProblem, price: float, price_read: float = 0.0
) -> Allocation:
    """The allocation with the smallest error + price * bytes, for each neuron (see the module).

    :param price_read: of a byte that a token reads
    """
    tree, errors, allowed, cost, _ = problem
    if price_read:
        share = _shares(problem).to(errors)
        errors = errors + price_read * share.view(1, -1, 1) * cost.to(errors).unsqueeze(1)
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
    return Allocation(use, granted)


class _Choices(NamedTuple):
    """Allocations of several problems, and what they come to."""

    each: list[Allocation]
    error: float
    stored: float
    read: float


def allocate(
    problems: Sequence[AllocationProblem], budget: float, read: float = float("inf")
) -> list[Allocation]:
    """Search the prices until the granted versions of all problems fill the budgets, never more.

    The errors of the problems must be comparable: with several linears, divide each one's by the
    energy of its outputs.

    :param budget: bytes of row versions that are stored
    :param read: bytes of row versions that a token reads, a mean over experts by their tokens
    :raises WexpandError: the base versions alone are larger than a budget
    """
    smallest = sum(float(p.cost[-1].sum()) for p in problems)
    if smallest > budget:
        raise WexpandError(
            f"size_budget: {budget:.0f} bytes for row versions is below {smallest:.0f}, "
            "the size of the base versions alone"
        )

    def choose(prices: Prices) -> _Choices:
        each = [choose_versions(p, *prices) for p in problems]
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
        choose, lambda c: c[1:], budget, read, start=max(start, 1e-30), steps=20, full=0.9995
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
