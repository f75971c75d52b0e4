"""Clusters of inputs, folded into a router: one affine map, or two levels of them.

The paper reduces a layer's inputs with PCA, clusters them with k-means, and sends a token to the
nearest centroid. With P the PCA components [dims, in], mu the mean and C_c the centroids in PCA
space, the nearest centroid is

    argmin_c |P(x - mu) - C_c|^2  =  argmax_c  x.(P^T C_c) - mu.(P^T C_c) - |C_c|^2 / 2

because |P(x - mu)|^2 is the same for every c. The right side is one affine map of x, so PCA and
k-means are needed only here, never in a checkpoint or at serving time.

No argmax changes if the same vector is added to every row of the map, or if map and bias are
multiplied by the same positive number. So the mean row is subtracted, which keeps the logits small,
and a power of two scales the largest weight to between 1/2 and 1, where float16 is at its best: the
map is stored in float16, which moves a few tokens in ten thousand to another cluster
(evals/LOG.md), and is rounded before anything is calibrated with it. Bias and logits are float32.

Every token reads the whole map, so its bytes count: in narrow layers it is a good part of what a
token reads. With C clusters, more than `FLAT`, there are two levels: P = ceil(sqrt(C)) parents, and
in the map of each of them its C / P children, found by k-means among the inputs that the parent
gets. A token reads P rows, then those of the winner's children. As every parent has as many, every
parent should get as much to tell apart: parents are the means of equally many centroids of a finer
k-means (plain k-means leaves twice as much variance more than one level would; evals/LOG.md). The
logits of a parent's children are compared with each other only, so each of these maps is centred
and scaled on its own.

scikit-learn does the PCA and the k-means; the folding and the routing are ours.
"""

import itertools
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import WexpandError

__all__ = [
    "FLAT",
    "Router",
    "first_children",
    "fit_router",
    "fold",
    "parent_centroids",
    "parents_of",
    "rounded",
]

FLAT = 32
"""clusters of a router with one level, at most"""
FINER = 8
"""centroids that a parent is made of"""
PARENT_ROWS = 16384
"""rows, at least, that parents are made from, if there are more"""
POWER = 4
"""of PCA's power iterations, where it has any; more change its components' variance by a
thousandth"""
NEVER = -1e30
"""bias of a cluster that no input is nearest to, as its parent had too few distinct rows"""


def parents_of(clusters: int) -> int:
    """Parents of a router for so many clusters; 0: it has one level."""
    return math.isqrt(clusters - 1) + 1 if clusters > FLAT else 0


def first_children(clusters: int, parents: int) -> list[int]:
    """The first cluster of each of `parents`, and the number of all: parents + 1 numbers."""
    return [parent * clusters // parents for parent in range(parents + 1)]


class Router(NamedTuple):
    """The affine maps of an input group: a token goes to the cluster with the largest logit.

    With two levels, to the child with the largest logit of the parent with the largest logit.
    """

    weight: Tensor
    """[parents + clusters, in], float16 as `fit_router` makes it"""
    bias: Tensor
    """[parents + clusters], float32"""
    parents: int = 0
    """the first so many rows; 0: one level"""

    @property
    def clusters(self) -> int:
        """How many there are."""
        return len(self.bias) - self.parents

    def to(self, device: torch.device | str) -> "Router":
        """The same router on another device."""
        return Router(self.weight.to(device), self.bias.to(device), self.parents)

    def route(self, x: Tensor) -> Tensor:
        """Cluster of each token: `x` [tokens, in] -> int64 [tokens]; logits in the bias's dtype."""
        x = x.to(self.bias.dtype)
        if not self.parents:
            return self._winners(x, 0, len(self.bias))
        parent = self._winners(x, 0, self.parents)
        counts = torch.bincount(parent, minlength=self.parents).tolist()
        first = first_children(self.clusters, self.parents)
        cluster = torch.empty_like(parent)
        for number, tokens in enumerate(parent.argsort(stable=True).split(counts)):
            if len(tokens):
                start, stop = first[number], first[number + 1]
                own = self._winners(x[tokens], self.parents + start, self.parents + stop)
                cluster[tokens] = own + start
        return cluster

    def _winners(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Which of the rows start to stop - 1 has the largest logit, counted from start."""
        weight = self.weight[start:stop].to(x.dtype)
        return torch.addmm(self.bias[start:stop], x, weight.t()).argmax(dim=1)


def fold(mean: Tensor, components: Tensor, centroids: Tensor) -> Router:
    """PCA `mean` [in], `components` [dims, in], k-means `centroids` [clusters, dims] -> router."""
    weight = centroids @ components
    bias = -(weight @ mean) - centroids.square().sum(dim=1) / 2
    return Router(weight - weight.mean(dim=0), bias - bias.mean())


def rounded(router: Router, mean: Tensor) -> Router:
    """`router` as it is stored: scaled, its weight in float16, its bias in float32.

    The bias takes up what rounding does to the logits of the `mean` input [in], which would else
    favour some clusters wherever inputs have a large mean.
    """
    largest = float(router.weight.abs().max())
    scale = 2.0 ** -math.frexp(largest)[1] if largest else 1.0
    weight = router.weight * scale
    half = weight.half()
    bias = router.bias * scale + (weight - half.to(weight.dtype)) @ mean
    return Router(half, bias.float())


def fit_router(
    rows: Tensor,
    num_clusters: int,
    *,
    dims: int | None = None,
    restarts: int = 3,
    seed: int = 0,
    key: str = "num_experts",
) -> Router:
    """Cluster a sample of an input group's rows and fold the result into affine maps.

    :param rows: sample of inputs [n, in], any float dtype
    :param num_clusters: clusters to make; at least 2; more than `FLAT` make two levels
    :param dims: PCA dimensions; by default in / 32, at least 8 (paper appendix: in // 32)
    :param restarts: k-means++ starts, of which the best is kept
    :param seed: of PCA and k-means; the same rows and seed give the same router
    :param key: of the recipe, that an error is about
    :return: the router as a checkpoint stores it (`rounded`)
    :raises WexpandError: fewer rows than clusters, or rows that are not finite
    """
    # scikit-learn is an extra, and slow to import
    import numpy as np
    from sklearn.decomposition import PCA

    count, width = rows.shape
    if count < num_clusters:
        raise WexpandError(f"{key}: {num_clusters} clusters cannot be made from {count} rows")
    # float64 stays what it is; half types have no numpy type
    data = (rows if rows.dtype == torch.float64 else rows.float()).detach().cpu().numpy()
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.square(data).sum())
    if not finite:
        raise WexpandError(
            "router: the calibration inputs hold NaN or infinite values, or some whose squares "
            "overflow"
        )
    if (found := _distinct(data, num_clusters)) < num_clusters:
        raise WexpandError(
            f"{key}: {num_clusters} clusters cannot be made from calibration inputs with "
            f"{found} distinct rows; use more varied text or a smaller {key}"
        )
    dims = min(dims or max(8, width // 32), width, count)
    pca = PCA(dims, random_state=seed, iterated_power=POWER).fit(data)
    points = pca.transform(data)
    mean, components = (_float64(a) for a in (pca.mean_, pca.components_))
    parents = parents_of(num_clusters)
    if not parents:
        centroids = _k_means(points, num_clusters, restarts, seed)
        return rounded(fold(mean, components, centroids), mean)
    tops = parent_centroids(points, num_clusters, parents, seed)
    top = rounded(fold(mean, components, tops), mean)
    weights, biases, first = [top.weight], [top.bias], first_children(num_clusters, parents)
    labels = torch.cdist(_float64(points), tops).argmin(dim=1).numpy()
    for parent, (start, stop) in enumerate(itertools.pairwise(first)):
        own, centroids = labels == parent, tops[parent : parent + 1]
        if (possible := _distinct(data[own], stop - start)) > 1:
            centroids = _k_means(points[own], possible, restarts, seed)
            near = _float64(data[own].mean(axis=0))
        else:
            near = mean
        children = rounded(fold(mean, components, centroids), near)
        missing = stop - start - len(centroids)
        weights += [children.weight, children.weight.new_zeros(missing, width)]
        biases += [children.bias, children.bias.new_full((missing,), NEVER)]
    return Router(torch.cat(weights), torch.cat(biases), parents)


def parent_centroids(points: Any, clusters: int, parents: int, seed: int) -> Tensor:
    """Centroids of parents that get about as much to tell apart each: float64 [parents, dims].

    :param points: what to cluster [n, dims]
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    finer = min(FINER * parents, clusters)
    fine = _k_means(points[:: max(1, len(points) // PARENT_ROWS)], finer, 1, seed)
    centroids = _k_means(fine.numpy(), parents, 1, seed)
    # each parent has places for its share of the finer centroids, who take the nearest together
    places = np.repeat(np.arange(parents), np.diff(first_children(finer, parents)))
    for _ in range(10):
        apart = torch.cdist(fine, centroids).square().numpy()
        chosen = places[linear_sum_assignment(apart[:, places])[1]]
        centroids = torch.stack([fine[chosen == parent].mean(dim=0) for parent in range(parents)])
    return centroids


def _float64(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _distinct(data: Any, most: int) -> int:
    """How many distinct rows there are, or `most`."""
    found: set[bytes] = set()
    for row in data:
        found.add(row.tobytes())
        if len(found) == most:
            break
    return len(found)


def _k_means(points: Any, clusters: int, restarts: int, seed: int) -> Tensor:
    """The centroids of `points` [n, dims]: float64 [clusters, dims]."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # threads change the order of k-means' sums, and with it the last bits of the centroids
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # points that are nearly equal
        found = KMeans(clusters, n_init=restarts, random_state=seed).fit(points)
    return _float64(found.cluster_centers_)
