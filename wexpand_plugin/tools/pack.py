"""Packing models that hold zeros, or whose weights may be rounded, without calibration.

A model pruned by SparseGPT, Wanda or magnitude is usually saved dense, zeros included. `pack`
writes the same weights as row pools with one expert and no router: 2(1-s) + 1/8 bytes per weight in
bfloat16 at sparsity s; `unpack` gives the dense model back, bit for bit. With `values` the kept
weights are rounded to 8 to 2 bits, each group's scale being the one that loses least; a
recipe with calibration data loses less. Models that compressed-tensors quantised to W4A16 or W8A16
are packed as they are. Everything is read and written tensor by tensor.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..errors import WexpandError
from ..format.checks import check_pool
from ..format.config import GroupEntry
from ..format.directories import partial_directory, require_empty
from ..format.linear import StoredLinear
from ..format.model_dir import ModelDir
from ..format.rowpool import RowPool, finite, kept
from ..format.sizes import row_bytes
from ..format.values import FLOATS, GROUP, ValueCodec, codec, codec_of
from ..format.writer import (
    SHARD_BYTES,
    TensorWriter,
    copy_others,
    seal,
    write_json,
)
from ..hf.card import write_card
from ..hf.hub import resolve
from ..method.grids import GRIDS, Grid
from .inspect_table import readable_bytes
from .quantised import is_quantised, quantised_linears, quantised_pool
from .sources import drop_leftovers

__all__ = ["Packed", "break_even", "pack", "progress_bar"]

FEW_ZEROS = 0.01
"""share of zeros that a codec without a zero rounds like other weights: a mask is a bit for each"""

AT_ONCE = 1 << 22
"""weights that are rounded at a time: what that takes is many times their bytes"""


@dataclass
class Packed:
    """What `pack` did."""

    packed: dict[str, float] = field(default_factory=dict)
    """linears stored as row pools -> share of zeros"""
    left: dict[str, float] = field(default_factory=dict)
    """linears left dense, as packing would not make them smaller -> share of zeros"""
    errors: dict[str, float] = field(default_factory=dict)
    """linears whose weights were rounded -> norm of the change over the norm of the weight"""
    threshold: float = 0.0
    """share of zeros above which packing makes every linear of this model smaller"""
    bytes_before: int = 0
    """of the safetensors files"""
    bytes_after: int = 0
    negative_zeros: int = 0
    """weights of the linears that are -0.0"""
    notes: list[str] = field(default_factory=list)
    """what the user should know, in sentences"""


def break_even(dtype: torch.dtype, in_features: int) -> float:
    """The share of zeros above which a packed linear of this dtype is smaller than a dense one."""
    packed = int(row_bytes(codec_of(dtype), torch.tensor(in_features), in_features))
    dense = in_features * dtype.itemsize
    return (packed - dense) / dense


def pack(
    model: str | Path,
    output: str | Path,
    *,
    values: str | None = None,
    value_group: int = GROUP,
    keep_negative_zeros: bool = False,
    quiet: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> Packed:
    """Write the causal LM `model` as a checkpoint with one expert, its linears packed.

    :param model: a directory with safetensors files (one or sharded), or the id of a model
    :param output: a directory that does not exist, or is empty
    :param values: one of GRIDS, such as "int4", to round what is kept; None keeps every value
    :param value_group: columns of a row that share a scale
    :param keep_negative_zeros: store -0.0, which pruning by multiplication leaves, like any weight,
        so that every bit survives; else it counts as zero, which no output can tell
    :param quiet: no progress bar
    :param max_shard_bytes: of one output file; memory holds one file and the largest tensor
    :raises WexpandError: the model is packed already, quantised in a way that cannot be packed
        exactly, not sparse enough, or has no class in transformers; or `output` is not empty
    """
    from ..hf.names import check_fit

    require_empty(output)
    if values not in (None, *GRIDS):
        raise WexpandError(f"values: {values!r} should be {' or '.join(GRIDS)}, or left out")
    how = None if values is None else codec(values, value_group)
    source = ModelDir(resolve(model))
    packer = _Packer(source, how, keep_negative_zeros)
    with partial_directory(output) as partial:
        writer = TensorWriter(partial, max_shard_bytes)
        with progress_bar(source, quiet) as bar:
            for name, tensor in source.tensors():
                bar.update(tensor.nbytes)
                packer.add(name, tensor, writer)
        done = packer.done
        if not packer.groups:
            raise WexpandError(f"{model}: {packer.nothing()}")
        writer.close()
        write_json(partial / "config.json", packer.config_json)
        made_by = {
            "wexpand": __version__, "command": "pack", "values": values, "model": str(model)
        }  # fmt: skip
        order = [packer.groups[n] for n in packer.linears.values() if n in packer.groups]
        seal(partial, order, made_by, checksums=writer.checksums)
        check_fit(ModelDir(partial))
        write_card(partial, output, made_by, [source.path])
        if left_out := copy_others(source.path, partial):
            done.notes.append(f"not copied, as loading them runs code: {', '.join(left_out)}")
        done.bytes_after = ModelDir(partial).disk_bytes
    done.bytes_before = source.disk_bytes
    if done.negative_zeros:
        action = "stored, so that every bit survives" if keep_negative_zeros else "taken for zeros"
        done.notes.append(
            f"{done.negative_zeros} weights of the linears are -0.0, as pruning by multiplication "
            f"leaves them: {action}"
        )
    return done


class _Packer:
    """Decides for each tensor of a model what is written in its place."""

    def __init__(self, source: ModelDir, how: ValueCodec | None, keep_negative_zeros: bool):
        from ..hf.names import (
            check_headers,
            linear_tensors,
            merged_tensors,
            module_tensor_names,
            skeleton,
            unserved,
        )

        self.source, self.how, self.keep_negative_zeros = source, how, keep_negative_zeros
        self.done = Packed()
        self.groups: dict[str, GroupEntry] = {}
        self.config_json: dict[str, Any] = dict(source.config_json)
        self.parts: dict[str, str] = {}
        if is_quantised(source) and not source.ours:
            self.parts = quantised_linears(source)
            del self.config_json["quantization_config"]
            if how is not None:
                raise WexpandError(
                    f"{source.path}: its weights are integers already; pack it without --values"
                )
        self.done.notes += drop_leftovers(self.config_json, source.path)
        names = [*source.headers, *(f"{name}.weight" for name in self.parts.values())]
        model = skeleton(source.path)
        if not self.parts:
            check_headers(model, source)
        found = linear_tensors(model, names)
        refused = unserved(model, found.values())
        if refused and not self.parts:
            self.done.notes.append(
                f"left dense, as vLLM does not load it packed: fused qkv (such as {refused[0]})"
            )
            found = {name: linear for name, linear in found.items() if linear not in refused}
        self.linears = found
        """tensor of a dense weight -> linear"""
        state = model.state_dict()
        self.sizes = {
            self.linears[name]: (state[target].shape[0], state[target].shape[1])
            for name, target in module_tensor_names(model, self.linears).items()
        }
        """linear -> (out, in)"""
        self._say_dense(
            merged_tensors(model, source.headers), set(module_tensor_names(model, source.headers))
        )

    def _say_dense(self, merged: set[str], single: set[str]) -> None:
        """Note what is left dense, as the model has it fused, experts of a mixture, or not at all.

        :param merged: tensors that the model merges with others
        :param single: those that are one tensor of the model each
        """
        headers = {n: h for n, h in self.source.headers.items() if n not in self.parts}
        fused = {n for n, h in headers.items() if n in merged or (n in single and len(h.shape) > 2)}
        unknown = {n for n, h in headers.items() if len(h.shape) > 1} - merged - single
        for what, names in (
            ("of experts of a mixture", fused),
            ("that the model's class does not load", unknown),
        ):
            if names:
                size, every = sum(headers[n].nbytes for n in names), self.source.disk_bytes
                self.done.notes.append(
                    f"left dense: {len(names)} tensors {what}, {readable_bytes(size)}, "
                    f"{size / every:.0%} of the model (such as {min(names)})"
                )

    def add(self, name: str, tensor: Tensor, writer: TensorWriter) -> None:
        """Write a tensor of the source, or the row pool that takes its place."""
        quantised, linear = self.parts.get(name), self.linears.get(name)
        if quantised is not None:
            if name.endswith(".weight_packed"):
                if f"{quantised}.weight" not in self.linears:
                    raise WexpandError(
                        f"{quantised}: is quantised, but no linear of the model's blocks", name
                    )
                pool, dtype = quantised_pool(self.source, quantised, self.sizes[quantised])
                self._store(quantised, pool, dtype, 0.0, writer)
        elif linear is None:
            if tensor.is_floating_point() and not finite(tensor):
                file = self.source.headers[name].file
                raise WexpandError(f"{file}: {name}: holds NaN or infinite values", name)
            writer.add(name, tensor)
        else:
            keep, zeros = self._kept(name, tensor)
            pool, error = self._pool(tensor, keep)
            if sum(pool.stored_bytes().values()) >= tensor.nbytes:
                self.done.left[linear] = zeros
                writer.add(name, tensor)
                return
            self._store(linear, pool, tensor.dtype, zeros, writer)
            if error is not None:
                self.done.errors[linear] = error

    def _kept(self, name: str, tensor: Tensor) -> tuple[Tensor, float]:
        """Which weights to store, and the share of those that are not."""
        label = f"{self.source.headers[name].file}: {name}"
        if tensor.dtype not in FLOATS.values():
            raise WexpandError(
                f"{label}: dtype {tensor.dtype} cannot be packed; convert the model to "
                f"{', '.join(FLOATS)} first",
                name,
            )
        if not bool(torch.isfinite(tensor).all()):
            raise WexpandError(f"{label}: holds NaN or infinite values", name)
        even = break_even(tensor.dtype, tensor.shape[1])
        self.done.threshold = max(self.done.threshold, even)
        keep = kept(tensor)
        negative = int(keep.sum()) - int(tensor.count_nonzero())
        self.done.negative_zeros += negative
        if negative and not self.keep_negative_zeros:
            keep = tensor != 0
        return keep, 1 - keep.sum().item() / keep.numel()

    def _pool(self, tensor: Tensor, keep: Tensor) -> tuple[RowPool, float | None]:
        """The pool of a dense weight, and the relative error of rounding it, if it is rounded."""
        if self.how is None:
            return RowPool.pack(tensor, keep=keep), None
        grid, change, energy, parts = Grid(self.how.bits, self.how.group), 0.0, 0.0, []
        if self.how.odd and int((~keep).sum()) < FEW_ZEROS * keep.numel():
            keep = torch.ones_like(keep)
        some = max(1, AT_ONCE // tensor.shape[1])
        for rows, own in zip(tensor.split(some), keep.split(some), strict=True):
            weight, scales = rows.float(), []
            for columns in weight.t().unsqueeze(0).split(self.how.group, dim=1):
                scales.append(grid.scales(columns, torch.ones(1, 1, 1)))
            scale = torch.cat(scales).t().half().contiguous()
            parts.append(RowPool.pack(weight, keep=own, codec=self.how, scale=scale))
            change += float((parts[-1].rows() - weight).double().square().sum())
            energy += float(weight.double().square().sum())
        return RowPool.concat(parts).smallest(), (change / max(energy, 1e-60)) ** 0.5

    def _store(
        self, linear: str, pool: RowPool, dtype: torch.dtype, zeros: float, writer: TensorWriter
    ) -> None:
        check_pool(pool, linear)
        self.done.packed[linear] = zeros
        stored = StoredLinear(pool)
        has_bias = f"{linear}.bias" in self.source.headers  # which is copied as it is
        entry = stored.entry(dtype).model_copy(update={"bias": has_bias})
        self.groups[linear] = GroupEntry.of({linear: entry})
        writer.add_linear(linear, stored)

    def nothing(self) -> str:
        """Why nothing was packed."""
        left = self.done.left
        if not left:
            return "holds no float weight of a linear of its blocks"
        sparsest = max(left, key=lambda name: left[name])
        negative = self.done.negative_zeros and self.keep_negative_zeros
        return (
            f"no linear has more than {self.done.threshold:.1%} zeros, so packing would not make "
            f"it smaller (the sparsest, {sparsest}, has {left[sparsest]:.1%}"
            f"{'; -0.0 counts as a weight' if negative else ''}); --values int4 rounds"
        )


def progress_bar(model: ModelDir, quiet: bool) -> tqdm:
    """A bar over the bytes of a model's tensors."""
    total = model.disk_bytes
    return tqdm(total=total, unit="B", unit_scale=True, disable=quiet, desc="tensors")
