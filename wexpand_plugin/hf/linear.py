"""The routed linear as a torch module: each token uses the sparse weights of its own expert.

This is the reference the serving kernels are compared with. Its parameters and buffers carry the
names of the checkpoint's tensors, so a state dict is a checkpoint. A weight that is 1-D cannot be
mistaken for an ordinary linear's.
"""

import copy
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..format.clusters import ClusterBias, expert_of
from ..format.config import KINDS, LinearEntry
from ..format.linear import StoredLinear
from ..format.router import StoredRouter, narrowest
from ..format.rowpool import RowPool
from ..format.values import codec_of
from ..kernels import reference

__all__ = ["RoutedLinear", "replaceable"]

# loaded in float32, which every device computes with, whatever they are stored in
WIDENED = ("router_weight", "router_bias", "weight_scale", "cluster_bias_scale")


def replaceable(module: Any) -> TypeGuard[nn.Linear]:
    """Whether a routed linear can take the place of `module`, on any device.

    That is a torch.nn.Linear, or of a class derived from it that computes the same, as Falcon's
    does: it is tried with a small weight. Routers of mixtures are derived from it and return more;
    the output projection of torch's own attention has its weight read and is never called.
    """
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    x = torch.arange(-3.0, 3.0, device="cpu").reshape(2, 3)
    weight, bias = x.square(), None if module.bias is None else x[0, :2].clone()
    tried = copy.copy(module)
    tried.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    try:
        found = type(module).forward(tried, x)
    except Exception:  # another class's forward raises what it likes about sizes it does not have
        return False
    return isinstance(found, Tensor) and torch.equal(found, nn.functional.linear(x, weight, bias))


class RoutedLinear(nn.Module):
    """y = W_e x + b + B_c, c being the cluster that the router gives x and e the expert of c.

    Without cluster biases there is no B; one cluster needs no router.

    :param entry: its sizes; the tensors are empty
    :param group: name of its input group, any that the linears of the group share; "" for none
    :param tokens: calibration tokens per cluster, where known
    :param dtype: of float weights and bias, by default the entry's
    """

    weight: Tensor
    weight_mask: Tensor | None
    weight_scale: Tensor | None
    row_map: Tensor | None
    router_weight: Tensor | None
    router_bias: Tensor | None
    cluster_expert: Tensor | None
    cluster_bias: Tensor | None
    cluster_bias_scale: Tensor | None
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
        self.experts, self.clusters = entry.experts, entry.clusters
        for kind in KINDS:
            self._set(kind, None)
        self._dense: Tensor | None = None
        self._dense_biases: Tensor | None = None
        for kind, (shape, dtypes) in entry.shapes().items():
            of = dtypes[0]
            if kind in WIDENED:
                of = torch.float32
            elif of.is_floating_point:
                of = dtype or getattr(torch, entry.dtype)
            self._set(kind, torch.empty(shape, dtype=of, device=device))

    def _set(self, kind: str, tensor: Tensor | None) -> None:
        """Give a tensor its place: bit patterns and numbers are buffers, the rest parameters."""
        if kind in ("weight_mask", "row_map", "cluster_expert"):
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
        cluster_bias: ClusterBias | None = None,
        cluster_expert: Tensor | None = None,
        group: str = "",
        tokens: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ) -> "RoutedLinear":
        """A module holding these tensors.

        :param router: needed for more than one expert or cluster
        :param cluster_expert: [clusters], the expert of each; needed where there are more clusters
            than experts, and more experts than one
        :param dtype: of the dense weight, by default that of a float pool's values
        :raises WexpandError: parts that do not fit each other
        """
        dtype = dtype or (torch.float32 if pool.codec.scaled else pool.codec.storage)
        if router is not None:
            router = StoredRouter(*router)
            # a copy for each linear of the group: transformers refuses to save shared tensors
            router = router._replace(
                weight=narrowest(router.weight.detach()).clone(),
                bias=router.bias.detach().float().clone(),
            )
        if cluster_expert is not None:
            cluster_expert = cluster_expert.to(torch.uint8, copy=True)
        if bias is not None:
            bias = bias.detach()
        stored = StoredLinear(pool, router, bias, cluster_bias, cluster_expert)
        module = cls(stored.entry(dtype), group, tokens, device="meta")
        for kind, tensor in stored.tensors().items():
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
        return StoredRouter(self.router_weight.data, self.router_bias.data, self.entry.parents)

    @property
    def cluster_biases(self) -> ClusterBias | None:
        """What the clusters add to the output; shares its tensors."""
        if self.cluster_bias is None or self.cluster_bias_scale is None:
            return None
        return ClusterBias(self.cluster_bias.data, self.cluster_bias_scale.data.half())

    @property
    def stored(self) -> StoredLinear:
        """All of it; shares its tensors."""
        bias = None if self.bias is None else self.bias.data
        return StoredLinear(
            self.pool, self.router, bias, self.cluster_biases, self.cluster_expert
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight that this linear stands for."""
        floats = self.weight.is_floating_point()
        return self.weight.dtype if floats else getattr(torch, self.entry.dtype)

    def stored_bytes(self) -> int:
        """Bytes of all tensors in a checkpoint, but for the dense linear's own bias."""
        stored = self.stored._replace(bias=None)
        if stored.router is not None:
            narrow = narrowest(stored.router.weight)
            stored = stored._replace(router=stored.router._replace(weight=narrow))
        return sum(tensor.nbytes for tensor in stored.tensors().values())

    def dense_bytes(self) -> int:
        """Bytes of the dense weight that this linear stands for."""
        return self.in_features * self.out_features * self.dtype.itemsize

    def materialise(
        self, weights: Tensor | None = None, biases: Tensor | None = None
    ) -> None:
        """Keep dense experts [experts, out, in] at hand: fast, at `experts` times the memory.

        :param weights: to compute with, instead of those that are stored, until `dematerialise`
        :param biases: float [clusters, out], likewise, instead of the stored biases of clusters
        """
        if weights is None:
            pool = self.pool
            weights = torch.stack([pool.expert(e) for e in range(self.experts)])
        self._dense, self._dense_biases = weights, biases

    @property
    def computes_with(self) -> tuple[Tensor | None, Tensor | None]:
        """What `materialise` keeps at hand, None for what it does not."""
        return self._dense, self._dense_biases

    def dematerialise(self) -> None:
        """Undo `materialise`."""
        self._dense = self._dense_biases = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        rows = x.reshape(-1, self.in_features)
        router, biases = self.router, self.cluster_biases
        clusters = experts = None
        if router is not None:
            clusters = router.route(rows)
            experts = expert_of(clusters, self.cluster_expert, self.experts)
        weight_of = self.pool.expert if self._dense is None else self._dense.__getitem__
        y = reference.multiply(rows, experts, weight_of, self.experts, self.out_features)
        shift: Tensor | None
        if self._dense_biases is not None:
            shift = self._dense_biases[0 if clusters is None else clusters]
        else:
            shift = None if biases is None else biases.of(clusters)
        y = reference.biased(y, self.bias, shift)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> "RoutedLinear":
        """As of every module, but for casts: routers and scales stay float32, so that after
        `model.to(torch.bfloat16)` tokens are routed, and values scaled, as before."""
        wide = {kind: p for kind in WIDENED if (p := getattr(self, kind)) is not None}
        values = {kind: parameter.data for kind, parameter in wide.items()}
        super()._apply(fn, recurse)
        for kind, value in values.items():
            found = getattr(self, kind)
            if found.dtype != value.dtype:
                found.data = value.to(found.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"experts={self.experts}, clusters={self.clusters}, "
            f"versions={self.entry.versions}, nnz={self.entry.nnz}, "
            f"values={self.entry.values}, bias={self.bias is not None}, "
            f"cluster_bias={self.entry.cluster_bias}"
        )
