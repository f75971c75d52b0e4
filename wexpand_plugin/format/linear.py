"""One linear of ours, as a checkpoint stores it: all of its tensors in one hand."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WexpandError
from .clusters import ClusterBias
from .config import LinearEntry
from .router import StoredRouter
from .rowpool import RowPool

__all__ = ["StoredLinear"]


class StoredLinear(NamedTuple):
    """y = W_e x + bias + cluster_bias[c], c being the router's choice and e = cluster_expert[c]."""

    pool: RowPool
    router: StoredRouter | None = None
    """None with one cluster"""
    bias: Tensor | None = None
    """[out], any float dtype"""
    cluster_bias: ClusterBias | None = None
    cluster_expert: Tensor | None = None
    """uint8 [clusters]; None where there is one expert, or one for each cluster"""

    @property
    def clusters(self) -> int:
        """That the router tells apart; 1 without a router."""
        return 1 if self.router is None else self.router.clusters

    def entry(self, dtype: torch.dtype) -> LinearEntry:
        """What config.json says of it.

        :param dtype: of the dense weight that it stands for
        :raises WexpandError: parts that do not fit each other
        """
        pool, experts, clusters = self.pool, self.pool.experts, self.clusters
        if not experts <= clusters:
            raise WexpandError(f"router: has {clusters} clusters for {experts} experts")
        if (self.cluster_expert is not None) != (1 < experts < clusters):
            raise WexpandError(
                f"cluster_expert: should be there where clusters are more than experts, and those "
                f"more than 1, but there are {experts} experts of {clusters} clusters"
            )
        if self.cluster_bias is not None:
            right, found = [clusters, pool.out_features], list(self.cluster_bias.values.shape)
            if found != right:
                raise WexpandError(f"cluster_bias: {found} should be {right}, [clusters, out]")
        return LinearEntry(
            in_features=pool.in_features,
            experts=experts,
            clusters=clusters,
            parents=0 if self.router is None else self.router.parents,
            out_features=pool.out_features,
            versions=pool.versions,
            nnz=pool.nnz,
            elements=pool.values.numel(),
            bias=self.bias is not None,
            cluster_bias=self.cluster_bias is not None,
            dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
            values=pool.codec.name,  # type: ignore[arg-type]
            value_group=pool.codec.group,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Kind -> tensor, those that there are."""
        pool, router, biases = self.pool, self.router, self.cluster_bias
        every = {
            "weight": pool.values,
            "weight_mask": pool.mask,
            "weight_scale": pool.scale,
            "row_map": pool.row_map,
            "router_weight": None if router is None else router.weight,
            "router_bias": None if router is None else router.bias,
            "cluster_expert": self.cluster_expert,
            "cluster_bias": None if biases is None else biases.values,
            "cluster_bias_scale": None if biases is None else biases.scale,
            "bias": self.bias,
        }
        return {kind: tensor for kind, tensor in every.items() if tensor is not None}
