"""Packing models that already hold zeros, and the way back.

A model pruned by SparseGPT, Wanda or magnitude is usually saved dense, zeros included. `pack`
writes the same weights as row pools with one expert and no router: 2(1-s) + 1/8 bytes per weight in
bfloat16 at sparsity s. `unpack` gives the dense model back, bit for bit. Both read and write tensor
by tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..errors import WexpandError
from ..format import checkpoint
from ..format.checkpoint import LinearEntry
from ..format.rowpool import FLOATS, RowPool, kept, pack_rows
from ..format.writer import SHARD_BYTES, Shards
from ..hf.saving import partial_directory
from .sources import copy_others, drop_leftovers, require_empty, resolve

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


def break_even(element_size: int, in_features: int) -> float:
    """The share of zeros above which a packed linear is smaller than a dense one.

    A kept weight costs `element_size` bytes; a row costs ceil(in/8) bytes of mask and 4 of row map.
    """
    return ((in_features + 7) // 8 + 4) / (element_size * in_features)


def pack(
    model: str | Path,
    output: str | Path,
    *,
    drop_negative_zeros: bool = False,
    quiet: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> Packed:
    """Write the causal LM `model`, whose linears hold zeros, as a checkpoint with one expert.

    :param model: a directory with safetensors files (one or sharded), or the id of a model
    :param output: a directory that does not exist, or is empty
    :param drop_negative_zeros: treat -0.0, which pruning by multiplication leaves, as zero; else it
        is stored like any weight, so that every bit survives
    :param quiet: no progress bar
    :param max_shard_bytes: of one output file; memory holds one file and the largest tensor
    :raises WexpandError: the model is quantised, packed already, not sparse enough, or has no
        class in transformers; or `output` is not empty
    """
    from ..hf.names import linear_tensors, skeleton

    require_empty(output)
    source = resolve(model)
    values = checkpoint.read_json(source / "config.json")
    notes = drop_leftovers(values, source)
    files = checkpoint.tensor_files(checkpoint.weight_files(source) or source)
    linears = linear_tensors(skeleton(source), files)
    entries: dict[str, LinearEntry] = {}
    packed: dict[str, float] = {}
    left: dict[str, float] = {}
    threshold, negative_zeros = 0.0, 0
    with partial_directory(output) as partial:
        shards = Shards(partial, max_shard_bytes)
        with _bar(files, quiet) as bar:
            for name, tensor in checkpoint.tensors_of(files):
                linear = linears.get(name)
                bar.update(tensor.nbytes)
                if linear is not None:
                    even = break_even(tensor.element_size(), tensor.shape[1])
                    threshold = max(threshold, even)
                    keep = _check_weight(f"{files[name]}: {name}", tensor)
                    negative = int(keep.sum()) - int(tensor.count_nonzero())
                    negative_zeros += negative
                    if drop_negative_zeros and negative:
                        keep = tensor != 0
                    pool, zeros = _pack_weight(tensor, keep, even)
                    if pool is None:
                        left[linear] = zeros
                    else:
                        packed[linear] = zeros
                        entries[linear] = LinearEntry.of(pool, f"{linear}.bias" in files)
                        shards.add(f"{linear}.weight_mask", pool.mask)
                        shards.add(f"{linear}.row_map", pool.row_map)
                        tensor = pool.values
                shards.add(name, tensor)
        if not entries:
            if not left:
                raise WexpandError(f"{model}: holds no float weight of a linear of its blocks")
            sparsest = max(left, key=lambda name: left[name])
            hint = (
                "; -0.0 counts as a weight unless --drop-negative-zeros is given"
                if negative_zeros and not drop_negative_zeros
                else ""
            )
            raise WexpandError(
                f"{model}: no linear has more than {threshold:.1%} zeros, so packing would not "
                f"make it smaller (the sparsest, {sparsest}, has {left[sparsest]:.1%}{hint})"
            )
        shards.close()
        if left_out := copy_others(source, partial):
            notes.append(f"not copied, as loading them runs code: {', '.join(left_out)}")
        checkpoint.write_json(partial / "config.json", values)
        made_by = {"wexpand": __version__, "command": "pack"}
        entries = {name: entries[name] for name in linears.values() if name in entries}
        checkpoint.finalize(partial, entries, made_by, quiet=quiet)
        after = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    before = sum(file.stat().st_size for file in set(files.values()))
    if negative_zeros:
        action = "dropped" if drop_negative_zeros else "stored, so that every bit survives"
        notes.append(
            f"{negative_zeros} weights of the linears are -0.0, as pruning by multiplication "
            f"leaves them: {action}"
        )
    return Packed(packed, left, threshold, before, after, negative_zeros, notes)


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
    directory = Path(directory)
    config = checkpoint.read_config(directory)
    for name, entry in config.linears.items():
        if entry.experts > 1 and expert is None:
            raise WexpandError(
                f"{directory}: {name} has {entry.experts} experts, a dense model holds one: choose "
                f"it with --expert, 0 to {entry.experts - 1}"
            )
        if expert is not None and entry.experts > 1 and not 0 <= expert < entry.experts:
            raise WexpandError(
                f"expert: {expert} is outside 0 to {entry.experts - 1}, the experts of {name}"
            )
    files = checkpoint.tensor_files(directory)
    count = len(config.linears) + len(checkpoint.other_tensors(files, config))
    with tqdm(total=count, unit="", disable=quiet, desc="check") as bar:
        for problem in checkpoint.problems(files, config, lambda name: bar.update()):
            raise problem
    ours = {
        tensor
        for name, entry in config.linears.items()
        for tensor in checkpoint.tensor_names(name, entry)
        if not tensor.endswith((".weight", ".bias"))
    }
    with partial_directory(output) as partial:
        shards = Shards(partial, max_shard_bytes)
        with _bar(files, quiet) as bar:
            for name, tensor in checkpoint.tensors_of(files):
                bar.update(tensor.nbytes)
                linear = name.removesuffix(".weight")
                if linear != name and linear in config.linears:
                    pool, _, _ = checkpoint.read_linear(files, linear, config)
                    tensor = pool.expert((expert or 0) if pool.experts > 1 else 0)
                if name not in ours:
                    shards.add(name, tensor)
        shards.close()
        copy_others(directory, partial)
        values = checkpoint.read_json(directory / "config.json")
        del values["quantization_config"]
        checkpoint.write_json(partial / "config.json", values)


def _check_weight(label: str, weight: Tensor) -> Tensor:
    """Which weights to store, after a check that the weight is one that can be packed."""
    if weight.dtype not in FLOATS:
        raise WexpandError(
            f"{label}: dtype {weight.dtype} is that of a quantised model; only float32, bfloat16 "
            "and float16 weights can be packed"
        )
    if not bool(torch.isfinite(weight).all()):
        raise WexpandError(f"{label}: holds NaN or infinite values")
    return kept(weight)


def _pack_weight(weight: Tensor, keep: Tensor, even: float) -> tuple[RowPool | None, float]:
    """The pool of a dense weight, None if its share of zeros is not above `even`; and the share."""
    zeros = 1 - keep.sum().item() / keep.numel()
    if zeros <= even:
        return None, zeros
    row_map = torch.arange(weight.shape[0], dtype=torch.int32).unsqueeze(0)
    return pack_rows(weight, row_map, keep), zeros


def _bar(files: Mapping[str, Path], quiet: bool) -> tqdm:
    total = sum(file.stat().st_size for file in set(files.values()))
    return tqdm(total=total, unit="B", unit_scale=True, disable=quiet, desc="tensors")
