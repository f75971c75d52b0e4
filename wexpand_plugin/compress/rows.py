"""From row versions to a routed linear in the place of the dense one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from compressed_tensors.offload import OffloadCache, get_cache_init_kwargs, offload_module
from torch import Tensor, nn

from ..errors import WexpandError
from ..format.clusters import ClusterBias
from ..format.router import StoredRouter
from ..format.rowpool import RowPool, finite
from ..format.sizes import StoredBytes
from ..format.values import ValueCodec, codec, codec_of
from ..hf.linear import RoutedLinear
from ..method.clusters import Router
from ..method.settings import Settings
from ..method.versions import RowVersions, SolvedRows
from .precision import stored_dtype
from .records import recorded

__all__ = [
    "PackedRows",
    "codec_for",
    "packed",
    "packed_biases",
    "replace_linear",
    "settings_for",
]


def codec_for(weight_dtype: torch.dtype, settings: Settings) -> ValueCodec:
    """How the kept weights of a linear of this dtype are stored."""
    if settings.grid is None:
        return codec_of(weight_dtype)
    return codec(settings.values, settings.value_group)


def settings_for(weight_dtype: torch.dtype, settings: Settings) -> Settings:
    """`settings` that know what the rows of a linear of this dtype weigh, and how to pack them."""
    how = codec_for(weight_dtype, settings)
    weighs = StoredBytes(how, weight_dtype)
    return replace(settings, stored_bytes=weighs, keep=partial(PackedRows.pack, how))


@recorded
@dataclass(frozen=True)
class PackedRows:
    """Rows [n, in] kept packed, in main memory."""

    pool: RowPool
    device: str
    """where they are unpacked to"""
    dtype: str
    """and in what"""

    @classmethod
    def pack(cls, how: ValueCodec, rows: SolvedRows) -> "PackedRows":
        """Solved `rows`, as `how` stores them."""
        weights, dtype = rows.weights, str(rows.weights.dtype).removeprefix("torch.")
        pool = RowPool.pack(weights, codec=how, scale=rows.scales).to("cpu")
        return cls(pool, str(weights.device), dtype)

    def __getitem__(self, index: Tensor) -> SolvedRows:
        scales = None if self.pool.scale is None else self.pool.scale[index.cpu()]
        rows = SolvedRows(self.pool.rows(index.cpu(), getattr(torch, self.dtype)), scales)
        return rows.apply(lambda part: part.to(self.device))


def packed(
    versions: RowVersions, how: ValueCodec, experts: SolvedRows | None = None
) -> RowPool:
    """The row pool that stores `versions`.

    :param experts: `versions.experts()`, if they are known
    """
    rows, row_map = versions.rows, versions.row_map
    if len(rows.weights) == row_map.numel():  # in full: some rows may still be equal
        experts = experts or versions.experts()
        pool = RowPool.pack_experts(experts.weights, codec=how, scale=experts.scales)
    else:
        row_map = row_map.to(rows.weights.device)
        pool = RowPool.pack(rows.weights, row_map, codec=how, scale=rows.scales)
    return pool.smallest()


def packed_biases(versions: RowVersions) -> ClusterBias | None:
    """What `versions` add for each cluster, as it is stored."""
    if versions.cluster_bias is None:
        return None
    return ClusterBias.pack(versions.cluster_bias.to(versions.rows.weights.device))


def replace_linear(
    model: nn.Module,
    name: str,
    old: nn.Linear | RoutedLinear,
    pool: RowPool,
    router: Router | StoredRouter | None = None,
    *,
    group: str = "",
    tokens: Sequence[int] = (),
    bias: Tensor | None = None,
    cluster_bias: ClusterBias | None = None,
    cluster_expert: Tensor | None = None,
) -> RoutedLinear:
    """Put a routed linear in the place of `old`, offloaded like it.

    :param group: name of its input group
    :param tokens: calibration tokens per cluster
    :param bias, cluster_bias, cluster_expert: by default those of `old`
    :raises WexpandError: weights that are not finite
    """
    dtype = old.dtype if isinstance(old, RoutedLinear) else stored_dtype(model, old.weight)
    if pool.values.is_floating_point() and not finite(pool.values):
        raise WexpandError(
            f"{name}: what was found for its weights is NaN or overflows {dtype}; leave it out "
            f"with ignore: ['{name}'], or use more calibration tokens"
        )
    if bias is None and old.bias is not None:
        bias = old.bias.detach().to(dtype)
    if isinstance(old, RoutedLinear):
        cluster_bias = old.cluster_biases if cluster_bias is None else cluster_bias
        cluster_expert = old.cluster_expert if cluster_expert is None else cluster_expert
    module = RoutedLinear.from_pool(
        pool,
        None if router is None else StoredRouter(*router),
        bias,
        cluster_bias=cluster_bias,
        cluster_expert=cluster_expert,
        group=group,
        tokens=tokens,
        dtype=dtype,
    )
    if isinstance(old._parameters, OffloadCache):
        offload_module(module, **get_cache_init_kwargs(old))
    model.set_submodule(name, module)
    return module
