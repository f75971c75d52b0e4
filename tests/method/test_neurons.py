"""Neuron scores against scipy, closed forms and slow direct computations."""

import weakref

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.neurons import (
    MIN_TOKENS,
    mapping_difficulty,
    neuron_scores,
    wasserstein_distance,
    wasserstein_neurons,
)


def linear(tokens=400, width=12, neurons=9, seed=0, dtype=torch.float32):
    """Skewed, correlated inputs and a linear with a bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).exp() - 1
    x = x + x @ torch.randn(width, width, generator=generator) / width
    weight = torch.randn(neurons, width, generator=generator)
    return x.to(dtype), weight.to(dtype), torch.randn(neurons, generator=generator).to(dtype)


def quantiles(tokens):
    return stats.norm.ppf((np.arange(tokens) + 0.5) / tokens)


def direct_md(x, y, first, second):
    """Eq. 2 in float64, one pair and one neuron at a time; pairs with dx = 0 dropped."""
    dx = np.array([np.linalg.norm(x[i] - x[j]) for i, j in zip(first, second, strict=True)])
    first, second, dx = first[dx > 0], second[dx > 0], dx[dx > 0]
    md = np.zeros(y.shape[1])
    for neuron in range(y.shape[1]):
        dy = np.abs(y[first, neuron] - y[second, neuron])
        for a, b in zip(dy, dx, strict=True):
            md[neuron] += (a / np.median(dy)) / (b / dx.max()) / len(dx)
    return md


def pairs_of(tokens, pairs, seed):
    """The pairs that the scores draw: the first half of a permutation with the second."""
    count = min(pairs, tokens // 2)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).numpy()
    return order[:count], order[count : 2 * count]


def test_wd_equals_scipy():
    x, weight, bias = linear(dtype=torch.float64)
    y = x @ weight.T + bias
    z = (y - y.mean(0)) / y.std(0, correction=0)
    expected = [stats.wasserstein_distance(z[:, i], quantiles(len(z))) for i in range(z.shape[1])]
    np.testing.assert_allclose(wasserstein_distance(y), expected, rtol=1e-10)
    np.testing.assert_allclose(neuron_scores(x, weight, bias).wd, expected, rtol=1e-10)


def test_wd_leaves_its_argument_alone():
    y = torch.randn(64, 1, dtype=torch.float64)
    before = y.clone()
    wasserstein_distance(y)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    "distribution",
    [
        stats.uniform(loc=-(3**0.5), scale=2 * 3**0.5),
        stats.laplace(scale=0.5**0.5),
        stats.expon(loc=-1),
        stats.lognorm(0.5),
    ],
    ids=lambda d: d.dist.name,
)
def test_wd_equals_the_closed_form(distribution):
    """W1 = integral over p of |F^-1(p) - ppf(p)|, F standardised; 1% is 3 sigma at 400k tokens."""
    mean, std = distribution.mean(), distribution.std()

    def gap(p):
        return abs((distribution.ppf(p) - mean) / std - stats.norm.ppf(p))

    # split where the two cross often, and at the tails
    edges = [0, 1e-6, 1e-3, 0.05, 0.5, 0.95, 0.999, 1 - 1e-6, 1]
    exact = sum(
        integrate.quad(gap, low, high, limit=400)[0]
        for low, high in zip(edges, edges[1:], strict=False)
    )
    documented = {"uniform": 0.15, "laplace": 0.145, "expon": 0.31, "lognorm": 0.237}
    assert exact == pytest.approx(documented[distribution.dist.name], abs=0.005)
    sample = distribution.rvs(size=(400_000, 1), random_state=0)
    assert wasserstein_distance(torch.from_numpy(sample)).item() == pytest.approx(exact, rel=0.01)


def test_wd_of_gaussian_neurons_is_the_documented_noise_floor():
    y = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert wasserstein_distance(y).mean().item() * 4096**0.5 == pytest.approx(0.8, abs=0.15)
    assert wasserstein_distance(y).max() < 0.03


def test_moments_equal_scipy():
    x, weight, bias = linear(dtype=torch.float64)
    y = (x @ weight.T + bias).numpy()
    scores = neuron_scores(x, weight, bias)
    np.testing.assert_allclose(scores.mean, y.mean(0), rtol=1e-10)
    np.testing.assert_allclose(scores.std, y.std(0), rtol=1e-10)
    np.testing.assert_allclose(scores.skew, stats.skew(y), rtol=1e-9)
    np.testing.assert_allclose(scores.kurtosis, stats.kurtosis(y), rtol=1e-9)


@pytest.mark.parametrize("tokens, pairs", [(401, 50_000), (400, 31), (400, 40)])
def test_md_equals_a_direct_double_loop(tokens, pairs):
    x, weight, bias = linear(tokens, dtype=torch.float64)
    x[7:90] = x[7]  # many identical tokens: their pairs are dropped
    y = x @ weight.T + bias
    first, second = pairs_of(tokens, pairs, seed=3)
    expected = direct_md(x.numpy(), y.numpy(), first, second)
    scores = neuron_scores(x, weight, bias, pairs=pairs, seed=3)
    np.testing.assert_allclose(scores.md, expected, rtol=1e-9)
    md, md_null = mapping_difficulty(x, y, pairs=pairs, seed=3)
    np.testing.assert_allclose(md, expected, rtol=1e-9)
    np.testing.assert_allclose(md_null, scores.md_null, rtol=1e-9)


def test_md_null_is_the_mean_over_permutations():
    x, weight, _ = linear(200, dtype=torch.float64)
    y = (x @ weight.T).numpy()
    first, second = pairs_of(200, 100, seed=0)
    dx = np.linalg.norm(x.numpy()[first] - x.numpy()[second], axis=1)
    dy = np.abs(y[first] - y[second])
    rng = np.random.default_rng(0)
    draws = [
        (dy / np.median(dy, axis=0) / (rng.permutation(dx) / dx.max())[:, None]).mean(0)
        for _ in range(4000)
    ]
    expected, error = np.mean(draws, axis=0), np.std(draws, axis=0) / len(draws) ** 0.5
    md_null = neuron_scores(x, weight, pairs=100).md_null.numpy()
    assert (np.abs(md_null - expected) < 5 * error).all()
    assert (error < 0.01 * expected).all()


def test_md_ratio_is_one_for_outputs_that_ignore_the_inputs():
    """Although MD itself then still correlates with WD (the reason for reporting the ratio)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 16, generator=generator)
    powers = torch.linspace(1, 3, 24)
    y = torch.randn(40_000, 24, generator=generator)
    y = y.sign() * y.abs() ** powers
    md, md_null = mapping_difficulty(x, y)
    assert (md / md_null - 1).abs().max() < 0.02
    assert stats.pearsonr(md, wasserstein_distance(y)).statistic > 0.9


def test_md_ratio_is_below_one_for_a_linear_map():
    x, weight, bias = linear(2000)
    assert (neuron_scores(x, weight, bias).md_ratio < 0.95).all()


def test_constant_neurons():
    x, weight, _ = linear()
    weight[2] = 0
    x[:, 5] = 3.3  # a column that never varies, read by a neuron with a bias
    weight[4] = 0
    weight[4, 5] = 0.7
    scores = neuron_scores(x, weight, torch.full((9,), 0.1))
    for neuron in (2, 4):
        assert scores.md[neuron].isnan() and scores.md_null[neuron].isnan()
        for name in ("wd", "std", "skew", "kurtosis"):
            assert getattr(scores, name)[neuron] == 0, name
    assert scores.mean[2].item() == pytest.approx(0.1)
    assert scores.mean[4].item() == pytest.approx(0.1 + 0.7 * 3.3)
    others = [0, 1, 3, 5, 6, 7, 8]
    assert all(values[others].isfinite().all() for values in scores if values is not None)


def test_md_is_undefined_where_most_outputs_are_equal():
    x = torch.zeros(400, 4)
    x[:, 1:] = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    x[:20, 0] = 1  # 5% of the tokens: the median |dy| of a neuron that reads this column is 0
    scores = neuron_scores(x, torch.eye(4))
    assert scores.md[0].isnan() and scores.md_null[0].isnan() and scores.wd[0] > 0.3
    assert scores.md[1:].isfinite().all()


def test_identical_tokens_leave_md_undefined_everywhere():
    scores = neuron_scores(torch.ones(64, 4), torch.eye(4))
    assert scores.md.isnan().all() and (scores.wd == 0).all()


def test_clusters_are_weighted_by_tokens():
    x, weight, bias = linear(500, dtype=torch.float64)
    labels = torch.cat((torch.zeros(300), torch.full((160,), 7), torch.full((40,), -1))).long()
    labels = labels[torch.randperm(500, generator=torch.Generator().manual_seed(1))]
    y = x @ weight.T + bias
    scores = neuron_scores(x, weight, bias, labels=labels)
    own = [wasserstein_distance(y[labels == c]) for c in (0, 7, -1)]
    expected = (own[0] * 300 + own[1] * 160 + own[2] * 40) / 500
    np.testing.assert_allclose(scores.cluster_wd, expected, rtol=1e-10)
    plain = neuron_scores(x, weight, bias)
    assert plain.cluster_wd is None and plain.cluster_md is None
    for name in ("wd", "mean", "std", "skew", "kurtosis", "md", "md_null"):
        np.testing.assert_allclose(getattr(scores, name), getattr(plain, name), rtol=1e-12)


def test_one_cluster_is_the_whole():
    x, weight, bias = linear()
    scores = neuron_scores(x, weight, bias, labels=torch.zeros(400, dtype=torch.int32), pairs=60)
    torch.testing.assert_close(scores.cluster_wd, scores.wd)
    # its pairs are drawn afresh, so MD agrees within sampling error
    torch.testing.assert_close(scores.cluster_md, scores.md, rtol=0.5, atol=0)


def test_cluster_md_equals_md_of_each_cluster():
    """All of a cluster's tokens in pairs: the cluster's own N_x and N_y, weights by tokens."""
    x, weight, _ = linear(200, dtype=torch.float64)
    labels = torch.arange(200) % 4 // 3  # 150 tokens and 50
    scores = neuron_scores(x, weight, labels=labels, seed=5)
    generator = torch.Generator().manual_seed(5)
    torch.randperm(200, generator=generator)  # the whole sample draws first
    expected = 0
    for cluster, count in ((0, 150), (1, 50)):
        order = torch.randperm(count, generator=generator).numpy()
        half = count // 2
        part = x[labels == cluster].numpy()
        own = direct_md(part, part @ weight.T.numpy(), order[:half], order[half : 2 * half])
        expected = expected + own * count / 200
    np.testing.assert_allclose(scores.cluster_md, expected, rtol=1e-9)


def test_two_modes_fall_apart_into_clusters():
    """A bimodal neuron (the paper's entangled one) is Gaussian inside each mode's cluster."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    labels = (torch.arange(4000) % 2).long()
    x[:, 0] += 8 * labels
    weight = torch.randn(3, 8, generator=generator)
    weight[:, 0] = torch.tensor([2.0, 0.0, 1.5])
    scores = neuron_scores(x, weight, labels=labels)
    shuffled = labels[torch.randperm(4000, generator=generator)]
    control = neuron_scores(x, weight, labels=shuffled)
    assert (scores.wd[[0, 2]] > 0.15).all() and scores.wd[1] < 0.05
    assert (scores.cluster_wd < 0.05).all()
    assert (control.cluster_wd[[0, 2]] > 0.15).all()


def test_small_clusters_are_left_out():
    x, weight, _ = linear()
    labels = torch.zeros(400, dtype=torch.long)
    labels[: MIN_TOKENS - 1] = 1
    scores = neuron_scores(x, weight, labels=labels)
    expected = neuron_scores(x[MIN_TOKENS - 1 :], weight).wd
    torch.testing.assert_close(scores.cluster_wd, expected)
    lonely = neuron_scores(x, weight, labels=torch.arange(400))
    assert lonely.cluster_wd.isnan().all() and lonely.wd.isfinite().all()


@pytest.mark.parametrize("max_bytes", [1, 60_000, 200_000])
def test_chunks_change_rounding_only(max_bytes):
    x, weight, bias = linear()
    labels = torch.arange(400) % 3
    expected = neuron_scores(x, weight, bias, labels=labels)
    scores = neuron_scores(x, weight, bias, labels=labels, max_bytes=max_bytes)
    for name, value in scores._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=1e-5, atol=1e-5, msg=name)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside this context hold at one time."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.count(value.untyped_storage())
        return result

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, key, size)

    def release(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("neurons", [64, 512])
def test_memory_is_bounded_by_the_setting(neurons):
    x, weight, bias = linear(tokens=4096, width=64, neurons=neurons)
    with LiveBytes() as memory:
        neuron_scores(x, weight, bias, labels=torch.arange(4096) % 4, max_bytes=4 << 20)
    assert memory.peak < 4.5 * (1 << 20) < neurons * 4096 * 8 * 3


def test_equal_seeds_give_equal_scores_and_others_do_not():
    x, weight, bias = linear()
    one, same, other = (neuron_scores(x, weight, bias, pairs=50, seed=s) for s in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(one[:7], same[:7], strict=True))
    assert not torch.equal(one.md, other.md) and torch.equal(one.wd, other.wd)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    x, weight, bias = linear(dtype=dtype)
    expected = neuron_scores(x.double(), weight.double(), bias.double())
    scores = neuron_scores(x, weight, bias)
    for name, value in scores._asdict().items():
        if value is not None:
            torch.testing.assert_close(value, getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_parameters_need_no_gradient():
    layer = torch.nn.Linear(8, 4)
    scores = neuron_scores(torch.randn(64, 8), layer.weight, layer.bias)
    assert not scores.wd.requires_grad


def test_wasserstein_neurons_are_the_largest():
    wd = torch.tensor([0.1, 0.5, 0.3, 0.5, 0.2])
    assert wasserstein_neurons(wd, 40).tolist() == [1, 3]
    assert wasserstein_neurons(wd, 60).tolist() == [1, 3, 2]
    assert wasserstein_neurons(wd).tolist() == [1]
    assert len(wasserstein_neurons(torch.rand(1000))) == 30
    assert sorted(wasserstein_neurons(wd, 100).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.full((400, 12), torch.nan)}, "x: holds NaN or infinite"),
        ({"x": torch.randn(MIN_TOKENS - 1, 12)}, "x: 31 tokens are too few"),
        ({"x": torch.randn(4, 100, 12)}, r"x: shape \[4, 100, 12\]"),
        ({"x": torch.ones(400, 12, dtype=torch.long)}, "x: shape .* floats"),
        ({"weight": torch.randn(9, 11)}, r"weight: shape \[9, 11\] should be \[out, 12\]"),
        ({"weight": torch.randn(9, 12) / 0}, "weight: holds NaN or infinite"),
        ({"bias": torch.randn(8)}, r"bias: shape \[8\] should be \[9\]"),
        ({"bias": torch.full((9,), torch.inf)}, "bias: holds NaN"),
        ({"labels": torch.zeros(399).long()}, r"labels: shape \[399\]"),
        ({"labels": torch.zeros(400)}, "labels: .*float32 should be integers"),
        ({"pairs": 0}, "pairs: 0 should be at least 1"),
        ({"max_bytes": 0}, "max_bytes: 0 should be at least 1"),
    ],
)
def test_bad_input_is_named(change, message):
    x, weight, bias = linear()
    arguments = {"x": x, "weight": weight, "bias": bias} | change
    with pytest.raises(WexpandError, match=message):
        neuron_scores(**arguments)


def test_bad_outputs_and_percents_are_named():
    with pytest.raises(WexpandError, match="y: holds NaN"):
        wasserstein_distance(torch.full((64, 2), torch.inf))
    with pytest.raises(WexpandError, match="y: 64 tokens do not fit x with 65"):
        mapping_difficulty(torch.randn(65, 3), torch.randn(64, 2))
    for percent in (0, -1, 101):
        with pytest.raises(WexpandError, match=f"percent: {percent} should be above 0"):
            wasserstein_neurons(torch.rand(5), percent)
    with pytest.raises(WexpandError, match="wd: .* without NaN"):
        wasserstein_neurons(torch.tensor([0.1, torch.nan]))
