"""Cluster biases: a vector for each cluster, added to the outputs of its tokens.

Where a weight W became W', the outputs of a cluster's tokens are off by (W' - W) x. The constant
that removes most of it is the mean,

    B_c = (W - W') mu_c

with mu_c the cluster's mean input, and what remains is the error under the covariance of the inputs
within the clusters, sum_c (S_c - n_c mu_c mu_c^T) with S_c the sum of x x^T over the n_c tokens.
That is the identity: error under the total second moment = error within clusters + sum_c n_c
|B_c|^2. So where there are biases, versions are solved and weighed under the covariance within
clusters (`statistics`), and one cluster is the classic bias correction.

A mean over few tokens is a guess. Each bias is shrunk by n_c / (n_c + k), the k of a linear being
the one of `SHRINKAGES` with the least error on calibration tokens that were held out; as infinity,
no biases at all, is one of them, the error of those tokens never rises. It follows from sums over
the held-out tokens of each cluster: a token's error changes by s^2 |B_c|^2 - 2 s B_c (W - W') x.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["SHRINKAGES", "BiasProblem", "ClusterMeans", "Shrunk"]

SHRINKAGES = (0.0, 4.0, 16.0, 64.0, 256.0, 1024.0, math.inf)
"""tokens k that a bias is shrunk by"""


@dataclass(frozen=True)
class ClusterMeans:
    """What is known of the inputs of each cluster."""

    means: Tensor
    """mean input of the tokens that versions are solved for [clusters, in]"""
    tokens: Tensor
    """their number, int64 [clusters]"""
    held_out_sums: Tensor
    """sum of the inputs of the held-out tokens [clusters, in]"""
    held_out_tokens: Tensor
    """their number, int64 [clusters]"""
    experts: Tensor
    """expert of each cluster, int64 [clusters]"""

    def to(self, device: torch.device | str) -> "ClusterMeans":
        """The same on another device."""
        return ClusterMeans(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Shrunk:
    """The biases of a linear."""

    bias: Tensor
    """[clusters, out]"""
    k: float
    """one of SHRINKAGES"""
    lost: float
    """squared error, on the tokens that were solved for, that the shrinkage leaves"""
    held_out: float
    """what the biases add to the squared error on held-out tokens; at most 0"""


@dataclass(frozen=True)
class BiasProblem:
    """A linear with cluster biases: the biases of any versions of its rows."""

    inputs: ClusterMeans
    dense: Tensor
    """outputs of the dense weight for the means [clusters, out]"""
    dense_held_out: Tensor
    """and for the held-out sums [clusters, out]"""

    @classmethod
    def of(cls, weight: Tensor, inputs: ClusterMeans) -> "BiasProblem":
        """For the dense `weight` [out, in]."""
        transposed = weight.to(inputs.means).t()
        return cls(inputs, inputs.means @ transposed, inputs.held_out_sums @ transposed)

    def unshrunk(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """What the weights `experts` [experts, out, in] take from the outputs of each cluster: for
        its mean input, which is the best bias, and for its held-out sum: [clusters, out] both."""
        known = self.inputs
        full, held_out = self.dense.clone(), self.dense_held_out.clone()
        for expert, weight in enumerate(experts):
            own = (known.experts == expert).nonzero().squeeze(1)
            transposed = weight.to(known.means).t()
            full[own] -= known.means[own] @ transposed
            held_out[own] -= known.held_out_sums[own] @ transposed
        return full, held_out

    def shrunk(self, experts: Tensor) -> Shrunk:
        """The biases that go with the weights `experts` [experts, out, in]."""
        known = self.inputs
        full, held_out = self.unshrunk(experts)
        size = full.double().square().sum(dim=1)
        agree = (full.double() * held_out.double()).sum(dim=1)
        tokens, seen = (n.to(size) for n in (known.tokens, known.held_out_tokens))

        def share(k: float) -> Tensor:
            return (tokens / (tokens + k)).nan_to_num(0.0)

        def added(k: float) -> float:
            s = share(k)
            return float((s * s * seen * size - 2 * s * agree).sum())

        # of equal ones the largest: less to store a guess in
        k = min(reversed(SHRINKAGES), key=added)
        s = share(k)
        lost = float((tokens * (1 - s).square() * size).sum())
        return Shrunk(full * s.to(full).unsqueeze(1), k, lost, added(k))
