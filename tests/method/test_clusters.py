"""The folded router against scikit-learn's own predictions."""

import pytest
import torch

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.clusters import Router, fit_router, fold, rounded


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
    assert torch.equal(stored.route(x), Router(*(part.float() for part in router)).route(x))
    nothing = rounded(Router(torch.zeros(2, 3), torch.ones(2)), torch.ones(3))
    assert not nothing.weight.any() and torch.equal(nothing.bias, torch.ones(2))


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
    with pytest.raises(WexpandError, match="distinct"):
        fit_router(torch.randn(3, 8).repeat(100, 1), 16)
    broken = torch.randn(100, 8)
    broken[3, 3] = torch.nan
    with pytest.raises(WexpandError, match="NaN"):
        fit_router(broken, 4)
