"""The tensors of one layer, from their arrival in any order until they are checked.

vLLM hands the tensors of a fused layer over one by one as they stand in the files, each with a
shard id: "q", "k", "v", an index, several indices, or None where the file holds the fused tensor.
They are kept as they came, because checksums hold for the bytes on disk, and put together only
when all are there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import WexpandError
from ..format.checks import check_linear
from ..format.config import CheckpointConfig as WexpandConfig
from ..format.router import Router
from ..format.rowpool import RowPool, finite
from ..format.values import FLOATS

__all__ = ["Member", "Parts"]

_QKV = {"q": 0, "k": 1, "v": 2}


class Member(NamedTuple):
    """One linear of a (fused) layer, checked."""

    name: str
    covers: tuple[int, ...]
    """the shards of the layer that it fills"""
    pool: RowPool
    router: Router | None
    bias: Tensor | None


class Parts:
    """Collects a layer's tensors; `members` checks them and lets them go."""

    def __init__(self, prefix: str, names: list[str], shards: int, config: WexpandConfig):
        self.prefix, self.names, self.shards, self.config = prefix, names, shards, config
        self._tensors: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._taken = False

    def loader(self, kind: str) -> Callable[..., None]:
        """The `weight_loader` of the parameter `kind`."""

        def weight_loader(param, loaded_weight: Tensor, shard_id=None) -> None:
            if self._taken:
                raise WexpandError(
                    f"{self.prefix}.{kind}: a running engine cannot load expanded weights again; "
                    "start a new one"
                )
            self._tensors.setdefault(self._covers(shard_id), {})[kind] = loaded_weight

        return weight_loader

    def _covers(self, shard_id) -> tuple[int, ...]:
        if shard_id is None:
            return tuple(range(self.shards))
        ids = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        covers: tuple[Any, ...] = tuple(_QKV.get(i, i) for i in ids)
        if not all(isinstance(i, int) and 0 <= i < self.shards for i in covers):
            raise WexpandError(
                f"{self.prefix}: vLLM loads a part {shard_id!r} of it, which is not known here"
            )
        return covers

    def members(self) -> list[Member]:
        """The layer's linears in the order of its rows.

        :raises WexpandError: naming the tensor that is missing, damaged or inconsistent, and its
            file where that is known
        """
        tensors, self._tensors, self._taken = self._tensors, {}, True
        if not tensors:
            raise WexpandError(
                f"{self.prefix}: no tensor of it was loaded; an expanded model needs its "
                "checkpoint's tensors (--load-format dummy cannot stand in for them)"
            )
        if len(self.names) == self.shards:
            covers: list[tuple[int, ...]] = [(i,) for i in range(self.shards)]
        elif len(self.names) == 1:
            covers = [tuple(range(self.shards))]
        else:
            covers = sorted(tensors)
        if len(covers) != len(self.names) or not set(tensors) <= set(covers):
            raise WexpandError(
                f"{self.prefix}: vLLM loaded parts {sorted(tensors)} of it, which do not "
                f"match its linears {', '.join(self.names)}"
            )
        return [
            self._member(name, cover, tensors.get(cover, {}))
            for name, cover in zip(self.names, covers, strict=True)
        ]

    def _member(self, name: str, covers: tuple[int, ...], tensors: dict[str, Tensor]) -> Member:
        entry = self.config.linears.get(name)
        if entry is None:
            pool, router = self._dense(name, tensors), None
        else:
            own = tensors if entry.bias else {k: v for k, v in tensors.items() if k != "bias"}
            pool, router = check_linear(name, entry, own)
        bias = tensors.get("bias")
        if entry is None or not entry.bias:
            self._check_bias(f"{name}.bias", bias, pool)
        return Member(name, covers, pool, router, bias)

    def _dense(self, name: str, tensors: dict[str, Tensor]) -> RowPool:
        """A linear that was not expanded, next to one that was: full rows, 1/16 more bytes."""
        weight = tensors.get("weight")
        if weight is None or weight.dim() != 2 or set(tensors) - {"weight", "bias"}:
            found = "missing" if weight is None else f"shape {list(weight.shape)}"
            raise WexpandError(
                f"{name}.weight: {found}, with {', '.join(sorted(tensors)) or 'no tensors'}; "
                "config.json does not list it as expanded, so it should be [out, in] and alone"
            )
        self._check_dense(f"{name}.weight", weight)
        return RowPool.pack(weight, keep=torch.ones_like(weight, dtype=torch.bool))

    def _check_bias(self, tensor: str, value: Tensor | None, pool: RowPool) -> None:
        """A bias that no entry promises: that of a dense linear, or of zeros, made by vLLM."""
        if value is None:
            return
        if tuple(value.shape) != (pool.out_features,):
            raise WexpandError(
                f"{tensor}: shape {list(value.shape)} should be [{pool.out_features}]"
            )
        self._check_dense(tensor, value)

    def _check_dense(self, tensor: str, value: Tensor) -> None:
        if value.dtype not in FLOATS.values():
            raise WexpandError(
                f"{tensor}: dtype {value.dtype} should be float32, bfloat16 or float16"
            )
        if not finite(value):
            raise WexpandError(f"{tensor}: holds NaN or infinite values")
