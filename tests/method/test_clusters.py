"""The folded router against scikit-learn's own predictions."""

import math

import pytest
import torch

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.clusters import (
    Router,
    first_children,
    fit_router,
    fold,
    parent_centroids,
    parents_of,
    rounded,
)


def mixture(rows: int, width: int, centres: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    places = 2 * torch.randn(centres, width, generator=generator, dtype=torch.float64)
    which = torch.randint(centres, (rows,), generator=generator)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return places[which] + noise + 5


@pytest.mark.parametrize("width,dims,experts", [(64, 8, 16), (300, 9, 5), (12, 12, 2)])
def test_folding_agrees_with_pca_and_kmeans(width, dims, experts):
    sklearn = pytest.importorskip("sklearn")
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    assert sklearn
    train, test = mixture(2000, width, 7), mixture(20_000, width, 7, seed=1)
    pca = PCA(dims, random_state=0).fit(train.numpy())
    kmeans = KMeans(experts, n_init=1, random_state=0).fit(pca.transform(train.numpy()))
    router = fold(*(torch.from_numpy(a) for a in (pca.mean_, pca.components_)),
                  torch.from_numpy(kmeans.cluster_centers_))  # fmt: skip
    expected = torch.from_numpy(kmeans.predict(pca.transform(test.numpy()))).long()
    assert torch.equal(router.route(test), expected)


@pytest.mark.parametrize("size,shift", [(1e-6, 0), (1.0, 0), (1e6, 0), (1.0, 100), (1.0, 3000)])
def test_fit_router_is_that_fold_in_float16(size, shift):
    """Inputs of any size and mean: float16 alone would overflow, vanish or favour some experts."""
    pytest.importorskip("sklearn")
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    moved = torch.zeros(96, dtype=torch.float64)
    moved[:4] = shift  # a few channels, as in language models
    train = (mixture(3000, 96, 6) + moved) * size
    router = fit_router(train, 6, dims=10, restarts=2, seed=3)
    assert router.weight.dtype == torch.float16 and router.bias.dtype == torch.float32
    assert 0.5 <= router.weight.abs().max() <= 1
    pca = PCA(10, random_state=3).fit(train.numpy())
    kmeans = KMeans(6, n_init=2, random_state=3).fit(pca.transform(train.numpy()))
    test = (mixture(20_000, 96, 6, seed=2) + moved) * size
    expected = torch.from_numpy(kmeans.predict(pca.transform(test.numpy()))).long()
    assert (router.route(test) == expected).double().mean() > 0.999


def test_a_scaled_router_routes_the_same():
    """Rounding aside: a power of two changes no float and no argmax."""
    weight = torch.randint(-8, 9, (5, 24)).double() * 48  # exact in float16 once scaled
    weight -= weight.mean(dim=0).round()
    router = Router(weight, torch.randn(5, dtype=torch.float64).float().double() * 100)
    x = torch.randn(1000, 24)
    stored = rounded(router, torch.randn(24, dtype=torch.float64))
    assert torch.equal(stored.route(x), Router(router.weight.float(), router.bias.float()).route(x))
    nothing = rounded(Router(torch.zeros(2, 3), torch.ones(2)), torch.ones(3))
    assert not nothing.weight.any() and torch.equal(nothing.bias, torch.ones(2))


@pytest.mark.parametrize("clusters,shift", [(40, 0), (64, 3000), (256, 0)])
def test_two_levels_are_scikit_learns_predictions_one_after_the_other(clusters, shift):
    pytest.importorskip("sklearn")
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    moved = torch.zeros(48, dtype=torch.float64)
    moved[:2] = shift
    train, test = mixture(8000, 48, 30) + moved, mixture(10_000, 48, 30, seed=1) + moved
    router = fit_router(train, clusters, dims=12, restarts=1, seed=3)
    parents = math.ceil(clusters**0.5)
    assert (router.parents, router.clusters) == (parents, clusters)
    assert router.weight.shape == (parents + clusters, 48)
    pca = PCA(12, random_state=3).fit(train.numpy())
    points, tests = pca.transform(train.numpy()), pca.transform(test.numpy())
    centroids = parent_centroids(points, clusters, parents, seed=3).numpy()
    top = KMeans(parents, init=centroids, n_init=1).fit(centroids)  # which are all it knows
    which, expected = top.predict(tests), torch.empty(len(test), dtype=torch.int64)
    for parent in range(parents):
        first, last = parent * clusters // parents, (parent + 1) * clusters // parents
        seen = points[top.predict(points) == parent]
        own = KMeans(last - first, n_init=1, random_state=3).fit(seen)
        expected[which == parent] = (
            first + torch.from_numpy(own.predict(tests[which == parent])).long()
        )
    assert (router.route(test) == expected).double().mean() > 0.998


def test_up_to_32_clusters_there_is_one_level():
    assert [parents_of(n) for n in (2, 32, 33, 36, 37, 256, 4096)] == [0, 0, 6, 6, 7, 16, 64]
    assert first_children(40, 7) == [0, 5, 11, 17, 22, 28, 34, 40]
    assert fit_router(mixture(500, 16, 3), 32, restarts=1).parents == 0


def test_parents_get_as_much_to_tell_apart():
    """Most rows in one place, and a hundred places for the others: plain k-means, level by level,
    gives the one place more children than it can use."""
    from sklearn.cluster import KMeans

    generator = torch.Generator().manual_seed(1)
    centres = 4 * torch.randn(100, 24, generator=generator)
    others = centres[torch.randint(100, (3000,), generator=generator)]
    others = others + torch.randn(3000, 24, generator=generator) / 2
    rows = torch.cat([torch.randn(6000, 24, generator=generator) * 1.5, others])

    def within(labels: torch.Tensor) -> float:
        parts = [rows[labels == label] for label in labels.unique()]
        return sum(float((part - part.mean(dim=0)).square().sum()) for part in parts)

    def k_means(some: torch.Tensor, clusters: int) -> torch.Tensor:
        return torch.from_numpy(KMeans(clusters, n_init=1, random_state=0).fit_predict(some)).long()

    found = within(fit_router(rows, 144, dims=24, restarts=1).route(rows))
    top, plain = k_means(rows, 12), torch.empty(len(rows), dtype=torch.int64)
    for parent in range(12):
        plain[top == parent] = 12 * parent + k_means(rows[top == parent], 12)
    assert found < 1.25 * within(k_means(rows, 144)) and found < 0.85 * within(plain)


def test_a_parent_of_few_distinct_rows_has_children_that_never_win():
    """Far away from all others, three rows over and over: one parent's, who has six children."""
    many, few = mixture(2000, 16, 5), torch.randn(3, 16).double() + 500
    router = fit_router(torch.cat([many, few.repeat(60, 1)]), 36, restarts=1)
    labels = router.route(few.repeat(50, 1))
    assert len(labels.unique()) == 3 and len((labels // 6).unique()) == 1
    assert (router.bias == -1e30).sum() == 3
    anywhere = router.route(torch.randn(2000, 16) * 300)
    assert not (router.bias[6:][anywhere] == -1e30).any()


def test_equal_logits_go_to_the_first():
    flat = Router(torch.zeros(4, 3), torch.tensor([0.0, 1, 1, 1]))
    assert flat.route(torch.randn(5, 3)).tolist() == [1] * 5
    two = Router(torch.zeros(2 + 4, 3), torch.tensor([1.0, 1, 0, 2, 9, 9]), 2)
    assert two.route(torch.randn(5, 3)).tolist() == [1] * 5


def test_deterministic_by_seed():
    rows = mixture(1000, 40, 5).float()
    first, again, other = (fit_router(rows, 8, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_bfloat16_rows_are_taken():
    rows = mixture(500, 32, 3).bfloat16()
    assert fit_router(rows, 3).weight.shape == (3, 32)


def test_wrong_inputs_are_named():
    with pytest.raises(WexpandError, match="16 clusters cannot be made from 10 rows"):
        fit_router(torch.randn(10, 8), 16)
    for clusters in (16, 100):
        with pytest.raises(WexpandError, match="3 distinct rows; .* a smaller num_clusters"):
            fit_router(torch.randn(3, 8).repeat(100, 1), clusters, key="num_clusters")
    broken = torch.randn(100, 8)
    broken[3, 3] = torch.nan
    with pytest.raises(WexpandError, match="NaN"):
        fit_router(broken, 4)
