"""What a run has found so far, as files: plain values of the package, and back again.

A record is one safetensors file. Its tensors are those of the value; how they make it up, and all
that is no tensor, stands as JSON in the file's metadata. Classes are named there and built only if
they are known here, so a record holds nothing that runs. The crc32 of the whole file is a part of
its name: a record is there, whole and as it was written, or it is not there.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..format.clusters import ClusterBias
from ..format.linear import StoredLinear
from ..format.router import StoredRouter
from ..format.rowpool import RowPool
from ..format.values import ValueCodec
from ..method.allocation import AllocationProblem
from ..method.biases import BiasProblem, ClusterMeans
from ..method.candidates import Candidates
from ..method.dial import Candidate, Setting
from ..method.merge_tree import MergeTree

__all__ = ["find_records", "read_record", "recorded", "write_record"]

_CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        AllocationProblem, BiasProblem, Candidate, Candidates, ClusterBias, ClusterMeans, MergeTree,
        RowPool, Setting, StoredLinear, StoredRouter, ValueCodec,
    )
}  # fmt: skip
_PARTIAL = "partial"
_CHUNK = 1 << 24


def recorded(kind: type) -> type:
    """Decorates a dataclass whose instances may stand in records."""
    _CLASSES[kind.__name__] = kind
    return kind


def write_record(folder: Path, name: str, value: Any) -> Path:
    """Write `value` to NAME-CRC.safetensors in `folder`; on the disk when this returns.

    One process writes to a folder at a time.

    :param value: classes of the list, dicts with keys of str, lists, tensors, numbers, str, None
    :raises OSError: and safetensors' own error; no record is left then
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    form = json.dumps(_apart(value, tensors, {}))
    partial = folder / _PARTIAL
    try:
        save_file(tensors, partial, metadata={"form": form})
        file = folder / f"{name}-{_crc(partial)}.safetensors"
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return file


def read_record(file: Path, *keys: str) -> Any:
    """The value that was written, or the part of it that these keys and fields lead to.

    Only tensors of that part are read; they are in main memory.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        form = json.loads(handle.metadata()["form"])
        for key in keys:
            form = form["dict" if "dict" in form else "of"][key]
        return _together(form, cache(handle.get_tensor))


def find_records(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """(name, file, whether its bytes are those that were written) of every record."""
    for file in sorted(folder.glob("*-????????.safetensors")):
        name, _, crc = file.stem.rpartition("-")
        yield name, file, _crc(file) == crc


def _crc(file: Path) -> str:
    found = 0
    with open(file, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return f"{found:08x}"


def _apart(value: Any, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    """`value` as JSON can hold it; its tensors are put into `tensors`, each once."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = name = f"{len(tensors):06d}"
            # a copy, as safetensors refuses tensors that share memory
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": seen[id(value)]}
    if isinstance(value, dict):
        return {"dict": {key: _apart(part, tensors, seen) for key, part in value.items()}}
    kind = type(value).__name__
    if kind in _CLASSES:
        names = [f.name for f in fields(value)] if is_dataclass(value) else value._fields
        parts = {name: _apart(getattr(value, name), tensors, seen) for name in names}
        return {"class": kind, "of": parts}
    if isinstance(value, list | tuple):
        return [_apart(part, tensors, seen) for part in value]
    raise TypeError(f"a {kind} cannot be recorded")


def _together(form: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(form, list):
        return [_together(part, tensor) for part in form]
    if not isinstance(form, dict):
        return form
    if "tensor" in form:
        return tensor(form["tensor"])
    if "dict" in form:
        return {key: _together(part, tensor) for key, part in form["dict"].items()}
    return _CLASSES[form["class"]](**{k: _together(v, tensor) for k, v in form["of"].items()})
