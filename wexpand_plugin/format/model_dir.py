"""A model directory, opened for reading: config.json, the safetensors files, and what is ours.

    config.json              the model's own settings, and `quantization_config` (see `config`)
    *.safetensors            tensors; with several files, model.safetensors.index.json lists them
    wexpand_checksums.json   crc32 of every tensor of the model, and digests of config.json

A dense model directory opens too, and ones that other tools quantised: `ours` tells. Nothing is
read before it is asked for; headers are read once. `problems` lists all that is wrong with one of
ours.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WexpandError
from .checks import check_form, check_linear
from .config import QUANT_METHOD, CheckpointConfig, parse_config
from .linear import StoredLinear

__all__ = ["CHECKSUMS", "CONFIG", "INDEX", "Header", "ModelDir", "checksum", "read_json"]

CONFIG = "config.json"
CHECKSUMS = "wexpand_checksums.json"
INDEX = "model.safetensors.index.json"

# safetensors' names of the dtypes that models have
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Header(NamedTuple):
    """What a file says of a tensor before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for one that no model of ours has"""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; 0 for an unknown dtype."""
        return torch.Size(self.shape).numel() * (self.dtype.itemsize if self.dtype else 0)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory. Raises WexpandError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise WexpandError(f"{path}: there is no such file; a model directory has one") from None
    except (ValueError, RecursionError) as error:
        raise WexpandError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise WexpandError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise WexpandError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


def checksum(tensor: Tensor) -> str:
    """crc32 of a tensor's bytes, as 8 hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(data.numpy().data):08x}"


class ModelDir:
    """A model directory, read with distrust: errors name the file and the tensor.

    :param path: of the directory
    :param files: the safetensors files that hold the model; by default those that transformers
        would read of a dense model, and all that there are beside a config of ours
    :param config: of a model of ours, where it does not stand in config.json (yet)
    """

    def __init__(
        self,
        path: str | Path,
        files: Iterable[str | Path] | None = None,
        config: CheckpointConfig | None = None,
    ):
        self.path = Path(path)
        self._files = None if files is None else [Path(file) for file in files]
        self._config = config

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """config.json, whole."""
        return read_json(self.path / CONFIG)

    @property
    def quant_method(self) -> str | None:
        """Who compressed the model, by `quantization_config`; None for a dense one."""
        found = self.config_json.get("quantization_config")
        if not found:
            return None
        return str(found.get("quant_method")) if isinstance(found, dict) else str(found)

    @property
    def ours(self) -> bool:
        """Whether config.json says that wexpand wrote this model."""
        return self.quant_method == QUANT_METHOD

    @cached_property
    def config(self) -> CheckpointConfig:
        """The `quantization_config`; WexpandError unless it is one of ours and sound."""
        if self._config is not None:
            return self._config
        where = self.path / CONFIG
        if not self.ours:
            raise WexpandError(
                f"{where}: quantization_config.quant_method is {self.quant_method!r}, not "
                f"{QUANT_METHOD!r}: this is not a model that wexpand wrote"
            )
        return parse_config(self.config_json["quantization_config"], str(where))

    @cached_property
    def headers(self) -> dict[str, Header]:
        """Every tensor's header. WexpandError for a file that is no whole safetensors file."""
        found: dict[str, Header] = {}
        for file in self._weight_files():
            for name, header in _headers(file):
                if name in found:
                    raise WexpandError(
                        f"{file}: holds {name}, which {found[name].file.name} holds too", name
                    )
                found[name] = header
        return found

    def _weight_files(self) -> list[Path]:
        if self._files is not None:
            return sorted(self._files)
        everything = sorted(self.path.glob("*.safetensors"))
        if not everything:
            raise WexpandError(f"{self.path}: holds no .safetensors file")
        single, index = self.path / "model.safetensors", self.path / INDEX
        if (self.path / CONFIG).exists() and self.ours:
            return everything
        # some models on the hub carry a second copy in another layout
        if single.exists():
            return [single]
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(
                isinstance(name, str) and Path(name).name == name for name in names.values()
            ):
                raise WexpandError(
                    f"{index}: weight_map should give each tensor the name of its file"
                )
            return sorted({self.path / name for name in names.values()})
        return everything

    @property
    def disk_bytes(self) -> int:
        """Of all safetensors files of the model."""
        return sum(file.stat().st_size for file in {h.file for h in self.headers.values()})

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of these tensors or all, file by file, one in memory at a time."""
        wanted = self.headers if names is None else {name: self.headers[name] for name in names}
        for file in sorted({header.file for header in wanted.values()}):
            with safe_open(file, framework="pt") as handle:
                for name in sorted(n for n, header in wanted.items() if header.file == file):
                    yield name, handle.get_tensor(name)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return next(self.tensors([name]))[1]

    def first_row(self, name: str) -> Tensor:
        """The first row of a tensor, all of a vector, in float32: enough to tell models apart."""
        header = self.headers[name]
        with safe_open(header.file, framework="pt") as handle:
            if not header.shape:
                return handle.get_tensor(name).float()
            part = handle.get_slice(name)
            return (part[:1] if len(header.shape) > 1 else part[:]).float()

    def kinds(self, linear: str) -> dict[str, Tensor]:
        """Kind -> tensor of a linear of ours, those that there are, unchecked."""
        there = [name for name in self.config.tensors_of(linear) if name in self.headers]
        return {name.removeprefix(f"{linear}."): value for name, value in self.tensors(there)}

    def header(self, linear: str, kind: str) -> Header:
        """A tensor of a linear of ours, checked against config.json by its header alone."""
        name, (shape, dtypes) = f"{linear}.{kind}", self.config.linears[linear].shapes()[kind]
        header = self.headers.get(name)
        if header is None:
            raise WexpandError(f"{name}: missing; config.json promises {list(shape)}", name)
        with self.locating_errors():
            check_form(name, header.shape, header.dtype, shape, dtypes)
        return header

    def linear(self, name: str) -> StoredLinear:
        """Read and check a linear of ours."""
        tensors = self.kinds(name)
        with self.locating_errors():
            return check_linear(name, self.config.linears[name], tensors)

    def others(self) -> list[str]:
        """The tensors that belong to no linear of ours: embeddings, norms, the output head, ..."""
        config = self.config
        ours = {tensor for name in config.linears for tensor in config.tensors_of(name)}
        return [name for name in self.headers if name not in ours]

    @contextmanager
    def locating_errors(self) -> Iterator[None]:
        """Put the file before the tensor in the errors of the block."""
        try:
            yield
        except WexpandError as error:
            header = self.headers.get(error.tensor or "")
            if header is None:
                raise
            raise WexpandError(f"{header.file}: {error}", error.tensor) from None


def _headers(file: Path) -> Iterator[tuple[str, Header]]:
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                part = handle.get_slice(name)
                yield name, Header(file, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
    except (SafetensorError, OSError) as error:
        raise WexpandError(f"{file}: not a complete safetensors file ({error})") from None
