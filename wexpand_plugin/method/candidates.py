"""From the statistics of an input group to the row pools of its linears.

Without a budget every expert gets its own version of every neuron (the paper's full expansion).
With one, versions are solved for every node of the experts' merge tree, their errors on the
calibration tokens follow in closed form, and `allocation` grants the versions that are worth their
bytes. Small clusters are helped by shrinkage: an expert's Hessian is mixed with that of all tokens,

    (1 - a) H_c + a H      with a = shrinkage * in / (n_c + shrinkage * in)

so that a cluster with many times `in` tokens is left alone and an empty one gets the base version.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WexpandError
from ..format.router import route
from ..format.rowpool import RowPool
from ..format.sizes import StoredBytes
from ..format.values import codec_of
from .allocation import Choice, Problem, Tree, allocate, merge_tree, stored_versions
from .neurons import neuron_scores
from .solvers.sparsegpt import MaskStructure, chunk_size, solve
from .statistics import GroupStatistics

__all__ = [
    "SCORES",
    "Candidates",
    "Settings",
    "allocate_model",
    "dense_bytes",
    "expand",
    "fixed_bytes",
    "propose",
    "score_values",
    "weigh",
]

SCORES = {
    # name: (errors of the neuron's own versions count, field of NeuronScores that weights a neuron)
    "gain": (True, None),
    "wasserstein": (False, "wd"),
    "gain_wasserstein": (True, "wd"),
    "kurtosis": (False, "kurtosis"),
    "gain_kurtosis": (True, "kurtosis"),
    "random": (False, "random"),
}


@dataclass(frozen=True)
class Settings:
    """How to expand; the recipe keys of the same names explain them."""

    sparsity: float
    structure: MaskStructure
    num_experts: int = 16
    size_budget: float | None = None
    budget_scope: str = "model"
    block_size: int = 128
    dampening_frac: float = 0.01
    shrinkage: float = 0.03
    score: str = "gain"
    share_versions: bool = True
    router_dims: int | None = None
    router_samples: int = 8192
    router_restarts: int = 3
    seed: int = 0
    max_bytes: int = 512 << 20

    def chunks(self, count: int, weight: Tensor) -> Iterator[slice]:
        """Hessians to solve at once, so that they and their solutions fit in `max_bytes`."""
        size = chunk_size(weight.shape[0], weight.shape[1], self.max_bytes)
        for first in range(0, count, size):
            yield slice(first, min(first + size, count))

    def solve(self, weight: Tensor, hessians: Tensor, linears: list[int]) -> Tensor:
        """[hessians, rows, in]"""
        return solve(
            weight, hessians, self.sparsity, self.structure, linears=linears,
            block_size=self.block_size, dampening=self.dampening_frac, max_bytes=self.max_bytes,
        )  # fmt: skip


@dataclass
class Candidates:
    """All versions that one linear could store, and what each would do."""

    pool: RowPool
    place: Tensor
    """[nodes * rows]: where in the pool version v of neuron r (at v * rows + r) is; -1: nowhere"""
    problem: Problem
    energy: float
    """sum of the squared dense outputs over the calibration tokens"""

    def select(self, choice: Choice) -> RowPool:
        """The pool that holds the granted versions only."""
        order, row_map = stored_versions(choice)
        rows = self.pool.rows(self.place[order].to(self.pool.values.device))
        return RowPool.pack(rows, row_map.to(rows.device))

    def full(self) -> RowPool:
        """Full expansion: each expert with the version that was solved for it alone."""
        nodes, experts, rows = self.problem.errors.shape
        granted = torch.zeros(nodes, rows, dtype=torch.bool)
        granted[:experts] = True
        own = torch.arange(experts).unsqueeze(1).expand(experts, rows)
        return self.select(Choice(own, granted))

    def shortlist(self, choices: list[Choice]) -> "Candidates":
        """The candidates reduced to those granted in any of `choices`, to be chosen from again."""
        granted = torch.stack([choice.granted for choice in choices]).any(dim=0)
        granted[-1] = True  # a base version may always be chosen, even if all experts left it here
        choice = Choice(choices[0].use, granted)
        order, _ = stored_versions(choice)
        place = torch.full_like(self.place, -1)
        place[order] = torch.arange(len(order))
        allowed = self.problem.allowed & granted
        problem = self.problem._replace(allowed=allowed)
        return Candidates(self.select(choice).to("cpu"), place, problem, self.energy)


def dense_bytes(weight: Tensor) -> int:
    """Bytes of a dense weight."""
    return weight.numel() * weight.element_size()


def fixed_bytes(out_features: int, in_features: int, experts: int) -> int:
    """Bytes that do not depend on the versions: row map and router."""
    return StoredBytes(codec_of(torch.bfloat16), torch.bfloat16).fixed(
        out_features, in_features, experts
    )


def _shrunk(sums: Tensor, tokens: Tensor, total: Tensor, shrinkage: float) -> Tensor:
    """Sums of x x^T [n, in, in] over `tokens` [n] rows each -> Hessians, mixed with `total`."""
    tokens = tokens.to(sums).view(-1, 1, 1)
    prior = shrinkage * sums.shape[1]
    share = torch.where(tokens > 0, prior / (tokens + prior).clamp(min=1e-9), 1.0)
    return torch.lerp(sums / tokens.clamp(min=1), total.expand_as(sums), share)


def expand(weights: list[Tensor], statistics: GroupStatistics, settings: Settings) -> list[RowPool]:
    """Full expansion: one pool per linear, every expert with its own version of every neuron."""
    linears = [len(w) for w in weights]
    total = statistics.total()
    weight = torch.cat(weights)
    if statistics.experts == 1:
        solved = settings.solve(weight, total.unsqueeze(0), linears)
    else:
        solved = weight.new_empty(statistics.experts, *weight.shape)
        for some in settings.chunks(statistics.experts, weight):
            hessians = _shrunk(
                statistics.sums[some], statistics.solved_tokens[some], total, settings.shrinkage
            )
            solved[some] = settings.solve(weight, hessians, linears)
    return [RowPool.pack_experts(part) for part in solved.split(linears, dim=1)]


def propose(
    weights: list[Tensor],
    biases: list[Tensor | None],
    statistics: GroupStatistics,
    rows: Tensor,
    settings: Settings,
) -> list[Candidates]:
    """Solve a version for every node of the merge tree, and weigh them.

    :param weights: the dense weights [out_i, in] of the group's linears
    :param rows: sample of the group's inputs [n, in], for scores that look at the outputs
    """
    linears = [len(w) for w in weights]
    weight = torch.cat(weights)
    tree = _tree(statistics, settings)
    solved, errors, allowed = _solve_tree(weight, linears, tree, statistics, settings)
    energies = _quadratic(weight.float(), statistics.sums)
    proposals = []
    for i, (versions, error, may, energy) in enumerate(
        zip(
            solved.split(linears, dim=1),
            errors.split(linears, dim=2),
            allowed.split(linears, dim=1),
            energies.split(linears, dim=1),
            strict=True,
        )  # fmt: skip
    ):
        place = torch.arange(versions.shape[0] * versions.shape[1])
        pool = RowPool.pack(versions.flatten(0, 1))
        cost = pool.row_bytes()
        values = score_values(settings.score, rows, weights[i], biases[i], settings.seed)
        weighted = weigh(error, settings.score, values)
        problem = Problem(tree, weighted.cpu(), may.cpu(), cost.view(len(versions), -1).cpu())
        proposals.append(Candidates(pool, place, problem, float(energy.sum())))
    return proposals


def _tree(statistics: GroupStatistics, settings: Settings) -> Tree:
    if settings.share_versions:
        return merge_tree(statistics.mean_inputs().cpu(), statistics.solved_tokens)
    # a root over all leaves, no nodes between: an expert has its own version or the base version
    experts = statistics.experts
    everyone = torch.ones(1, experts, dtype=torch.bool)
    members = torch.cat([torch.eye(experts, dtype=torch.bool), everyone])
    return Tree([tuple(range(experts))], members)


def _solve_tree(
    weight: Tensor,
    linears: list[int],
    tree: Tree,
    statistics: GroupStatistics,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Versions [nodes, rows, in], errors [nodes, experts, rows], allowed [nodes, rows]."""
    rows, width = weight.shape
    device = statistics.sums.device
    total, tokens = statistics.total(), statistics.solved_tokens
    members = tree.members.to(device)
    solved = weight.new_empty(tree.nodes, rows, width)
    errors = torch.zeros(tree.nodes, tree.experts, rows, device=device)
    held = _held_errors(weight, statistics)
    held_error = torch.zeros_like(errors)
    for some in settings.chunks(tree.nodes, weight):
        below = members[some].float()
        sums = torch.einsum("ne,eij->nij", below, statistics.sums)
        hessians = _shrunk(sums, below.cpu() @ tokens.float(), total, settings.shrinkage)
        if some.stop == tree.nodes:
            hessians[-1] = total
        solved[some] = settings.solve(weight, hessians, linears)
        for node in range(some.start, some.stop):
            change = (solved[node] - weight).float()
            for expert in tree.members[node].nonzero().flatten().tolist():
                errors[node, expert] = _quadratic(change, statistics.sums[expert : expert + 1])[0]
                held_error[node, expert] = held(change, expert)
    # a node's version is worth granting only if it helps on the rows that it was not solved for
    base = held_error[-1]
    gain = torch.einsum("ne,ner->nr", members.float(), base.unsqueeze(0) - held_error)
    allowed = gain > 0
    allowed[-1] = True
    return solved, errors, allowed


def _quadratic(rows: Tensor, sums: Tensor) -> Tensor:
    """r^T S_c r for every row: [rows, in], [experts, in, in] -> [experts, rows]."""
    return torch.stack([((rows @ s) * rows).sum(dim=1) for s in sums]).clamp_(min=0)


def _held_errors(weight: Tensor, statistics: GroupStatistics) -> Callable[[Tensor, int], Tensor]:
    """(change [rows, in], expert) -> its squared output error on the expert's held-back rows."""
    held = statistics.held.rows.to(weight.device)
    if not held.numel():
        raise WexpandError(
            "size_budget: no calibration rows could be held back; use sequences of 8 or more tokens"
        )
    assert statistics.router is not None
    experts = route(held, *statistics.router)

    def error(change: Tensor, expert: int) -> Tensor:
        return (held[experts == expert] @ change.t()).square().sum(dim=0)

    return error


def score_values(
    score: str, rows: Tensor, weight: Tensor, bias: Tensor | None, seed: int
) -> Tensor | None:
    """What `score` says of each neuron of a linear [out]; None if it looks at errors only.

    :param rows: sample of the linear's inputs [n, in]
    """
    field = SCORES[score][1]
    if field is None:
        return None
    if field == "random":
        return torch.rand(len(weight), generator=torch.Generator().manual_seed(seed))
    return getattr(neuron_scores(rows, weight, bias, seed=seed), field)


def weigh(errors: Tensor, score: str, values: Tensor | None) -> Tensor:
    """Errors [nodes, experts, rows] as `score` sees them, given its `score_values`."""
    if not SCORES[score][0]:
        errors = errors.mean(dim=2, keepdim=True).expand_as(errors)
    if values is None:
        return errors
    values = values.float().clamp(min=0)
    return errors * (values / values.mean().clamp(min=1e-12)).to(errors.device)


def allocate_model(
    candidates: Sequence[Candidates], reach: Sequence[float], budget: float
) -> list[Choice]:
    """Allocate `budget` bytes of row versions over several linears.

    Linears become comparable by the energy of their outputs, which divides their errors, and by how
    far an error spreads: one made in an early block changes the input of every later block.

    :param reach: for each linear, the share of the model's blocks from its own to the last
    """
    problems = [
        c.problem._replace(errors=c.problem.errors * (share / c.energy))
        for c, share in zip(candidates, reach, strict=True)
    ]
    return allocate(problems, budget)
