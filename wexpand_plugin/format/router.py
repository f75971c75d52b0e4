"""The router as it is stored: one affine map of an input group, and its bytes.

Where it comes from is `method.clusters`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ROUTER_DTYPES",
    "StoredRouter",
    "narrowest",
    "router_bytes",
]

ROUTER_DTYPES = (torch.float16, torch.float32)
"""that a checkpoint's router weight may have"""


class StoredRouter(NamedTuple):
    """One affine map of an input group: a token goes to the expert with the largest logit."""

    weight: Tensor
    """[experts, in], in a checkpoint one of ROUTER_DTYPES"""
    bias: Tensor
    """[experts], float32 in a checkpoint"""

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.weight.nbytes + self.bias.nbytes

    def route(self, x: Tensor) -> Tensor:
        """Expert of each token: `x` [tokens, in] -> int64 [tokens]; logits in the bias's dtype."""
        weight, bias = self
        return torch.addmm(bias, x.to(bias.dtype), weight.to(bias.dtype).t()).argmax(dim=1)


def router_bytes(experts: int, in_features: int) -> int:
    """Bytes of a float16 router; one expert needs none."""
    return experts * (2 * in_features + 4) if experts > 1 else 0


def narrowest(weight: Tensor) -> Tensor:
    """A router's weight in the smallest of ROUTER_DTYPES that holds every value exactly; a tensor
    without values (on the meta device) as it is."""
    if weight.is_meta:
        return weight
    half = weight.half()
    return half if torch.equal(half.to(weight.dtype), weight) else weight.float()
