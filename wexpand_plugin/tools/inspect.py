"""What a checkpoint weighs, and where: `wexpand inspect`.

Reads headers, masks and row maps, never the values: a model of any size is inspected in seconds. A
dense directory can be inspected too, for comparison; its zeros have to be counted, so its weights
are read.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import WexpandError
from ..format.clusters import tokens_per_expert
from ..format.config import GroupEntry, LinearEntry
from ..format.model_dir import ModelDir
from ..format.problems import ROUTER
from ..format.router import rows_read
from ..format.rowpool import RowPool, kept

__all__ = ["Inspection", "LinearInspection", "inspect", "is_number"]

KINDS = ("values", "mask", "scale", "row_map", "router", "cluster_bias", "bias")


@dataclass(frozen=True)
class LinearInspection:
    """One linear. Bytes are those on disk; a router shared by an input group is stored with each
    of its linears, and read once per token."""

    name: str
    in_features: int
    out_features: int
    experts: int
    clusters: int
    """that the router tells apart; as many as experts, or more"""
    versions: int
    nnz: int
    """weights stored"""
    sparsity: float
    """share of weights not stored, over all row versions"""
    values: str
    """how kept weights are stored: bfloat16, int4, ..."""
    bytes: dict[str, int]
    """by kind: values, mask, scale, row_map, router, cluster_bias, bias"""
    dense_bytes: int
    """of the dense weight that this linear stands for, with its bias"""
    bytes_per_token: float
    """that one token reads, a mean over experts (by their tokens where recorded)"""
    tokens: list[int] = field(default_factory=list)
    """calibration tokens per cluster, empty where not recorded"""

    @property
    def stored_bytes(self) -> int:
        """On disk, of all kinds."""
        return sum(self.bytes.values())

    @property
    def balance(self) -> float | None:
        """Entropy of the tokens per cluster over its maximum: 1 is even, 0 is one cluster only."""
        total = sum(self.tokens)
        if self.clusters == 1 or not total:
            return None
        shares = [count / total for count in self.tokens if count]
        return -sum(share * math.log(share) for share in shares) / math.log(self.clusters)


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

    def made(self, key: str) -> dict[str, Any]:
        """An object that config.json says of how the model was made; empty if it says another
        thing, as nothing depends on it."""
        found = self.made_by.get(key)
        return found if isinstance(found, dict) else {}

    def bytes_by_kind(self) -> dict[str, int]:
        """`stored_bytes` of all `linears`, split by kind."""
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


def is_number(value: Any) -> bool:
    """Whether JSON has a number there."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def inspect(directory: str | Path, linears: Collection[str] | None = None) -> Inspection:
    """Sizes of a checkpoint of ours, or of a dense model directory.

    :param linears: only these; by default all that are expanded, or all of a dense model's blocks
    :raises WexpandError: not a model directory, or tensors that contradict config.json
    """
    model = ModelDir(directory)
    if model.ours:
        found = [
            linear
            for group in model.config.groups
            for linear in _group(model, group)
            if linears is None or linear.name in linears
        ]
    elif model.quant_method:
        method = model.quant_method
        raise WexpandError(f"{directory}: is quantised by {method!r}; wexpand cannot inspect it")
    else:
        found = _dense(model, linears)
    if missing := set(linears or ()) - {linear.name for linear in found}:
        raise WexpandError(f"{directory}: has no linear {sorted(missing)[0]}")
    made_by = model.config.made_by if model.ours else {}
    return Inspection(str(directory), model.ours, found, model.disk_bytes, made_by)


def _group(model: ModelDir, group: GroupEntry) -> Iterator[LinearInspection]:
    """The linears of an input group; its router is stored with each, and read once per token."""
    for number, (name, entry) in enumerate(group.linears.items()):
        sizes = {kind: model.header(name, kind).nbytes for kind in entry.shapes()}
        pool = _header_pool(model, name, entry)
        stored = pool.stored_bytes() | {
            "router": sum(sizes[kind] for kind in ROUTER if kind in sizes),
            "cluster_bias": sum(size for kind, size in sizes.items() if "cluster_bias" in kind),
            "bias": sizes.get("bias", 0),
        }
        read = pool.bytes_per_token(_tokens_per_expert(model, name, group)) + stored["bias"]
        if entry.cluster_bias:  # one row, and the scales
            read += sizes["cluster_bias"] / entry.clusters + sizes["cluster_bias_scale"]
        if number == 0 and entry.clusters > 1:
            share = rows_read(entry.clusters, entry.parents) / (entry.parents + entry.clusters)
            read += (sizes["router_weight"] + sizes["router_bias"]) * share
            read += "cluster_expert" in sizes
        yield LinearInspection(
            name=name,
            in_features=entry.in_features,
            out_features=entry.out_features,
            experts=entry.experts,
            clusters=entry.clusters,
            versions=entry.versions,
            nnz=entry.nnz,
            sparsity=1 - entry.nnz / (entry.versions * entry.in_features),
            values=str(entry.codec),
            bytes=stored,
            dense_bytes=entry.dense_bytes + stored["bias"],
            bytes_per_token=read,
            tokens=list(group.tokens),
        )


def _tokens_per_expert(model: ModelDir, name: str, group: GroupEntry) -> torch.Tensor | None:
    """Calibration tokens [experts]; None where they were not recorded, or one expert has all."""
    if not group.tokens or group.experts == 1:
        return None
    named = None
    if group.experts < group.clusters:
        named = model.read(f"{name}.cluster_expert")
    return tokens_per_expert(group.tokens, named, group.experts)


def _header_pool(model: ModelDir, name: str, entry: LinearEntry) -> RowPool:
    """The pool of a linear with nothing for its values and scales: right in size, no memory."""

    def tensor(kind: str) -> torch.Tensor | None:
        if kind not in entry.shapes():
            return None
        if kind in ("weight_mask", "row_map"):
            return model.read(f"{name}.{kind}")
        header = model.header(name, kind)
        return torch.zeros((), dtype=header.dtype).expand(header.shape)

    values = tensor("weight")
    assert values is not None
    pool = RowPool(
        entry.codec,
        entry.in_features,
        values,
        tensor("weight_mask"),
        tensor("row_map"),
        tensor("weight_scale"),
    )
    if pool.row_map is not None and (found := int(pool.first_versions()[-1])) != entry.versions:
        raise WexpandError(
            f"{model.headers[f'{name}.row_map'].file}: {name}.row_map: has {found} row versions, "
            f"config.json promises {entry.versions}"
        )
    return pool


def _dense(model: ModelDir, only: Collection[str] | None) -> list[LinearInspection]:
    from ..hf.names import linear_tensors, skeleton

    headers = model.headers
    wanted = {
        tensor: name
        for tensor, name in linear_tensors(skeleton(model.path), headers).items()
        if only is None or name in only
    }
    found = []
    weights = model.tensors(wanted)
    # only on a terminal: scripts read what is printed
    for tensor, weight in tqdm(weights, "inspect", len(wanted), leave=False, disable=None):
        name, nnz = wanted[tensor], int(kept(weight).sum())
        if weight.dim() != 2:
            raise WexpandError(
                f"{headers[tensor].file}: {tensor}: shape {list(weight.shape)} is no matrix; a "
                "model of wexpand's says so in quantization_config of config.json",
                tensor,
            )
        sizes = dict.fromkeys(KINDS, 0)
        bias = headers.get(f"{name}.bias")
        sizes |= {"values": weight.nbytes, "bias": bias.nbytes if bias else 0}
        found.append(
            LinearInspection(
                name=name,
                in_features=weight.shape[1],
                out_features=weight.shape[0],
                experts=1,
                clusters=1,
                versions=weight.shape[0],
                nnz=nnz,
                sparsity=1 - nnz / weight.numel(),
                values=str(weight.dtype).removeprefix("torch."),
                bytes=sizes,
                dense_bytes=sum(sizes.values()),
                bytes_per_token=sum(sizes.values()),
            )
        )
    order = list(wanted.values())
    return sorted(found, key=lambda linear: order.index(linear.name))
