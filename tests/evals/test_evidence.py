"""The maths of the paper's experiments, on inputs small enough to check by hand or by force."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from evals.documents import evidence
from evals.paper import EXPERIMENTS, disentangling, other_text, texts
from evals.paper.entangled_neurons import equal_error, replaced, squared_errors
from evals.paper.pruning import ROW, cluster_hessians, experts, hessian, routed_errors
from evals.paper.verdicts import Claim
from evals.processes import ROOT
from wexpand_plugin.method.clusters import fit_router
from wexpand_plugin.method.neurons import neuron_scores
from wexpand_plugin.method.solvers.sparsegpt import solve


@pytest.mark.parametrize(
    "values,mark,at_most,verdict",
    [
        ([1.0, 1.1, 0.9], 0.5, False, "holds"),
        ([1.0, 1.1, 0.9], 0.5, True, "fails"),
        ([1.0, 1.1, 0.9], 1.5, False, "fails"),
        ([1.0, 1.1, 0.9], 0.95, False, "inconclusive"),
        ([1.0, 1.1, 0.9], 1.05, True, "inconclusive"),
        ([1.0, 1.0], 1.0, False, "holds"),
        ([1.0], 0.9, False, "holds*"),
        ([1.0], 1.1, False, "fails*"),
        ([1.0, math.nan], 0.5, False, "inconclusive"),
    ],
)
def test_verdicts(values, mark, at_most, verdict):
    assert Claim("", "", values, mark, at_most).verdict == verdict


def linear(seed: int = 0, tokens: int = 600, width: int = 32, out: int = 40):
    torch.manual_seed(seed)
    x = torch.randn(tokens, width) @ torch.randn(width, width)
    return x, torch.randn(out, width)


def test_sets_of_neurons_get_the_same_error():
    x, weight = linear(width=64)
    weight[:4] *= 3  # these would err more at the same sparsity
    h = hessian(x)
    sets = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13], [20, 30, 31, 32]])
    sparsity, pruned = equal_error(weight, h, sets)
    errors = torch.stack(
        [((own - weight[rows]) @ x.t()).square().sum() / len(x)
         for rows, own in zip(sets, pruned, strict=True)]
    )  # fmt: skip
    torch.testing.assert_close(errors, errors.mean().expand(3), rtol=1e-3, atol=0)
    assert sparsity[0] < min(sparsity[1:])
    # nearly all of that is pruning: where weights are gone, little of them is left
    small = (pruned[0].abs() < 0.2 * weight[sets[0]].abs()).double().mean()
    assert float(small) == pytest.approx(float(sparsity[0]), abs=0.1)


def test_squared_errors_are_those_of_the_outputs():
    x, change = linear()
    torch.testing.assert_close(
        squared_errors(change, hessian(x)), (x @ change.t()).square().mean(dim=0),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_rows_come_back():
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    with torch.no_grad(), replaced({layer: (torch.tensor([1]), torch.zeros(1, 4))}):
        assert layer.weight[1].abs().sum() == 0
        assert torch.equal(layer.weight[[0, 2]], before[[0, 2]])
    assert torch.equal(layer.weight, before)


def test_each_cluster_has_the_expert_of_its_own_tokens():
    x, weight = linear()
    labels = torch.arange(len(x)) % 3
    own = experts(weight, cluster_hessians(x, labels, 3), 0.5)
    part = x[labels == 1]
    share = 0.03 * x.shape[1] / (len(part) + 0.03 * x.shape[1])
    h = (1 - share) * hessian(part) + share * hessian(x)
    torch.testing.assert_close(own[1], solve(weight, h[None], 0.5, ROW).weights[0])
    errors = routed_errors(weight, own, x, labels)
    torch.testing.assert_close(errors[4], x[4] @ own[1].t() - x[4] @ weight.t())


def test_a_routed_forward_is_the_expert_of_each_input():
    x, weight = linear()
    router = fit_router(x, 2, seed=0)
    own = torch.stack([weight, 2 * weight])
    y = other_text.expanded(router, own, x.view(6, 100, -1))
    factor = 1 + router.route(x).view(6, 100, 1)
    torch.testing.assert_close(y, x.view(6, 100, -1) @ weight.t() * factor)


def test_distances_are_relative_to_the_cluster():
    seen = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0], [10.0, 4.0]])
    labels = torch.tensor([0, 0, 1, 1])
    x = torch.tensor([[1.0, 3.0], [10.0, 2.0], [10.0, 8.0], [0.0, 0.0]])
    found = other_text.distances(x, torch.tensor([0, 1, 1, 2]), seen, labels)
    assert found[:3].tolist() == [3.0, 0.0, 3.0]
    assert found[3].isnan()


def test_clusters_are_compared_with_parts_of_equal_sizes():
    """A neuron with a mode for each cluster falls apart in clusters and not in random parts."""
    torch.manual_seed(0)
    labels = (torch.rand(4000) < 0.3).long()
    x = torch.randn(4000, 6)
    x[:, 0] += 8 * labels
    weight = torch.zeros(2, 6)
    weight[0, 0] = weight[1, 1] = 1
    random = disentangling.shuffled(labels, 0)
    assert torch.equal(random.bincount(), labels.bincount())
    own, chance = (neuron_scores(x, weight, labels=part, seed=0) for part in (labels, random))
    found = disentangling.compared(own, chance)
    # one of two neurons is the top
    assert found["wd"]["top_of_random"] < 0.2
    assert found["wd"]["top_less_than_random"] == 1
    assert found["wd"]["top_of_whole"] == pytest.approx(
        float(own.cluster_wd[0] / own.wd[0]), rel=1e-6
    )


def test_pieces_are_all_of_the_text_and_differ_by_seed():
    text = "".join(f"line {i} of this text\n" for i in range(400))
    first, second = (list(texts.pieces([text, "short"], seed, 1000)) for seed in (0, 1))
    assert sorted(first) == sorted(second) and first != second
    assert sum(map(len, first)) == len(text) + 5
    assert max(map(len, first)) <= 1000
    assert all(piece.endswith("\n") for piece in first if piece != "short")


@pytest.mark.parametrize("name", evidence.measured())
def test_figures_show_the_results(name):
    assert evidence.drawn(name) == evidence.digest(name), "run 'make docs'"


@pytest.mark.slow
def test_all_experiments_run(tmp_path, monkeypatch):
    """From the model to figure and verdicts, all small: what `make evidence QUICK=1` does."""
    subprocess.run(
        [sys.executable, "-m", "evals.paper", "--quick", "--json", tmp_path / "pocket"],
        check=True, cwd=ROOT,
    )  # fmt: skip
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "FIGURES", tmp_path)
    # a model of code is not asked for grammar
    asked = [name for name in EXPERIMENTS if name != "blimp"]
    assert evidence.measured() == asked
    for name in asked:
        assert evidence.drawn(name) is None
        evidence.draw(name)
        assert evidence.drawn(name) == evidence.digest(name)
    said = " ".join(evidence.evidence_verdicts().split())
    assert all(f"`python -m evals.paper.{name}`" in said for name in asked)
    assert "**holds***" in said
