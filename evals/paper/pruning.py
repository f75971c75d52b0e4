"""One mask, or an expert for each cluster, from recorded inputs: what the experiments compare.

SparseGPT by rows: every neuron keeps the same number of weights, so that neurons of one linear are
compared at equal sparsity and, given the Hessian, do not see each other.
"""

import torch
from torch import Tensor

from wexpand_plugin.method.inputs import InputGroup
from wexpand_plugin.method.masks import MaskStructure
from wexpand_plugin.method.solvers.sparsegpt import chunk_size, solve

__all__ = ["ROW", "cluster_hessians", "experts", "hessian", "routed_errors", "stacked"]

ROW = MaskStructure.parse("row")
SHRINKAGE = 0.03
"""a cluster's Hessian is mixed with the whole's as if with so many tokens for each input"""
MAX_BYTES = 256 << 20


def hessian(x: Tensor) -> Tensor:
    """Mean of x x^T over tokens [tokens, in]."""
    return x.t() @ x / len(x)


def cluster_hessians(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Mean of x x^T per cluster [clusters, in, in], small ones mixed with the mean of all."""
    total = hessian(x)
    found = []
    for cluster in range(clusters):
        part = x[labels == cluster]
        share = SHRINKAGE * x.shape[1] / (len(part) + SHRINKAGE * x.shape[1])
        found.append((1 - share) * part.t() @ part / max(1, len(part)) + share * total)
    return torch.stack(found)


def stacked(group: InputGroup) -> Tensor:
    """The weights of a group's linears, one below the other."""
    return torch.cat([linear.weight.detach() for linear in group.linears])


def experts(weight: Tensor, hessians: Tensor, sparsity: float) -> Tensor:
    """A sparse copy of `weight` [rows, in] for each Hessian: [clusters, rows, in]."""
    parts = hessians.split(chunk_size(*weight.shape, MAX_BYTES))
    return torch.cat([solve(weight, part, sparsity, ROW).weights for part in parts])


def routed_errors(weight: Tensor, own: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """What each token's expert gets wrong: (W_c - W) x, [tokens, rows]."""
    errors = x.new_empty(len(x), len(weight))
    for cluster, expert in enumerate(own):
        tokens = labels == cluster
        errors[tokens] = x[tokens] @ (expert - weight).t()
    return errors
