"""Clusters of inputs, folded into a router: one affine map.

The paper reduces a layer's inputs with PCA, clusters them with k-means, and sends a token to the
nearest centroid. With P the PCA components [dims, in], mu the mean and C_c the centroids in PCA
space, the nearest centroid is

    argmin_c |P(x - mu) - C_c|^2  =  argmax_c  x.(P^T C_c) - mu.(P^T C_c) - |C_c|^2 / 2

because |P(x - mu)|^2 is the same for every c. The right side is one affine map of x, so PCA and
k-means are needed only here, never in a checkpoint or at serving time.

No argmax changes if the same vector is added to every row of the map, or if map and bias are
multiplied by the same positive number. So the mean row is subtracted, which keeps the logits small,
and a power of two scales the largest weight to between 1/2 and 1, where float16 is at its best: the
map is stored in float16, which moves a few tokens in ten thousand to another expert (evals/LOG.md),
and is rounded before anything is calibrated with it. Bias and logits are float32. Every token reads
the whole map, so its bytes count: in narrow layers it is a good part of what a token reads.

scikit-learn does the PCA and the k-means; the folding and the routing are ours.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WexpandError

__all__ = ["Router", "fit_router", "fold", "rounded"]


class Router(NamedTuple):
    """One affine map of an input group: a token goes to the expert with the largest logit."""

    weight: Tensor
    """[experts, in], float16 as `fit_router` makes it"""
    bias: Tensor
    """[experts], float32"""

    def route(self, x: Tensor) -> Tensor:
        """Expert of each token: `x` [tokens, in] -> int64 [tokens]; logits in the bias's dtype."""
        logits = torch.addmm(self.bias, x.to(self.bias.dtype), self.weight.to(self.bias.dtype).t())
        return logits.argmax(dim=1)


def fold(mean: Tensor, components: Tensor, centroids: Tensor) -> Router:
    """PCA `mean` [in], `components` [dims, in], k-means `centroids` [experts, dims] -> router."""
    weight = centroids @ components
    bias = -(weight @ mean) - centroids.square().sum(dim=1) / 2
    return Router(weight - weight.mean(dim=0), bias - bias.mean())


def rounded(router: Router, mean: Tensor) -> Router:
    """`router` as it is stored: scaled, its weight in float16, its bias in float32.

    The bias takes up what rounding does to the logits of the `mean` input [in], which would else
    favour some experts wherever inputs have a large mean.
    """
    largest = float(router.weight.abs().max())
    scale = 2.0 ** -math.frexp(largest)[1] if largest else 1.0
    weight = router.weight * scale
    half = weight.half()
    bias = router.bias * scale + (weight - half.to(weight.dtype)) @ mean
    return Router(half, bias.float())


def fit_router(
    rows: Tensor,
    num_experts: int,
    *,
    dims: int | None = None,
    restarts: int = 3,
    seed: int = 0,
) -> Router:
    """Cluster a sample of an input group's rows and fold the result into one affine map.

    :param rows: sample of inputs [n, in], any float dtype
    :param num_experts: clusters to make; at least 2
    :param dims: PCA dimensions; by default in / 32, at least 8 (paper appendix: in // 32)
    :param restarts: k-means++ starts, of which the best is kept
    :param seed: of PCA and k-means; the same rows and seed give the same router
    :return: the router as a checkpoint stores it (`rounded`)
    :raises WexpandError: fewer rows than experts, or rows that are not finite
    """
    # scikit-learn is an extra, and slow to import
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    count, width = rows.shape
    if count < num_experts:
        raise WexpandError(f"num_experts: {num_experts} clusters cannot be made from {count} rows")
    # float64 stays what it is; half types have no numpy type
    data = (rows if rows.dtype == torch.float64 else rows.float()).detach().cpu().numpy()
    if not np.isfinite(data).all():
        raise WexpandError("router: the calibration inputs hold NaN or infinite values")
    dims = min(dims or max(8, width // 32), width, count)
    pca = PCA(dims, random_state=seed).fit(data)
    # threads change the order of k-means' sums, and with it the last bits of the centroids
    with threadpool_limits(1):
        kmeans = KMeans(num_experts, n_init=restarts, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # an error of our own follows
            kmeans.fit(pca.transform(data))
    if (found := len(np.unique(kmeans.labels_))) < num_experts:
        raise WexpandError(
            f"num_experts: {num_experts} clusters cannot be made from calibration inputs with "
            f"{found} distinct rows; use more varied text or fewer experts"
        )
    mean, components, centroids = (
        torch.from_numpy(np.asarray(a, dtype=np.float64))
        for a in (pca.mean_, pca.components_, kmeans.cluster_centers_)
    )
    return rounded(fold(mean, components, centroids), mean)
