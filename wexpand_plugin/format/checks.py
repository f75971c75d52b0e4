"""The rules of the format: what every reader checks of a linear before it uses a tensor.

Shapes, dtypes, ranges, bit counts and finiteness, by `check_linear`: transformers and vLLM call it
on what they have loaded, `wexpand verify` on what it reads. What it accepts, computes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import WexpandError
from .clusters import ClusterBias
from .config import LinearEntry
from .linear import StoredLinear
from .router import StoredRouter
from .rowpool import RowPool, finite

__all__ = ["check_affine", "check_form", "check_linear", "check_pool"]


def check_linear(name: str, entry: LinearEntry, tensors: Mapping[str, Tensor]) -> StoredLinear:
    """Check the tensors of linear `name` and put them together.

    :param entry: the sizes that config.json promises
    :param tensors: kind -> tensor ("weight", "weight_mask", ...), as read, before any cast
    :raises WexpandError: naming the tensor, what was found and what would be right
    """
    expected = entry.shapes()
    for kind, (shape, dtypes) in expected.items():
        tensor = tensors.get(kind)
        if tensor is None:
            raise _error(name, kind, f"missing; config.json promises {list(shape)}")
        check_form(f"{name}.{kind}", tuple(tensor.shape), tensor.dtype, shape, dtypes)
    if unknown := sorted(set(tensors) - set(expected)):
        raise _error(name, unknown[0], "config.json promises no such tensor")
    pool = RowPool(
        entry.codec,
        entry.in_features,
        tensors["weight"],
        tensors.get("weight_mask"),
        tensors.get("row_map"),
        tensors.get("weight_scale"),
    )
    check_pool(pool, name)
    router = biases = None
    if entry.clusters > 1:
        router = StoredRouter(tensors["router_weight"], tensors["router_bias"], entry.parents)
    if entry.cluster_bias:
        biases = ClusterBias(tensors["cluster_bias"], tensors["cluster_bias_scale"])
    linear = StoredLinear(
        pool, router, tensors.get("bias"), biases, tensors.get("cluster_expert")
    )
    check_affine(name, linear)
    return linear


def check_affine(name: str, linear: StoredLinear) -> None:
    """Check the content of all but the pool: router, biases, and what expert a cluster has.

    :raises WexpandError: naming the tensor, what was found and what would be right
    """
    pool, router, bias, biases, cluster_expert = linear
    if router is not None:
        _check_finite(name, "router_weight", router.weight)
        _check_finite(name, "router_bias", router.bias)
    if bias is not None:
        _check_finite(name, "bias", bias)
    if biases is not None and (not finite(biases.scale) or bool((biases.scale < 0).any())):
        raise _error(name, "cluster_bias_scale", "holds NaN, infinite or negative scales")
    if cluster_expert is not None:
        used = torch.bincount(cluster_expert, minlength=pool.experts)
        if len(used) > pool.experts:
            last = pool.experts - 1
            problem = f"{len(used) - 1} is not 0 to {last}, an expert of the linear"
            raise _error(name, "cluster_expert", problem)
        if not bool(used.all()):
            problem = f"no cluster has expert {int(used.argmin())}, of {pool.experts}"
            raise _error(name, "cluster_expert", problem)


def _check_finite(name: str, kind: str, tensor: Tensor) -> None:
    if not finite(tensor):
        raise _error(name, kind, "holds NaN or infinite values")


def check_form(
    tensor: str,
    found: tuple[int, ...],
    dtype: torch.dtype | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise WexpandError unless a tensor has the shape and a dtype that config.json promises."""
    if found != shape:
        raise WexpandError(
            f"{tensor}: shape {list(found)} should be {list(shape)} by config.json", tensor
        )
    if dtype not in dtypes:
        right = " or ".join(str(dtype) for dtype in dtypes)
        raise WexpandError(f"{tensor}: dtype {dtype} should be {right}", tensor)


def check_pool(pool: RowPool, name: str = "row pool") -> RowPool:
    """Check every rule of a pool that its tensors alone can break; return it.

    :raises WexpandError: naming `name`.weight, .weight_mask, .weight_scale or .row_map, the value
        found and the value expected
    """
    codec, width = pool.codec, (pool.in_features + 7) // 8
    if pool.values.dim() != 1:
        raise _error(name, "weight", f"shape {list(pool.values.shape)} should be one-dimensional")
    if pool.values.dtype != codec.storage:
        raise _error(name, "weight", f"dtype {pool.values.dtype} should be {codec.storage}")
    if (pool.scale is not None) != codec.scaled:
        raise _error(name, "weight_scale", f"there, or not there, against values of {codec}")
    if pool.mask is not None:
        if pool.mask.dtype != torch.uint8:
            raise _error(name, "weight_mask", f"dtype {pool.mask.dtype} should be uint8")
        if pool.mask.dim() != 2 or pool.mask.shape[1] != width:
            raise _error(
                name,
                "weight_mask",
                f"shape {list(pool.mask.shape)} should be [versions, {width}] for "
                f"{pool.in_features} input columns",
            )
        spare = width * 8 - pool.in_features
        if spare and bool((pool.mask[:, -1] >> (8 - spare)).any()):
            last = pool.in_features - 1
            raise _error(name, "weight_mask", f"sets a bit past column {last}, the last one")
    if pool.scale is not None:
        right = [pool.versions, codec.scales(pool.in_features)]
        if pool.scale.dtype != torch.float16 or list(pool.scale.shape) != right:
            raise _error(
                name,
                "weight_scale",
                f"{pool.scale.dtype} {list(pool.scale.shape)} should be float16 {right}",
            )
        if not finite(pool.scale) or bool((pool.scale < 0).any()):
            raise _error(name, "weight_scale", "holds NaN, infinite or negative scales")
    if pool.row_map is not None:
        _check_row_map(pool, name)
    kept = pool.kept()
    elements = int(codec.elements(kept).sum())
    if elements != pool.values.numel():
        raise _error(
            name,
            "weight" if pool.mask is None else "weight_mask",
            f"rows keep {int(kept.sum())} weights, which take {elements} elements of "
            f"{name}.weight, but it holds {pool.values.numel()}",
        )
    if codec.storage.is_floating_point:
        if not finite(pool.values):
            raise _error(name, "weight", "holds NaN or infinite values")
    elif codec.packed:
        used = kept * codec.bits % 8  # bits of a row's last byte; 0: all
        ends = pool.values[pool.starts()[1:][used > 0] - 1]
        if bool((ends >> used[used > 0].to(torch.uint8)).any()):
            raise _error(name, "weight", "sets a bit past a row's last weight")
    return pool


def _check_row_map(pool: RowPool, name: str) -> None:
    row_map = pool.row_map
    assert row_map is not None
    if row_map.dtype != torch.uint8:
        raise _error(name, "row_map", f"dtype {row_map.dtype} should be uint8")
    if row_map.dim() != 2 or row_map.numel() == 0:
        raise _error(name, "row_map", f"shape {list(row_map.shape)} should be [experts, out]")
    used = int(pool.first_versions()[-1])
    if used != pool.versions:
        raise _error(
            name,
            "row_map",
            f"its neurons have {used} row versions together, by their largest numbers, but there "
            f"are {pool.versions}",
        )


def _error(name: str, kind: str, problem: str) -> WexpandError:
    return WexpandError(f"{name}.{kind}: {problem}", f"{name}.{kind}")
