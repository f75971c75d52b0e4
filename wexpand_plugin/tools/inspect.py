"""What a checkpoint weighs, and where: `wexpand inspect`.

Reads headers, masks and row maps, never the values: a model of any size is inspected in seconds. A
dense directory can be inspected too, for comparison; its zeros have to be counted, so its weights
are read.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import WexpandError
from ..format import checkpoint
from ..format.checkpoint import LinearEntry, WexpandConfig
from ..format.rowpool import RowPool, kept

__all__ = ["Inspection", "LinearInspection", "inspect"]

KINDS = ("values", "mask", "row_map", "router", "bias")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class LinearInspection:
    """One linear. Bytes are those on disk; a router shared by an input group is stored with each
    of its linears, and read once per token."""

    name: str
    in_features: int
    out_features: int
    experts: int
    versions: int
    nnz: int
    """weights stored"""
    sparsity: float
    """share of weights not stored, over all row versions"""
    bytes: dict[str, int]
    """by kind: values, mask, row_map, router, bias"""
    dense_bytes: int
    """of this linear as one dense weight in the same dtype, with its bias"""
    bytes_per_token: float
    """that one token reads, a mean over experts (by their tokens where recorded)"""
    tokens: list[int] = field(default_factory=list)
    """calibration tokens per expert, empty where not recorded"""

    @property
    def stored_bytes(self) -> int:
        """On disk, of all kinds."""
        return sum(self.bytes.values())

    @property
    def balance(self) -> float | None:
        """Entropy of the tokens per expert over its maximum: 1 is even, 0 is one expert only."""
        total = sum(self.tokens)
        if self.experts == 1 or not total:
            return None
        shares = [count / total for count in self.tokens if count]
        return -sum(share * math.log(share) for share in shares) / math.log(self.experts)


@dataclass(frozen=True)
class Inspection:
    """A model directory; sums are over `linears`."""

    directory: str
    ours: bool
    """False: a dense model, not written by wexpand; its `linears` are dense"""
    linears: list[LinearInspection]
    disk_bytes: int
    """of all safetensors files"""
    made_by: dict[str, Any] = field(default_factory=dict)

    @property
    def linear_bytes(self) -> int:
        """On disk, of all `linears`."""
        return sum(linear.stored_bytes for linear in self.linears)

    @property
    def dense_bytes(self) -> int:
        """Of all `linears` as dense weights in the same dtype, biases included."""
        return sum(linear.dense_bytes for linear in self.linears)

    @property
    def bytes_per_token(self) -> float:
        """That one token reads of all `linears`, a mean over experts."""
        return sum(linear.bytes_per_token for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """Share of weights not stored, over all row versions of all `linears`."""
        weights = sum(linear.versions * linear.in_features for linear in self.linears)
        return 1 - sum(linear.nnz for linear in self.linears) / weights if weights else 0.0

    def bytes_by_kind(self) -> dict[str, int]:
        """`stored_bytes` of all `linears`, split into values, mask, row_map, router and bias."""
        return {kind: sum(linear.bytes[kind] for linear in self.linears) for kind in KINDS}

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "directory": self.directory,
            "ours": self.ours,
            "disk_bytes": self.disk_bytes,
            "linear_bytes": self.linear_bytes,
            "dense_bytes": self.dense_bytes,
            "bytes_per_token": self.bytes_per_token,
            "sparsity": self.sparsity,
            "bytes": self.bytes_by_kind(),
            "made_by": self.made_by,
            "linears": [
                asdict(linear) | {"stored_bytes": linear.stored_bytes, "balance": linear.balance}
                for linear in self.linears
            ],
        }


def inspect(directory: str | Path, linears: Collection[str] | None = None) -> Inspection:
    """Sizes of a checkpoint of ours, or of a dense model directory.

    :param linears: only these; by default all that are expanded, or all of a dense model's blocks
    :raises WexpandError: not a model directory, or tensors that contradict config.json
    """
    directory = Path(directory)
    values = checkpoint.read_json(directory / "config.json")
    found = values.get("quantization_config")
    ours = isinstance(found, dict) and found.get("quant_method") == checkpoint.QUANT_METHOD
    made_by: dict[str, Any] = {}
    if ours:
        config = checkpoint.read_config(directory)
        made_by = config.made_by
        files = checkpoint.tensor_files(directory)
        all_linears = _expanded(files, config, linears)
    elif found:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise WexpandError(f"{directory}: is quantised by {method!r}; wexpand cannot inspect it")
    else:
        files = checkpoint.tensor_files(checkpoint.weight_files(directory) or directory)
        all_linears = _dense(directory, files, linears)
    if missing := set(linears or ()) - {linear.name for linear in all_linears}:
        raise WexpandError(f"{directory}: has no linear {sorted(missing)[0]}")
    disk = sum(file.stat().st_size for file in set(files.values()))
    return Inspection(str(directory), ours, all_linears, disk, made_by)


def _expanded(
    files: dict[str, Path], config: WexpandConfig, only: Collection[str] | None
) -> list[LinearInspection]:
    found, routers = [], set()
    for name, entry in config.linears.items():
        if only is not None and name not in only:
            continue
        pool, router = _header_pool(files, name, entry)
        size = pool.values.element_size()
        bias = entry.out_features * size if entry.bias else 0
        tokens = torch.tensor(entry.tokens) if entry.tokens else None
        # equal routers are one router: that of an input group
        key = config.checksums.get(f"{name}.router_weight")
        read = pool.bytes_per_token(tokens) + bias + (router if key not in routers else 0)
        routers.add(key)
        found.append(
            LinearInspection(
                name=name,
                in_features=entry.in_features,
                out_features=entry.out_features,
                experts=entry.experts,
                versions=entry.versions,
                nnz=entry.nnz,
                sparsity=1 - entry.nnz / (entry.versions * entry.in_features),
                bytes=pool.stored_bytes() | {"router": router, "bias": bias},
                dense_bytes=entry.in_features * entry.out_features * size + bias,
                bytes_per_token=read,
                tokens=list(entry.tokens),
            )
        )
    return found


def _header_pool(files: dict[str, Path], name: str, entry: LinearEntry) -> tuple[RowPool, int]:
    """The pool of a linear without its values: mask and row map, and values of the right size;
    and the bytes of its router."""
    from safetensors import safe_open

    tensors = {}
    for kind, (shape, _) in entry.shapes().items():
        tensor = f"{name}.{kind}"
        if tensor not in files:
            raise WexpandError(f"{tensor}: missing; config.json promises {list(shape)}")
        with safe_open(files[tensor], framework="pt") as handle:
            header = handle.get_slice(tensor)
            if tuple(header.get_shape()) != shape:
                raise WexpandError(
                    f"{files[tensor]}: {tensor}: shape {header.get_shape()} should be "
                    f"{list(shape)} by config.json"
                )
            if kind in ("weight_mask", "row_map"):
                tensors[kind] = handle.get_tensor(tensor)
            else:
                dtype = _DTYPES.get(header.get_dtype(), torch.float32)
                tensors[kind] = torch.empty(shape, dtype=dtype, device="meta")
    row_map = tensors["row_map"]
    if row_map.min() < 0 or row_map.max() >= entry.versions:
        raise WexpandError(
            f"{files[f'{name}.row_map']}: {name}.row_map: holds row versions outside 0 to "
            f"{entry.versions - 1}"
        )
    pool = RowPool(tensors["weight"], tensors["weight_mask"], row_map, entry.in_features)
    routers = (tensors[kind].nbytes for kind in ("router_weight", "router_bias") if kind in tensors)
    return pool, sum(routers)


def _dense(
    directory: Path, files: dict[str, Path], only: Collection[str] | None
) -> list[LinearInspection]:
    from ..hf.names import linear_tensors, skeleton

    wanted = {
        tensor: name
        for tensor, name in linear_tensors(skeleton(directory), files).items()
        if only is None or name in only
    }
    biases = {tensor: files[tensor] for n in wanted.values() if (tensor := f"{n}.bias") in files}
    bias_bytes = {name: tensor.nbytes for name, tensor in checkpoint.tensors_of(biases)}
    found = []
    weights = checkpoint.tensors_of({t: files[t] for t in wanted})
    # only on a terminal: scripts read what is printed
    for tensor, weight in tqdm(weights, "inspect", len(wanted), leave=False, disable=None):
        name, nnz = wanted[tensor], int(kept(weight).sum())
        sizes = dict.fromkeys(KINDS, 0)
        sizes |= {"values": weight.nbytes, "bias": bias_bytes.get(f"{name}.bias", 0)}
        found.append(
            LinearInspection(
                name=name,
                in_features=weight.shape[1],
                out_features=weight.shape[0],
                experts=1,
                versions=weight.shape[0],
                nnz=nnz,
                sparsity=1 - nnz / weight.numel(),
                bytes=sizes,
                dense_bytes=sum(sizes.values()),
                bytes_per_token=sum(sizes.values()),
            )
        )
    order = list(wanted.values())
    return sorted(found, key=lambda linear: order.index(linear.name))
