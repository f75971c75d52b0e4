"""The router as it is stored: affine maps of an input group, its choice and its bytes.

A flat router has a row for each cluster, and the largest logit wins. With hundreds of clusters a
token would read more router than weights, so there are two levels: the first `parents` rows are an
affine map of their own, and only the children of the winner are compared. Parent p has the clusters
from p * clusters // parents to (p + 1) * clusters // parents - 1, so with about sqrt(clusters)
parents a token reads 2 sqrt(clusters) rows. Logits of the two levels are never compared.

Where it comes from is `method.clusters`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ROUTER_DTYPES",
    "StoredRouter",
    "choice",
    "first_children",
    "narrowest",
    "router_bytes",
    "rows_read",
]

ROUTER_DTYPES = (torch.float16, torch.float32)
"""that a checkpoint's router weight may have"""


class StoredRouter(NamedTuple):
    """What sends a token to its cluster, that with the largest logit."""

    weight: Tensor
    """[parents + clusters, in], in a checkpoint one of ROUTER_DTYPES"""
    bias: Tensor
    """[parents + clusters], float32 in a checkpoint"""
    parents: int = 0
    """rows of the first level, which stand first; 0: there is none"""

    @property
    def clusters(self) -> int:
        """That tokens are sent to."""
        return len(self.bias) - self.parents

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.weight.nbytes + self.bias.nbytes

    def to(self, device: torch.device | str) -> "StoredRouter":
        """The same on another device."""
        return StoredRouter(self.weight.to(device), self.bias.to(device), self.parents)

    def route(self, x: Tensor) -> Tensor:
        """Cluster of each token: `x` [tokens, in] -> int64 [tokens]; logits in the bias's dtype."""
        weight, bias, parents = self
        logits = torch.addmm(bias, x.to(bias.dtype), weight.to(bias.dtype).t())
        return choice(logits, parents)


def choice(logits: Tensor, parents: int) -> Tensor:
    """The cluster that logits [tokens, parents + clusters] choose, the first of equal ones.

    int64 [tokens]; waits for no GPU.
    """
    if not parents:
        return logits.argmax(dim=1)
    of_parents, of_clusters = logits[:, :parents], logits[:, parents:]
    clusters = of_clusters.shape[1]
    parent = of_parents.argmax(dim=1)
    first = first_children(parent, clusters, parents)
    last = first_children(parent + 1, clusters, parents) - 1
    # as wide as the parent with most children, to compare no more than these
    children = first.unsqueeze(1) + torch.arange(-(-clusters // parents), device=logits.device)
    children = children.minimum(last.unsqueeze(1))
    best = of_clusters.gather(1, children).argmax(dim=1, keepdim=True)
    return children.gather(1, best).squeeze(1)


def first_children(parent: Tensor, clusters: int, parents: int) -> Tensor:
    """The first cluster of each parent, by its number, of one of `parents`."""
    return parent * clusters // parents


def rows_read(clusters: int, parents: int) -> int:
    """Rows of a router that one token reads, at most."""
    return parents + (-(-clusters // parents) if parents else clusters)


def router_bytes(clusters: int, in_features: int, parents: int = 0) -> int:
    """Bytes of a float16 router; one cluster needs none."""
    return (parents + clusters) * (2 * in_features + 4) if clusters > 1 else 0


def narrowest(weight: Tensor) -> Tensor:
    """A router's weight in the smallest of ROUTER_DTYPES that holds every value exactly; a tensor
    without values (on the meta device) as it is."""
    if weight.is_meta:
        return weight
    half = weight.half()
    return half if torch.equal(half.to(weight.dtype), weight) else weight.float()
