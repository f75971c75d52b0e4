"""Packing models that already hold zeros, and the way back.

A model pruned by SparseGPT, Wanda or magnitude is usually saved dense, zeros included. `pack`
writes the same weights as row pools with one expert and no router: 2(1-s) + 1/8 bytes per weight in
bfloat16 at sparsity s. `unpack` gives the dense model back, bit for bit. Both read and write tensor
by tensor.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..errors import WexpandError
from ..format.config import GroupEntry, LinearEntry
from ..format.model_dir import ModelDir
from ..format.problems import problems
from ..format.rowpool import RowPool, kept
from ..format.sizes import row_bytes
from ..format.values import FLOATS, codec_of
from ..format.writer import (
    SHARD_BYTES,
    TensorWriter,
    copy_others,
    partial_directory,
    require_empty,
    seal,
    write_json,
)
from ..hf.hub import resolve
from .sources import drop_leftovers

__all__ = ["Packed", "break_even", "pack", "unpack"]


@dataclass(frozen=True)
class Packed:
    """What `pack` did."""

    packed: dict[str, float]
    """linears stored as row pools -> share of zeros"""
    left: dict[str, float]
    """linears left dense, as packing would not make them smaller -> share of zeros"""
    threshold: float
    """share of zeros above which packing makes every linear of this model smaller"""
    bytes_before: int
    """of the safetensors files"""
    bytes_after: int
    negative_zeros: int
    """weights of the linears that are -0.0"""
    notes: list[str] = field(default_factory=list)
    """what the user should know, in sentences"""


def break_even(dtype: torch.dtype, in_features: int) -> float:
    """The share of zeros above which a packed linear of this dtype is smaller than a dense one."""
    kept_all = torch.tensor(in_features)
    packed = int(row_bytes(codec_of(dtype), kept_all, in_features))
    dense = in_features * dtype.itemsize
    return (packed - dense) / dense


def pack(
    model: str | Path,
    output: str | Path,
    *,
    keep_negative_zeros: bool = False,
    quiet: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> Packed:
    """Write the causal LM `model`, whose linears hold zeros, as a checkpoint with one expert.

    :param model: a directory with safetensors files (one or sharded), or the id of a model
    :param output: a directory that does not exist, or is empty
    :param keep_negative_zeros: store -0.0, which pruning by multiplication leaves, like any weight,
        so that every bit survives; else it counts as zero, which no output can tell
    :param quiet: no progress bar
    :param max_shard_bytes: of one output file; memory holds one file and the largest tensor
    :raises WexpandError: the model is quantised, packed already, not sparse enough, or has no
        class in transformers; or `output` is not empty
    """
    from ..hf.names import linear_tensors, skeleton

    require_empty(output)
    source = ModelDir(resolve(model))
    values = dict(source.config_json)
    notes = drop_leftovers(values, source.path)
    linears = linear_tensors(skeleton(source.path), source.headers)
    groups: dict[str, GroupEntry] = {}
    packed: dict[str, float] = {}
    left: dict[str, float] = {}
    threshold, negative_zeros = 0.0, 0
    with partial_directory(output) as partial:
        writer = TensorWriter(partial, max_shard_bytes)
        with _bar(source, quiet) as bar:
            for name, tensor in source.tensors():
                linear = linears.get(name)
                bar.update(tensor.nbytes)
                if linear is None:
                    writer.add(name, tensor)
                    continue
                keep = _check_weight(f"{source.headers[name].file}: {name}", tensor)
                even = break_even(tensor.dtype, tensor.shape[1])
                threshold = max(threshold, even)
                negative = int(keep.sum()) - int(tensor.count_nonzero())
                negative_zeros += negative
                if negative and not keep_negative_zeros:
                    keep = tensor != 0
                zeros = 1 - keep.sum().item() / keep.numel()
                if zeros <= even:
                    left[linear] = zeros
                    writer.add(name, tensor)
                    continue
                packed[linear] = zeros
                pool = RowPool.pack(tensor, keep=keep)
                entry = LinearEntry.of(pool, f"{linear}.bias" in source.headers, tensor.dtype)
                groups[linear] = GroupEntry(in_features=tensor.shape[1], linears={linear: entry})
                writer.add_pool(linear, pool)
        if not groups:
            if not left:
                raise WexpandError(f"{model}: holds no float weight of a linear of its blocks")
            sparsest = max(left, key=lambda name: left[name])
            hint = "; -0.0 counts as a weight" if negative_zeros and keep_negative_zeros else ""
            raise WexpandError(
                f"{model}: no linear has more than {threshold:.1%} zeros, so packing would not "
                f"make it smaller (the sparsest, {sparsest}, has {left[sparsest]:.1%}{hint})"
            )
        writer.close()
        if left_out := copy_others(source.path, partial):
            notes.append(f"not copied, as loading them runs code: {', '.join(left_out)}")
        write_json(partial / "config.json", values)
        made_by = {"wexpand": __version__, "command": "pack"}
        order = [groups[name] for name in linears.values() if name in groups]
        seal(partial, order, made_by, checksums=writer.checksums)
        after = ModelDir(partial).disk_bytes
    if negative_zeros:
        action = "stored, so that every bit survives" if keep_negative_zeros else "taken for zeros"
        notes.append(
            f"{negative_zeros} weights of the linears are -0.0, as pruning by multiplication "
            f"leaves them: {action}"
        )
    return Packed(packed, left, threshold, source.disk_bytes, after, negative_zeros, notes)


def unpack(
    directory: str | Path,
    output: str | Path,
    *,
    expert: int | None = None,
    quiet: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint of ours as a dense model with zeros.

    :param output: a directory that does not exist, or is empty
    :param expert: which expert's weights to write where there are several; then the output is not
        the same model any more, as every token would use this expert
    :raises WexpandError: a damaged checkpoint; several experts and no `expert`
    """
    require_empty(output)
    model = ModelDir(directory)
    linears = model.config.linears
    for name, entry in linears.items():
        if entry.experts > 1 and expert is None:
            raise WexpandError(
                f"{directory}: {name} has {entry.experts} experts, a dense model holds one: choose "
                f"it with --expert, 0 to {entry.experts - 1}"
            )
        if expert is not None and entry.experts > 1 and not 0 <= expert < entry.experts:
            raise WexpandError(
                f"expert: {expert} is outside 0 to {entry.experts - 1}, the experts of {name}"
            )
    for problem in problems(model):
        raise problem
    ours = {
        tensor
        for name in linears
        for tensor in model.config.tensors_of(name)
        if not tensor.endswith((".weight", ".bias"))
    }
    with partial_directory(output) as partial:
        writer = TensorWriter(partial, max_shard_bytes)
        with _bar(model, quiet) as bar:
            for name, tensor in model.tensors():
                bar.update(tensor.nbytes)
                linear = name.removesuffix(".weight")
                if linear != name and linear in linears:
                    pool, _, _ = model.linear(linear)
                    chosen = (expert or 0) if pool.experts > 1 else 0
                    tensor = pool.expert(chosen).to(getattr(torch, linears[linear].dtype))
                if name not in ours:
                    writer.add(name, tensor)
        writer.close()
        copy_others(model.path, partial)
        values = {k: v for k, v in model.config_json.items() if k != "quantization_config"}
        write_json(partial / "config.json", values)


def _check_weight(label: str, weight: Tensor) -> Tensor:
    """Which weights to store, after a check that the weight is one that can be packed."""
    if weight.dtype not in FLOATS.values():
        raise WexpandError(
            f"{label}: dtype {weight.dtype} is that of a quantised model; only float32, bfloat16 "
            "and float16 weights can be packed"
        )
    if not bool(torch.isfinite(weight).all()):
        raise WexpandError(f"{label}: holds NaN or infinite values")
    return kept(weight)


def _bar(model: ModelDir, quiet: bool) -> tqdm:
    total = model.disk_bytes
    return tqdm(total=total, unit="B", unit_scale=True, disable=quiet, desc="tensors")
