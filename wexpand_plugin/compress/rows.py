"""From row versions to a routed linear in the place of the dense one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from compressed_tensors.offload import OffloadCache, get_cache_init_kwargs, offload_module
from torch import Tensor, nn

from ..format.router import StoredRouter
from ..format.rowpool import RowPool
from ..format.sizes import StoredBytes
from ..format.values import codec_of
from ..hf.linear import RoutedLinear
from ..method.clusters import Router
from ..method.settings import Settings
from ..method.versions import RowVersions

__all__ = ["packed", "replace_linear", "settings_for"]


def settings_for(weight_dtype: torch.dtype, settings: Settings) -> Settings:
    """`settings` that know what the rows of a linear of this dtype weigh, and how to pack them."""
    weighs = StoredBytes(codec_of(weight_dtype), weight_dtype)
    return replace(settings, stored_bytes=weighs, keep=_PackedRows)


class _PackedRows:
    """Rows [n, in] kept packed, in main memory."""

    def __init__(self, rows: Tensor):
        self.device, self.pool = rows.device, RowPool.pack(rows).to("cpu")

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.pool[index.cpu()].to(self.device)


def packed(versions: RowVersions) -> RowPool:
    """The row pool that stores `versions`."""
    if len(versions.rows) == versions.row_map.numel():  # in full: some rows may still be equal
        return RowPool.pack_experts(versions.dense())
    return RowPool.pack(versions.rows, versions.row_map.to(versions.rows.device))


def replace_linear(
    model: nn.Module,
    name: str,
    old: nn.Linear | RoutedLinear,
    pool: RowPool,
    router: Router | StoredRouter | None = None,
    *,
    group: str = "",
    tokens: Sequence[int] = (),
) -> RoutedLinear:
    """Put a routed linear in the place of `old`, with its bias, offloaded like it.

    :param group: name of its input group
    :param tokens: calibration tokens per expert
    """
    bias = None if old.bias is None else old.bias.detach()
    stored = None if router is None else StoredRouter(*router)
    module = RoutedLinear.from_pool(pool, stored, bias, group=group, tokens=tokens)
    if isinstance(old._parameters, OffloadCache):
        offload_module(module, **get_cache_init_kwargs(old))
    model.set_submodule(name, module)
    return module
