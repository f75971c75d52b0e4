"""Cluster biases: the identity that they rest on, and that they never hurt what was held out."""

import math

import pytest
import torch
from torch import Tensor

from wexpand_plugin.method.biases import SHRINKAGES, BiasProblem
from wexpand_plugin.method.clusters import Router, fit_router
from wexpand_plugin.method.statistics import GroupStatistics


def inputs(count: int = 60, width: int = 10, clusters: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(clusters, width, generator=generator, dtype=torch.float64) + 1
    which = torch.randint(clusters, (count, 64), generator=generator)
    return centres[which] + torch.randn(count, 64, width, generator=generator, dtype=torch.float64)


def statistics(
    rows: Tensor, clusters: int, experts: int, router: Router | None = None
) -> GroupStatistics:
    width = rows.shape[-1]
    if clusters > 1 and router is None:
        router = fit_router(rows.flatten(0, 1), clusters, restarts=1)
    found = GroupStatistics(
        width, router, cluster_expert=torch.arange(clusters) % experts, within=True,
        hold_out=True, dtype=torch.float64,
    )  # fmt: skip
    for batch in rows:
        found.add(batch)
    found.flush()
    return found


def split(rows: Tensor, found: GroupStatistics) -> tuple[Tensor, Tensor]:
    """The rows that were solved for, and those that were held out."""
    known = found.cluster_means()
    held = found.held_out.rows
    assert len(held) == int(known.held_out_tokens.sum())
    out = (rows.flatten(0, 1).unsqueeze(1) == held).all(dim=2).any(dim=1)
    return rows.flatten(0, 1)[~out], held


@pytest.mark.parametrize("clusters,experts", [(1, 1), (9, 1), (40, 1), (12, 3), (5, 5)])
def test_the_identity(clusters, experts):
    """Error under the total second moment = error within clusters + what the biases remove."""
    rows = inputs()
    found = statistics(rows, clusters, experts)
    solved, _ = split(rows, found)
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    sparse = torch.randn(experts, 7, 10, generator=generator, dtype=torch.float64)
    labels = found.route(solved)
    change = sparse - dense
    own = found.cluster_expert[labels]
    off = torch.einsum("tri,ti->tr", change[own], solved)
    total = off.square().sum()
    within = sum((d @ s * d).sum() for d, s in zip(change, found.sums, strict=True))
    problem = BiasProblem.of(dense, found.cluster_means())
    bias = problem.unshrunk(sparse)[0]
    removed = (found.solved_tokens * bias.square().sum(dim=1)).sum()
    torch.testing.assert_close(total, within + removed, rtol=1e-11, atol=0)
    torch.testing.assert_close((off + bias[labels]).square().sum(), within, rtol=1e-11, atol=0)
    assert removed > 0


@pytest.mark.parametrize("clusters", [1, 9, 40])
def test_what_shrinking_says_of_both_parts_is_so(clusters):
    rows = inputs(20)
    found = statistics(rows, clusters, 1)
    solved, held = split(rows, found)
    dense, sparse = torch.randn(2, 7, 10, dtype=torch.float64).unbind()
    problem = BiasProblem.of(dense, found.cluster_means())
    shrunk = problem.shrunk(sparse.unsqueeze(0))

    def error(x: Tensor, bias: Tensor) -> Tensor:
        return (x @ (sparse - dense).t() + bias[found.route(x)]).square().sum()

    full = problem.unshrunk(sparse.unsqueeze(0))[0]
    added = error(held, shrunk.bias) - error(held, 0 * shrunk.bias)
    assert float(added) == pytest.approx(shrunk.held_out) and shrunk.held_out <= 0
    lost = error(solved, shrunk.bias) - error(solved, full)
    assert float(lost) == pytest.approx(shrunk.lost, abs=1e-8)


def test_the_shrinkage_is_the_best_for_held_out_tokens():
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(6, 64, 10, generator=generator, dtype=torch.float64)
    dense, sparse = torch.randn(2, 7, 10, generator=generator, dtype=torch.float64).unbind()
    sparse[:, 0] = dense[:, 0]
    # clusters by the first column, which says nothing of the others and is left as it was
    first = torch.zeros(40, 10, dtype=torch.float64)
    first[:, 0] = torch.linspace(-2, 2, 40)
    by_first = Router(first, -first[:, 0].square() / 2)
    chosen = {}
    for name, rows, router in (("noise", noise, by_first), ("clusters", inputs(40), None)):
        found = statistics(rows, 40, 1, router)
        _, held = split(rows, found)
        problem = BiasProblem.of(dense, found.cluster_means())
        full, tokens = problem.unshrunk(sparse.unsqueeze(0))[0], found.solved_tokens.unsqueeze(1)
        off, labels = held @ (sparse - dense).t(), found.route(held)
        errors = {
            k: float((off + (full * tokens / (tokens + k))[labels]).square().sum())
            for k in SHRINKAGES
        }
        shrunk = problem.shrunk(sparse.unsqueeze(0))
        chosen[name] = shrunk.k
        assert errors[shrunk.k] == pytest.approx(min(errors.values()))
        assert errors[shrunk.k] - errors[math.inf] == pytest.approx(shrunk.held_out)
    assert chosen["noise"] > chosen["clusters"]


def test_held_out_tokens_that_disagree_leave_no_bias():
    rows = inputs(10)
    found = statistics(rows, 1, 1)
    known = found.cluster_means()
    known.held_out_sums.neg_()
    dense, sparse = torch.randn(2, 7, 10, dtype=torch.float64).unbind()
    shrunk = BiasProblem.of(dense, known).shrunk(sparse.unsqueeze(0))
    assert shrunk.k == math.inf and not shrunk.bias.any() and shrunk.held_out == 0


def test_a_cluster_without_tokens_has_no_bias():
    rows = inputs(10)
    found = statistics(rows, 5, 1)
    found.router.bias[2] = -1e9
    again = GroupStatistics(10, found.router, cluster_expert=torch.zeros(5), within=True,
                            hold_out=True)  # fmt: skip
    for batch in rows:
        again.add(batch)
    again.flush()
    dense, sparse = torch.randn(2, 7, 10).unbind()
    shrunk = BiasProblem.of(dense, again.cluster_means()).shrunk(sparse.unsqueeze(0))
    assert again.tokens[2] == 0 and not shrunk.bias[2].any() and shrunk.bias.isfinite().all()
