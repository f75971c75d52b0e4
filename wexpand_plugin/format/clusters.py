"""Clusters: what the router tells apart. An expert is a set of them; each may have a bias.

    y = W_e x + b + B_c     c = the router's choice for x, e = cluster_expert[c]

There may be thousands of clusters where there are few experts, as a token reads one bias whatever
their number. A bias is stored in int8, with a scale for every neuron that all clusters share:
B[c, r] = values[c, r] * scale[r]. Where clusters and experts are equal in number, cluster c is
expert c, and nothing is stored; nor with one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WexpandError
from .values import ValueCodec

__all__ = ["MAX_CLUSTERS", "ClusterBias", "expert_of", "tokens_per_expert"]

MAX_CLUSTERS = 4096


@dataclass(frozen=True)
class ClusterBias:
    """What each cluster adds to the outputs of a linear."""

    values: Tensor
    """int8 [clusters, out]"""
    scale: Tensor
    """float16 [out]"""

    @classmethod
    def pack(cls, bias: Tensor) -> "ClusterBias":
        """Round biases [clusters, out], any float dtype; off by at most half a scale each."""
        rows = bias.float().t()
        codec = ValueCodec("int8", group=rows.shape[1])
        scale = codec.scale_of(rows)
        # a small scale that float16 rounds down would leave the largest bias out of reach
        short = scale.float() * codec.largest < rows.abs().amax(dim=1, keepdim=True)
        scale = (scale.view(torch.int16) + short).view(torch.float16)
        scale = scale.clamp(max=torch.finfo(torch.float16).max)
        return cls(codec.quantise(rows, scale).t().contiguous(), scale.flatten())

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The biases [clusters, out] as they are computed with."""
        return (self.values.float() * self.scale.float()).to(dtype)

    def of(self, clusters: Tensor | None) -> Tensor:
        """The biases of tokens of these clusters: int64 [tokens] -> float32 [tokens, out].

        :param clusters: None where there is one cluster; one bias is that of all tokens, [1, out]
        """
        values = self.values
        if clusters is not None and self.clusters > 1:
            values = values[clusters]
        return values.float() * self.scale.float()

    @property
    def clusters(self) -> int:
        """1 is a correction of the bias for all tokens alike."""
        return self.values.shape[0]

    @property
    def out_features(self) -> int:
        """Neurons."""
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.values.nbytes + self.scale.nbytes

    def take(self, neurons: Tensor) -> "ClusterBias":
        """That of these neurons, in any order."""
        return ClusterBias(self.values[:, neurons].contiguous(), self.scale[neurons].contiguous())

    def to(self, device: torch.device | str) -> "ClusterBias":
        """The same on another device."""
        return ClusterBias(self.values.to(device), self.scale.to(device))

    @classmethod
    def concat(
        cls, parts: Sequence["ClusterBias | None"], out_features: Sequence[int]
    ) -> "ClusterBias | None":
        """One for linears that share a router, their neurons one after another; zeros for None.

        :param out_features: of each linear
        """
        there = [part for part in parts if part is not None]
        if not there:
            return None
        clusters, like = max(part.clusters for part in there), there[0]
        values, scales = [], []
        for part, out in zip(parts, out_features, strict=True):
            if part is None:
                values.append(like.values.new_zeros(clusters, out))
                scales.append(like.scale.new_zeros(out))
            else:
                # one that does not know clusters is that of each
                values.append(part.values.expand(clusters, -1))
                scales.append(part.scale)
        return cls(torch.cat(values, dim=1), torch.cat(scales))


def expert_of(clusters: Tensor, cluster_expert: Tensor | None, experts: int) -> Tensor | None:
    """Expert of tokens [tokens] of these clusters: int64 [tokens]; None where there is but one.

    :param cluster_expert: uint8 [clusters]; None where clusters are the experts
    """
    if experts == 1:
        return None
    return clusters if cluster_expert is None else cluster_expert[clusters].long()


def tokens_per_expert(
    tokens: Sequence[int], cluster_expert: Tensor | None, experts: int
) -> Tensor:
    """Tokens of each expert, int64 [experts], of those of each cluster.

    :raises WexpandError: a cluster of an expert that there is not
    """
    counts = torch.tensor(tokens, dtype=torch.int64)
    if cluster_expert is None:
        return counts if experts > 1 else counts.sum(dim=0, keepdim=True)
    if len(cluster_expert) != len(counts) or int(cluster_expert.max()) >= experts:
        raise WexpandError(
            f"cluster_expert: {len(cluster_expert)} of 0 to {int(cluster_expert.max())} should be "
            f"{len(counts)} of 0 to {experts - 1}, the experts of the linear"
        )
    return counts.new_zeros(experts).index_add(0, cluster_expert.long().cpu(), counts)
