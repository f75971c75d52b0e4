"""The routed linear as a torch module: each token uses the sparse weights of its own expert.

This is the reference the serving kernels are compared with. Its parameters and buffers carry the
names of the checkpoint's tensors, so a state dict is a checkpoint. A weight that is 1-D cannot be
mistaken for an ordinary linear's.
"""

import torch
from torch import Tensor, nn

from ..format.router import Router, narrowest, route
from ..format.rowpool import RowPool
from ..kernels import reference

__all__ = ["RoutedLinear"]


class RoutedLinear(nn.Module):
    """y = W_e x + b, e being the expert that the router gives x; one expert needs no router.

    :param in_features, out_features: as in nn.Linear
    :param experts: number of experts
    :param versions: rows in the pool
    :param nnz: kept weights in the pool
    :param bias: whether there is one
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int,
        versions: int,
        nnz: int,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.experts = in_features, out_features, experts

        def parameter(*shape, of=dtype):
            return nn.Parameter(torch.empty(*shape, dtype=of, device=device), requires_grad=False)

        self.weight = parameter(nnz)
        width = (in_features + 7) // 8
        self.weight_mask: Tensor
        self.row_map: Tensor
        self.register_buffer(
            "weight_mask", torch.empty(versions, width, dtype=torch.uint8, device=device)
        )
        self.register_buffer(
            "row_map", torch.empty(experts, out_features, dtype=torch.int32, device=device)
        )
        if experts > 1:
            # loaded in float32, which every device computes with, whatever it is stored in
            self.router_weight = parameter(experts, in_features, of=torch.float32)
            self.router_bias = parameter(experts, of=torch.float32)
        self.bias = parameter(out_features) if bias else None
        self.tokens: list[int] = []
        """calibration tokens per expert, where known"""
        self._dense: Tensor | None = None

    @classmethod
    def from_pool(
        cls, pool: RowPool, router: Router | None = None, bias: Tensor | None = None
    ) -> "RoutedLinear":
        """A module holding these tensors; `router` is needed for more than one expert."""
        module = cls(
            pool.in_features, pool.out_features, pool.experts, pool.versions, pool.nnz,
            bias is not None, device="meta",
        )  # fmt: skip
        module.weight = nn.Parameter(pool.values, requires_grad=False)
        module.weight_mask, module.row_map = pool.mask, pool.row_map
        if router is not None:
            # a copy for each linear of the group: transformers refuses to save shared tensors
            weight, bias_ = narrowest(router.weight.detach()), router.bias.detach().float()
            module.router_weight = nn.Parameter(weight.clone(), requires_grad=False)
            module.router_bias = nn.Parameter(bias_.clone(), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @property
    def pool(self) -> RowPool:
        """The row pool of this linear; shares its tensors."""
        return RowPool(self.weight.data, self.weight_mask, self.row_map, self.in_features)

    def stored_bytes(self) -> int:
        """Bytes of the pool and the router in a checkpoint; the bias is not counted."""
        router = 0
        if self.experts > 1:
            router = narrowest(self.router_weight).nbytes + self.router_bias.nbytes
        return sum(self.pool.stored_bytes().values()) + router

    def dense_bytes(self) -> int:
        """Bytes of the dense weight that this linear stands for."""
        return self.in_features * self.out_features * self.weight.element_size()

    def unpack(self, instead: RowPool | None = None) -> None:
        """Keep dense experts [experts, out, in] at hand: fast, at `experts` times the memory.

        :param instead: compute with these experts, not with those that are stored, until `repack`
        """
        pool = instead or self.pool
        self._dense = torch.stack([pool.expert(e) for e in range(self.experts)])

    def repack(self) -> None:
        """Undo `unpack`."""
        self._dense = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        rows = x.reshape(-1, self.in_features)
        experts = None
        if self.experts > 1:
            experts = route(rows, self.router_weight, self.router_bias)
        weight_of = self.pool.expert if self._dense is None else self._dense.__getitem__
        y = reference.multiply(rows, experts, weight_of, self.experts, self.out_features)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"experts={self.experts}, versions={self.weight_mask.shape[0]}, "
            f"nnz={self.weight.numel()}, bias={self.bias is not None}"
        )
