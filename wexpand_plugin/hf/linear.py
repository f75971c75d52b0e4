"""The routed linear as a torch module: each token uses the sparse weights of its own expert.

This is the reference the serving kernels are compared with. Its parameters and buffers carry the
names of the checkpoint's tensors, so a state dict is a checkpoint. A weight that is 1-D cannot be
mistaken for an ordinary linear's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..format.config import KINDS, LinearEntry
from ..format.router import StoredRouter, narrowest
from ..format.rowpool import RowPool
from ..format.values import codec_of
from ..kernels import reference

__all__ = ["RoutedLinear"]

# loaded in float32, which every device computes with, whatever they are stored in
WIDENED = ("router_weight", "router_bias", "weight_scale")


class RoutedLinear(nn.Module):
    """y = W_e x + b, e being the expert that the router gives x; one expert needs no router.

    :param entry: its sizes; the tensors are empty
    :param group: name of its input group, any that the linears of the group share; "" for none
    :param tokens: calibration tokens per expert, where known
    :param dtype: of float weights and bias, by default the entry's
    """

    weight: Tensor
    weight_mask: Tensor | None
    weight_scale: Tensor | None
    row_map: Tensor | None
    router_weight: Tensor | None
    router_bias: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        entry: LinearEntry,
        group: str = "",
        tokens: Sequence[int] = (),
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.entry, self.group, self.tokens = entry, group, list(tokens)
        self.in_features, self.out_features = entry.in_features, entry.out_features
        self.experts = entry.experts
        for kind in KINDS:
            self._set(kind, None)
        self._dense: Tensor | None = None
        for kind, (shape, dtypes) in entry.shapes().items():
            of = dtypes[0]
            if kind in WIDENED:
                of = torch.float32
            elif of.is_floating_point:
                of = dtype or getattr(torch, entry.dtype)
            self._set(kind, torch.empty(shape, dtype=of, device=device))

    def _set(self, kind: str, tensor: Tensor | None) -> None:
        """Give a tensor its place: bit patterns are buffers, the rest parameters."""
        if kind in ("weight_mask", "row_map"):
            self.register_buffer(kind, tensor)
        else:
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(kind, parameter)

    @classmethod
    def from_pool(
        cls,
        pool: RowPool,
        router: StoredRouter | None = None,
        bias: Tensor | None = None,
        *,
        group: str = "",
        tokens: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ) -> "RoutedLinear":
        """A module holding these tensors; `router` is needed for more than one expert.

        :param dtype: of the dense weight, by default that of a float pool's values
        """
        dtype = dtype or (torch.float32 if pool.codec.scaled else pool.codec.storage)
        entry = LinearEntry.of(pool, bias is not None, dtype)
        module = cls(entry, group, tokens, device="meta")
        tensors = {"weight": pool.values, "weight_mask": pool.mask, "row_map": pool.row_map}
        tensors |= {"weight_scale": pool.scale, "bias": None if bias is None else bias.detach()}
        if router is not None and pool.experts > 1:
            # a copy for each linear of the group: transformers refuses to save shared tensors
            tensors["router_weight"] = narrowest(router.weight.detach()).clone()
            tensors["router_bias"] = router.bias.detach().float().clone()
        for kind, tensor in tensors.items():
            module._set(kind, tensor)
        return module

    @property
    def pool(self) -> RowPool:
        """The row pool of this linear; shares its tensors."""
        codec = self.entry.codec
        return RowPool(
            codec if codec.scaled else codec_of(self.weight.dtype),
            self.in_features,
            self.weight.data,
            self.weight_mask,
            self.row_map,
            None if self.weight_scale is None else self.weight_scale.data.half(),
        )

    @property
    def router(self) -> StoredRouter | None:
        """The router, in whatever dtype it is held; shares its tensors."""
        if self.router_weight is None or self.router_bias is None:
            return None
        return StoredRouter(self.router_weight.data, self.router_bias.data)

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight that this linear stands for."""
        floats = self.weight.is_floating_point()
        return self.weight.dtype if floats else getattr(torch, self.entry.dtype)

    def stored_bytes(self) -> int:
        """Bytes of the pool and the router in a checkpoint; the bias is not counted."""
        router = self.router
        size = 0
        if router is not None:
            size = StoredRouter(narrowest(router.weight), router.bias).nbytes
        return sum(self.pool.stored_bytes().values()) + size

    def dense_bytes(self) -> int:
        """Bytes of the dense weight that this linear stands for."""
        return self.in_features * self.out_features * self.dtype.itemsize

    def materialise(self, weights: Tensor | None = None) -> None:
        """Keep dense experts [experts, out, in] at hand: fast, at `experts` times the memory.

        :param weights: to compute with, instead of those that are stored, until `dematerialise`
        """
        if weights is None:
            pool = self.pool
            weights = torch.stack([pool.expert(e) for e in range(self.experts)])
        self._dense = weights

    def dematerialise(self) -> None:
        """Undo `materialise`."""
        self._dense = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        rows = x.reshape(-1, self.in_features)
        router = self.router
        experts = None if router is None else router.route(rows)
        weight_of = self.pool.expert if self._dense is None else self._dense.__getitem__
        y = reference.multiply(rows, experts, weight_of, self.experts, self.out_features)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"experts={self.experts}, versions={self.entry.versions}, nnz={self.entry.nnz}, "
            f"values={self.entry.values}, bias={self.bias is not None}"
        )
