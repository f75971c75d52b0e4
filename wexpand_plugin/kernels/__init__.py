"""Kernels for the routed linear, and the choice between them.

A kernel is a module that satisfies `Kernel`; each keeps a row pool in a layout of its own, which
nobody else looks into. Values keep their codec in it, a router its dtype
(`format.router.ROUTER_DTYPES`), sums are float32. The fast kernels never synchronise with a GPU
and no shape depends on data, so a CUDA graph can hold them. The reference does both: it is chosen
by itself on CPUs only, where it is merely slow.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..errors import WexpandError
from ..format.clusters import ClusterBias
from ..format.rowpool import RowPool
from ..format.values import ValueCodec

if TYPE_CHECKING:
    from . import cpu, reference, triton

__all__ = ["Kernel", "LayerShape", "choose", "get"]

NAMES = ("cpu", "triton", "reference")


class LayerShape(NamedTuple):
    """What a kernel may decide by, known before anything is loaded."""

    in_features: int
    out_features: int
    experts: int
    sparsity: float
    """share of the weights that are not kept"""
    codec: ValueCodec | None = None
    """of integer values; None for floats, which take the dtype that is computed in"""

    @classmethod
    def of(cls, pool: RowPool) -> "LayerShape":
        """The shape of a layer with this row pool."""
        sparsity = 1 - pool.nnz / (pool.versions * pool.in_features)
        codec = pool.codec if pool.codec.scaled else None
        return cls(pool.in_features, pool.out_features, pool.experts, sparsity, codec)


class Kernel(Protocol):
    """`x` is [tokens, in]; `experts` int64 [tokens], or None where the pool has one expert;
    `clusters` int64 [tokens], or None where there is one bias for all."""

    name: str
    """shown in the one log line that says what was chosen"""

    def unavailable(
        self, device: torch.device, dtype: torch.dtype, shape: LayerShape
    ) -> str | None:
        """Why it cannot run a layer of this shape on `device` for x of `dtype`; None if it can."""

    def prepare(self, pool: RowPool, dtype: torch.dtype) -> list[Tensor]:
        """The row pool in this kernel's own layout for x of `dtype`, made once at load."""

    def run(
        self,
        x: Tensor,
        experts: Tensor | None,
        layout: list[Tensor],
        out_features: int,
        bias: Tensor | None = None,
        clusters: Tensor | None = None,
        cluster_bias: ClusterBias | None = None,
    ) -> Tensor:
        """y [tokens, out] = each token of x times its expert, plus `bias` [out] and the bias of its
        cluster, in the dtype of x."""

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
        """Cluster of each token, int64 [tokens], by the router of these parts (`StoredRouter`)."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """float32 [tokens, rows] = x times the router's `weight` [rows, in], no bias: what ranks
        that have some of the columns each add up before they choose (`format.router.choice`)."""


if TYPE_CHECKING:
    _all: tuple[Kernel, ...] = (cpu, triton, reference)


def get(name: str) -> Kernel:
    """The kernel called `name`."""
    if name not in NAMES:
        raise WexpandError(f"kernel: {name!r} is not one of {', '.join(NAMES)}")
    return cast(Kernel, import_module(f"{__name__}.{name}"))


def choose(device: torch.device, dtype: torch.dtype, shape: LayerShape) -> tuple[Kernel, str]:
    """The fastest kernel for such a layer on `device` with x of `dtype`, and a line for the log.

    The environment variable WEXPAND_KERNEL (cpu, triton or reference) overrides the choice.

    :raises WexpandError: the kernel that it names cannot run, or no fast one can and this is no CPU
    """
    forced = os.environ.get("WEXPAND_KERNEL")
    if forced and forced not in NAMES:
        raise WexpandError(f"WEXPAND_KERNEL: {forced!r} is not one of {', '.join(NAMES)}")
    refused: list[str] = []
    # the reference synchronises with a GPU, which a CUDA graph refuses: there only if asked for
    own = NAMES if device.type == "cpu" else NAMES[:-1]
    for name in (forced,) if forced else own:
        kernel = get(name)
        reason = kernel.unavailable(device, dtype, shape)
        if reason is None:
            skipped = f" ({'; '.join(refused)})" if refused else ""
            return kernel, f"{name} kernel on {device.type}, {dtype}{skipped}"
        refused.append(f"{name}: {reason}")
    if forced:
        raise WexpandError(f"WEXPAND_KERNEL: {'; '.join(refused)}")
    raise WexpandError(
        f"kernel: none runs on {device.type}, {dtype} ({'; '.join(refused)}); the slow reference "
        "does, with WEXPAND_KERNEL=reference and --enforce-eager"
    )
