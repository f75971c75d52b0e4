"""From the statistics of an input group to the row versions that its linears may store.

Without a budget every expert gets its own version of every neuron (the paper's full expansion).
With one, versions are solved for every node of the experts' merge tree, their errors on the
calibration tokens follow in closed form, and `allocation` grants the versions that are worth their
bytes. Small clusters are helped by shrinkage: an expert's Hessian is mixed with that of all tokens,

    (1 - a) H_c + a H      with a = shrinkage * in / (n_c + shrinkage * in)

so that a cluster with many times `in` tokens is left alone and an empty one gets the base version.
Several ranks solve different nodes, or, where there is one expert, different rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..errors import WexpandError
from . import ranks
from .allocation import (
    Allocation,
    AllocationProblem,
    allocate,
    numbered_versions,
    weighted,
)
from .biases import BiasProblem
from .merge_tree import MergeTree, flat_tree, merge_tree
from .settings import Settings
from .solvers.sparsegpt import chunk_size, solve
from .statistics import GroupStatistics, quadratic
from .versions import Rows, RowVersions, SolvedRows

__all__ = ["Candidates", "allocate_model", "full_expansion", "propose"]


@dataclass(frozen=True)
class Candidates:
    """The versions that one linear could store, and what each would do."""

    rows: Rows
    """of all linears of the input group, until there is a shortlist"""
    place: Tensor
    """int64 [nodes, out]: where in `rows` a node's version of a neuron is; -1: nowhere"""
    errors: Tensor
    """[nodes, experts, out]: squared output error of a node's version on an expert's tokens"""
    energy: float
    """sum of the squared dense outputs over the same tokens"""
    problem: AllocationProblem
    """the same choice as `allocate_by` sees it"""
    biases: BiasProblem | None = None
    """where clusters have biases: those of whatever is chosen; `errors` are what they leave"""

    def select(self, use: Tensor) -> RowVersions:
        """The versions in `use` (`Allocation.use`: a node for each expert and neuron)."""
        version, row_map = numbered_versions(use)
        change = float(self.errors.gather(0, use.unsqueeze(0)).sum(dtype=torch.float64))
        versions = RowVersions(self.rows[self.place[tuple(version)]], row_map, 0.0)
        if self.biases is not None:
            shrunk = self.biases.shrunk(versions.dense())
            change += shrunk.lost
            versions = versions._replace(cluster_bias=shrunk.bias)
        return versions._replace(error=(change / max(self.energy, 1e-12)) ** 0.5)

    def full(self) -> RowVersions:
        """Full expansion: each expert with the version that was solved for it alone."""
        experts, out_features = self.errors.shape[1:]
        return self.select(torch.arange(experts).unsqueeze(1).expand(experts, out_features))

    def base(self) -> RowVersions:
        """The base versions alone: plain SparseGPT, whatever the expert."""
        nodes, experts, out_features = self.errors.shape
        return self.select(torch.full((experts, out_features), nodes - 1))

    def shortlist(
        self, allocations: Sequence[Allocation], keep: Callable[[SolvedRows], Rows]
    ) -> "Candidates":
        """Reduced to what is granted in any of `allocations`, and packed by `keep`."""
        granted = torch.stack([allocation.granted for allocation in allocations]).any(dim=0)
        granted[-1] = True  # a base version may always be chosen, even if all experts left it here
        place = torch.full_like(self.place, -1)
        place[granted] = torch.arange(int(granted.sum()))
        rows = keep(self.rows[self.place[granted]])
        problem = self.problem._replace(allowed=self.problem.allowed & granted)
        return replace(self, rows=rows, place=place, problem=problem)


def full_expansion(
    weights: list[Tensor], statistics: GroupStatistics, settings: Settings
) -> list[SolvedRows]:
    """A sparse weight for each expert of each linear: [experts, out_i, in] for weights [out_i, in].

    One expert is plain SparseGPT: the Hessian of all tokens.
    """
    linears = [len(w) for w in weights]
    total = statistics.total()
    weight = torch.cat(weights)
    tokens = statistics.of_experts(statistics.solved_tokens)

    def of_rows(part: slice) -> tuple[Tensor | None, ...]:
        found = _solve(weight[part], total.clone()[None], _within(part, linears), settings)
        return found.weights, found.scales

    def of_experts(some: slice) -> tuple[Tensor | None, ...]:
        hessians = _shrunk(statistics.sums[some], tokens[some], total, settings.shrinkage)
        found = _solve(weight, hessians, linears, settings)
        return found.weights, found.scales

    if statistics.experts == 1:
        works = [partial(of_rows, part) for part in _apart(linears, settings)]
    else:
        chunks = _chunks(statistics.experts, weight, settings)
        works = [partial(of_experts, some) for some in chunks]
    found = [SolvedRows(*part) for part in ranks.spread(works, weight.device)]
    solved = SolvedRows.join(found, dim=int(statistics.experts == 1))
    return [solved[:, part] for part in _parts(linears)]


def propose(
    weights: list[Tensor],
    values: Sequence[Tensor | None],
    statistics: GroupStatistics,
    settings: Settings,
) -> Iterator[Candidates]:
    """Solve a version for every node of the merge tree, and measure what each would do.

    One linear after another, so that the versions of one may be packed before the next's are laid
    out.

    :param weights: the dense weights [out_i, in] of the group's linears
    :param values: what `allocate_by` says of each one's neurons (`allocation.neuron_values`)
    """
    linears = [len(w) for w in weights]
    weight = torch.cat(weights)
    if settings.share_versions:
        tokens = statistics.of_experts(statistics.solved_tokens)
        means = statistics.expert_means()
        tree = ranks.of_first(partial(_thinned_tree, means, tokens))
    else:
        tree = flat_tree(statistics.experts)
    solved, errors, allowed = _solve_tree(weight, linears, tree, statistics, settings)
    energies = _energies(weight.float(), statistics)
    share = statistics.of_experts(statistics.tokens).double().cpu()
    share /= share.sum().clamp(min=1)
    known = statistics.cluster_means().to("cpu") if statistics.within else None
    # all linears' rows in one place, as those of each alone would be there twice
    rows_solved = solved.apply(lambda tensor: tensor.flatten(0, 1))
    places = torch.arange(tree.nodes * len(weight)).view(tree.nodes, -1)
    for own, value, part in zip(weights, values, _parts(linears), strict=True):
        error = errors[..., part]
        # node by node: of all of them at once, counting is half as fast
        kept = torch.stack([(node != 0).sum(dim=1) for node in solved.weights[:, part]])
        cost = settings.weighs.row(kept, weight.shape[1])
        problem = AllocationProblem(
            tree,
            weighted(error, settings.allocate_by, value).cpu(),
            allowed[:, part].cpu(),
            cost.cpu(),
            share,
        )
        energy = float(energies[part].sum())
        yield Candidates(
            rows_solved,
            places[:, part],
            error.cpu(),
            energy,
            problem,
            None if known is None else BiasProblem.of(own, known),
        )


def allocate_model(
    candidates: Iterable[Candidates],
    depth_weights: Iterable[float],
    budget: float,
    read: float = float("inf"),
) -> list[Allocation]:
    """Allocate `budget` bytes of row versions over several linears, of which a token reads `read`.

    Linears become comparable by the energy of their outputs, which divides their errors, and by how
    far an error spreads: one made in an early block changes the input of every later block.

    :param depth_weights: for each linear, the share of the model's blocks from its own to the last
    """
    problems = [
        c.problem._replace(errors=c.problem.errors * (depth / max(c.energy, 1e-12)))
        for c, depth in zip(candidates, depth_weights, strict=True)
    ]
    return allocate(problems, budget, read)


def _thinned_tree(means: Tensor, tokens: Tensor) -> MergeTree:
    return merge_tree(means, tokens).thinned(tokens)


def _shrunk(sums: Tensor, tokens: Tensor, total: Tensor, shrinkage: float) -> Tensor:
    """Sums of x x^T [n, in, in] over `tokens` [n] rows each -> Hessians, mixed with `total`."""
    tokens = tokens.to(sums).view(-1, 1, 1)
    prior = shrinkage * sums.shape[1]
    share = torch.where(tokens > 0, prior / (tokens + prior).clamp(min=1e-9), 1.0)
    return (sums * ((1 - share) / tokens.clamp(min=1))).addcmul_(share, total)


def _chunks(count: int, weight: Tensor, settings: Settings) -> Iterator[slice]:
    """As many of `count` Hessians at a time as the solver can take in `max_bytes`, and at least a
    few for each rank."""
    size = chunk_size(weight.shape[0], weight.shape[1], settings.max_bytes)
    size = min(size, -(-count // ranks.count()))
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _parts(linears: list[int]) -> Iterator[slice]:
    """The rows of each of several stacked linears."""
    first = 0
    for rows in linears:
        yield slice(first, first + rows)
        first += rows


def _apart(linears: list[int], settings: Settings) -> list[slice]:
    """The rows of stacked linears in parts that are solved apart: one for each rank, if possible.

    Without thresholds that rows of a linear share, any rows can be.
    """
    ends, parts = list(accumulate(linears)), ranks.count()
    cuts = [ends[-1] * (n + 1) // parts for n in range(parts)]
    if settings.structure.kind == "unstructured":
        cuts = [min((abs(end - cut), end) for end in ends)[1] for cut in cuts]
    return [slice(*both) for both in pairwise(sorted({0, *cuts}))]


def _within(part: slice, linears: list[int]) -> list[int]:
    """How many rows of each of several stacked linears lie in `part` of them, if any."""
    rows = (min(own.stop, part.stop) - max(own.start, part.start) for own in _parts(linears))
    return [count for count in rows if count > 0]


def _solve(weight: Tensor, hessians: Tensor, linears: list[int], settings: Settings) -> SolvedRows:
    """[hessians, rows, in]; what is in `hessians` is lost."""
    return solve(
        weight, hessians, settings.sparsity, settings.structure, linears=linears,
        block_size=settings.block_size, dampening=settings.dampening_frac, grid=settings.grid,
        overwrite=True,
    )  # fmt: skip


def _solve_tree(
    weight: Tensor,
    linears: list[int],
    tree: MergeTree,
    statistics: GroupStatistics,
    settings: Settings,
) -> tuple[SolvedRows, Tensor, Tensor]:
    """Versions [nodes, rows, in], errors [nodes, experts, rows], allowed [nodes, rows]."""
    rows = len(weight)
    device = statistics.sums.device
    total, tokens = statistics.total(), statistics.of_experts(statistics.solved_tokens)
    members = tree.members.to(device)
    rows_of = _held_out_rows(statistics)

    def of_nodes(some: slice) -> tuple[Tensor | None, ...]:
        below = members[some].float()
        sums = torch.einsum("ne,eij->nij", below, statistics.sums)
        hessians = _shrunk(sums, below.cpu() @ tokens.float(), total, settings.shrinkage)
        del sums
        if some.stop == tree.nodes:
            hessians[-1] = total
        solved = _solve(weight, hessians, linears, settings)
        del hessians
        errors = torch.zeros(len(below), tree.experts, rows, device=device)
        held_out = torch.zeros_like(errors)
        for place, own in enumerate(tree.members[some]):
            change = solved.weights[place].float() - weight.float()
            for expert in own.nonzero().flatten().tolist():
                errors[place, expert] = statistics.squares(change, expert)
                held_out[place, expert] = (rows_of[expert] @ change.t()).square().sum(dim=0)
        return errors, held_out, solved.weights, solved.scales

    works = [partial(of_nodes, some) for some in _chunks(tree.nodes, weight, settings)]
    found = ranks.spread(works, device)
    errors, held_out = (torch.cat([part[n] for part in found]) for n in range(2))
    parts = [SolvedRows(*part[2:]) for part in found]
    del found  # so that each part can go when it has been joined
    solved = SolvedRows.join(parts)
    # a node's version is worth granting only if it helps on the rows that it was not solved for
    gain = torch.einsum("ne,ner->nr", members.float(), held_out[-1].unsqueeze(0) - held_out)
    allowed = gain > 0
    allowed[-1] = True
    return solved, errors, allowed


def _energies(weight: Tensor, statistics: GroupStatistics) -> Tensor:
    """Sum of the squared outputs of each row [rows]."""
    energies = quadratic(weight, statistics.sums.sum(dim=0))
    if statistics.within:
        outputs = statistics.mean_inputs() @ weight.t()
        tokens = statistics.solved_tokens.to(outputs).unsqueeze(1)
        energies += (outputs.square() * tokens).sum(dim=0)
    return energies


def _held_out_rows(statistics: GroupStatistics) -> list[Tensor]:
    """The held-out rows of each expert [n, in], less what the biases of clusters see to."""
    held_out = statistics.held_out.rows.to(statistics.sums.device)
    if not held_out.numel():
        raise WexpandError(
            "size_budget: no calibration rows could be held out; use sequences of 16 or more tokens"
        )
    clusters = statistics.route(held_out)
    experts = statistics.cluster_expert.to(clusters.device)[clusters]
    if statistics.within:
        held_out = held_out - statistics.mean_inputs()[clusters]
    return [held_out[experts == expert] for expert in range(statistics.experts)]
