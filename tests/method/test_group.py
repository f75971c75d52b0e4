"""`expand_group` from end to end, on tensors alone: no model, no host, no file."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from weigh import Weigh

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.group import expand_group
from wexpand_plugin.method.masks import MaskStructure
from wexpand_plugin.method.settings import Settings
from wexpand_plugin.method.solvers.sparsegpt import solve
from wexpand_plugin.method.statistics import GroupStatistics


class Batches(list[Tensor]):
    """Batches in memory; remembers which were asked for."""

    def identity(self, number: int, /) -> int:
        return number

    def __call__(self, numbers=None):
        numbers = list(range(len(self)) if numbers is None else numbers)
        self.asked = [*getattr(self, "asked", []), *numbers]
        self.calls = [*getattr(self, "calls", []), len(numbers)]
        return (self[number] for number in numbers)


def batches(count: int = 20, width: int = 24) -> Batches:
    """Inputs around three centres, each with directions of its own."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, width, generator=generator)
    size = torch.randn(3, width, generator=generator).exp()
    which = torch.randint(3, (count, 64), generator=generator)
    noise = torch.randn(count, 64, width, generator=generator)
    return Batches((centres[which] + noise * size[which]).unbind())


WEIGHTS = [torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in (10, 14)]
BIASES = [torch.ones(10), None]


def settings(**values) -> Settings:
    return Settings(**{"sparsity": 0.5, "num_experts": 3, "stored_bytes": Weigh()} | values)


def true_error(
    weight: Tensor, experts: Tensor, inputs: Tensor, labels: Tensor, bias: Tensor | None = None
) -> float:
    """The relative error of the outputs, one token after another.

    :param bias: of each token
    """
    dense = inputs @ weight.t()
    sparse = torch.stack([experts[e] @ x for x, e in zip(inputs, labels.tolist(), strict=True)])
    if bias is not None:
        sparse += bias
    return float((sparse - dense).norm() / dense.norm())


def test_full_expansion_stores_what_it_calibrates_with():
    inputs = batches()
    found = expand_group(WEIGHTS, BIASES, inputs, settings())
    rows = torch.cat(inputs)
    labels = found.router.route(rows)
    assert found.tokens.tolist() == torch.bincount(labels, minlength=3).tolist()
    for weight, linear in zip(WEIGHTS, found.linears, strict=True):
        assert linear.stored is linear.calibrating and linear.candidates is None
        experts = linear.stored.dense()
        assert experts.shape == (3, *weight.shape)
        assert (experts == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        # measured on a sample of 1024 of the 1280 rows
        expected = true_error(weight, experts, rows, labels)
        assert linear.stored.error == pytest.approx(expected, rel=0.05)
        plain = solve(weight, (rows.t() @ rows)[None], 0.5, MaskStructure.parse("row")).weights
        assert linear.stored.error < true_error(weight, plain, rows, 0 * labels)


def test_one_expert_is_sparsegpt():
    inputs = batches()
    found = expand_group(WEIGHTS, BIASES, inputs, settings(num_experts=1))
    rows = torch.cat(inputs)
    assert found.router is None and found.tokens.tolist() == [len(rows)]
    known = GroupStatistics(24, None)
    known.add(rows)
    again = expand_group(WEIGHTS, BIASES, Batches(), settings(num_experts=1), known)
    for weight, one, other in zip(WEIGHTS, found.linears, again.linears, strict=True):
        hessian = (rows.t() @ rows / len(rows))[None]
        plain = solve(weight, hessian, 0.5, MaskStructure.parse("row")).weights
        for linear in (one, other):
            torch.testing.assert_close(linear.stored.dense(), plain, atol=1e-4, rtol=0)
        expected = true_error(weight, plain, rows, torch.zeros(len(rows), dtype=torch.int64))
        assert one.stored.error == pytest.approx(expected, rel=0.05)


def labels_of(found, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster and expert of each row."""
    clusters = torch.zeros(len(rows), dtype=torch.int64)
    if found.router is not None:
        clusters = found.router.route(rows)
    experts = clusters
    if found.cluster_expert is not None:
        experts = found.cluster_expert.long()[clusters]
    elif len(found.tokens) > 1 and len(found.linears[0].calibrating.row_map) == 1:
        experts = 0 * clusters
    return clusters, experts


@pytest.mark.parametrize(
    "experts,clusters,budget",
    [(1, 1, None), (1, 4, None), (1, 40, None), (2, 8, None), (3, 3, None), (3, 40, 5.0),
     (3, 3, 1.8)],
)  # fmt: skip
def test_cluster_biases_come_closer_than_none(experts, clusters, budget):
    inputs = batches(60)
    keys = dict(num_experts=experts, size_budget=budget, budget_scope="layer")
    plain = expand_group(WEIGHTS, BIASES, inputs, settings(**keys))
    found = expand_group(WEIGHTS, BIASES, inputs, settings(num_clusters=clusters, **keys))
    rows = torch.cat(inputs)
    labels, of = labels_of(found, rows)
    assert (found.router is None) == (clusters == 1)
    assert found.tokens.tolist() == torch.bincount(labels, minlength=clusters).tolist()
    if 1 < experts < clusters:
        assert found.cluster_expert.dtype == torch.uint8
        assert found.cluster_expert.unique().tolist() == list(range(experts))
    else:
        assert found.cluster_expert is None
    for weight, linear, other in zip(WEIGHTS, found.linears, plain.linears, strict=True):
        stored = linear.stored
        assert linear.calibrating is stored and other.stored.cluster_bias is None
        bias = stored.cluster_bias
        assert bias.shape == (clusters, len(weight)) and bias.dtype == torch.float32
        error = true_error(weight, stored.dense(), rows, of, bias[labels])
        assert stored.error == pytest.approx(error, rel=0.06)
        without = true_error(weight, other.stored.dense(), rows, labels_of(plain, rows)[1])
        assert error < (0.97 if clusters > 1 else 1.0) * without
        if budget:
            kept = (stored.rows.weights != 0).sum(dim=1)
            fixed = settings(num_clusters=clusters, **keys).fixed_bytes(len(weight), 24)
            assert fixed >= clusters * len(weight)
            assert int(Weigh().row(kept, 24).sum()) + fixed <= budget * 2 * weight.numel()


def test_experts_are_sets_of_similar_clusters():
    inputs = batches(60)
    found = expand_group(WEIGHTS, BIASES, inputs, settings(num_clusters=12))
    rows = torch.cat(inputs)
    clusters, experts = labels_of(found, rows)

    def spread(labels: Tensor) -> float:
        parts = [rows[labels == label] for label in labels.unique()]
        return sum(float((part - part.mean(dim=0)).square().sum()) for part in parts)

    generator = torch.Generator().manual_seed(0)
    chance = torch.randint(3, (12,), generator=generator)[clusters]
    assert spread(experts) < 0.8 * spread(chance)


def test_clusters_of_one_token():
    """As many clusters as there are rows: nothing to learn a bias from, and nothing breaks."""
    inputs = batches(2)
    found = expand_group(WEIGHTS, BIASES, inputs, settings(num_experts=1, num_clusters=128))
    assert found.tokens.sum() == 128 and (found.tokens == 1).sum() > 30
    for linear in found.linears:
        assert linear.stored.cluster_bias.isfinite().all()
    with pytest.raises(WexpandError, match="num_clusters: 129 clusters .* from 128 rows"):
        expand_group(WEIGHTS, BIASES, inputs, settings(num_experts=1, num_clusters=129))


def spent(linear, out_features: int) -> int:
    kept = (linear.stored.rows.weights != 0).sum(dim=1)
    return int(Weigh().row(kept, 24).sum()) + Weigh().fixed(out_features, 24, 3)


@pytest.mark.parametrize("budget", [1.2, 1.6])
def test_a_layer_budget_is_met_by_each_linear(budget):
    values = dict(size_budget=budget, budget_scope="layer")
    found = expand_group(WEIGHTS, BIASES, batches(), settings(**values))
    for weight, linear in zip(WEIGHTS, found.linears, strict=True):
        assert linear.candidates is None and linear.stored is linear.calibrating
        assert spent(linear, len(weight)) <= budget * 2 * weight.numel()


def test_linears_may_have_budgets_of_their_own():
    values = dict(size_budget=9.0, budget_scope="layer")
    own = [1.2, 1.7]
    found = expand_group(WEIGHTS, BIASES, batches(), settings(**values), size_budgets=own)
    for weight, linear, budget in zip(WEIGHTS, found.linears, own, strict=True):
        share = spent(linear, len(weight)) / (2 * weight.numel())
        assert budget - 0.1 < share <= budget


def test_with_a_model_budget_nothing_is_stored_yet():
    kept = []

    def keep(rows):
        kept.append(len(rows.weights))
        return rows

    values = dict(size_budget=1.3, keep=keep)
    inputs = batches()
    found = expand_group(WEIGHTS, BIASES, inputs, settings(**values))
    other = expand_group(WEIGHTS, BIASES, inputs, settings(size_budget=1.3, shortlist=()))
    rows = torch.cat(inputs)
    labels = found.router.route(rows)
    for weight, linear, everything in zip(WEIGHTS, found.linears, other.linears, strict=True):
        assert linear.stored is None and linear.candidates is not None
        full = linear.calibrating.rows.weights
        assert len(full) == 3 * len(weight), "calibrates on full expansion"
        nodes = everything.candidates.problem.tree.nodes
        assert everything.candidates.place.shape == (nodes, len(weight))
        # in closed form on the rows that were not held out
        for versions in (linear.calibrating, linear.candidates.base()):
            expected = true_error(weight, versions.dense(), rows, labels)
            assert versions.error == pytest.approx(expected, rel=0.05)
    assert kept == [len(linear.candidates.rows.weights) for linear in found.linears]


def test_batches_are_read_for_the_sample_until_there_are_rows_enough():
    inputs = batches(40)
    expand_group(WEIGHTS, BIASES, inputs, settings(router_samples=600))
    # 8 at first, which have 512 rows, and as many times 8 as the rest takes
    assert inputs.asked == list(range(40)), "each once"
    assert inputs.calls == [8, 8, 24]


class Backwards(Batches):
    """The same batches, from the last to the first."""

    def identity(self, number: int, /) -> int:
        return len(self) - 1 - number


@pytest.mark.parametrize("keys", [dict(), dict(size_budget=1.3), dict(num_clusters=12)], ids=str)
def test_the_order_of_batches_changes_nothing(keys):
    inputs = batches(40)
    one, other = (
        expand_group(WEIGHTS, BIASES, some, settings(router_samples=600, **keys))
        for some in (inputs, Backwards(reversed(inputs)))
    )
    torch.testing.assert_close(other.router.weight, one.router.weight)
    assert torch.equal(other.tokens, one.tokens)
    for linear, same in zip(one.linears, other.linears, strict=True):
        torch.testing.assert_close(same.calibrating.dense(), linear.calibrating.dense(),
                                   rtol=1e-3, atol=1e-3)  # fmt: skip


def test_what_cannot_be_expanded_is_said():
    broken = batches()
    broken[3][5, 5] = torch.nan
    for experts, clusters in ((1, 0), (3, 0), (1, 1), (3, 5)):
        with pytest.raises(WexpandError, match="NaN"):
            keys = dict(num_experts=experts, num_clusters=clusters)
            expand_group(WEIGHTS, BIASES, broken, settings(**keys))
    short = Batches(rows[:7] for rows in batches())
    one = dict(num_experts=1, num_clusters=1)
    for values in (dict(size_budget=1.0), dict(num_clusters=5), one):
        with pytest.raises(WexpandError, match="sequences of 16 or more"):
            expand_group(WEIGHTS, BIASES, short, settings(**values))
    with pytest.raises(WexpandError, match="below .* the size of the base versions"):
        expand_group(WEIGHTS, BIASES, batches(), settings(size_budget=0.1, budget_scope="layer"))


def test_the_method_needs_no_host_and_no_other_room():
    code = (
        "import sys, pkgutil, importlib, wexpand_plugin.method as m\n"
        "for found in pkgutil.walk_packages(m.__path__, 'wexpand_plugin.method.'):\n"
        "    importlib.import_module(found.name)\n"
        "rooms = {n.split('.')[1] for n in sys.modules if n.startswith('wexpand_plugin.')}\n"
        "hosts = {'llmcompressor', 'transformers', 'safetensors', 'sklearn', 'scipy', 'vllm'}\n"
        "print(sorted(rooms), sorted(hosts & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['errors', 'method'] []"


@pytest.mark.parametrize("values", [dict(num_experts=1), dict(size_budget=0.9)])
def test_grids_go_all_the_way(values):
    """Rows lie on the grid whose scales come with them, whatever is chosen from what."""
    values |= dict(values="int4", value_group=8)
    found = expand_group(WEIGHTS, BIASES, batches(), settings(**values))
    for linear in found.linears:
        stored = linear.stored or linear.candidates.full()
        scales = stored.rows.scales.float().repeat_interleave(8, dim=1)[:, :24]
        q = (stored.rows.weights / scales).nan_to_num()
        assert (q - q.round()).abs().max() < 1e-3 and q.abs().max() > 4
