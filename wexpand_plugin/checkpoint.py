"""The checkpoint: a Hugging Face model directory whose expanded linears are row pools.

Per expanded linear NAME the safetensors files hold, instead of a dense NAME.weight [out, in],

    NAME.weight         model dtype [nnz]               kept values, row version after row version
    NAME.weight_mask    uint8 [versions, ceil(in/8)]    which columns each row version keeps
    NAME.row_map        int32 [experts, out]            the row version of each (expert, neuron)
    NAME.router_weight  float32 [experts, in]           only with more than one expert; equal for
    NAME.router_bias    float32 [experts]               all linears of an input group
    NAME.bias           as it was

and config.json holds a `quantization_config` (`WexpandConfig`) that gives every size before a
tensor is read, a checksum (crc32) of every tensor of the model, and a digest of itself. Nothing in
it names code. `check_linear` is the one check that every reader makes: transformers, vLLM, and
`wexpand verify`.
"""

import hashlib
import json
import os
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)
from torch import Tensor

from .errors import WexpandError
from .router import Router
from .rowpool import RowPool

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "LinearEntry",
    "WexpandConfig",
    "check_linear",
    "checksum",
    "finalize",
    "parse_config",
    "problems",
    "read_config",
    "read_linear",
    "tensor_files",
    "tensor_names",
    "tensors_of",
    "write_json",
]

QUANT_METHOD = "wexpand"
FORMAT_VERSION = 1


# the row map is int32, and no dimension of a model comes near its limit
Size = Annotated[int, Field(gt=0, lt=2**31)]


class LinearEntry(BaseModel):
    """The sizes of one expanded linear."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    in_features: Size
    out_features: Size
    experts: Size
    versions: Size
    """rows in the pool, at most experts * out_features"""
    nnz: NonNegativeInt
    """kept weights in the pool, at most versions * in_features"""
    bias: bool = False
    tokens: list[NonNegativeInt] = Field(default_factory=list)
    """calibration tokens that the router sent to each expert; empty where not counted"""

    @model_validator(mode="after")
    def _possible(self) -> "LinearEntry":
        if self.versions > self.experts * self.out_features:
            raise ValueError(
                f"versions {self.versions} exceeds experts * out_features = "
                f"{self.experts * self.out_features}"
            )
        if self.nnz > self.versions * self.in_features:
            raise ValueError(
                f"nnz {self.nnz} exceeds versions * in_features = "
                f"{self.versions * self.in_features}"
            )
        if len(self.tokens) not in (0, self.experts):
            raise ValueError(f"tokens has {len(self.tokens)} counts for {self.experts} experts")
        return self

    @classmethod
    def of(cls, pool: RowPool, bias: bool, tokens: list[int] | None = None) -> "LinearEntry":
        """The entry that describes `pool`."""
        return cls(
            in_features=pool.in_features, out_features=pool.out_features, experts=pool.experts,
            versions=pool.versions, nnz=pool.nnz, bias=bias, tokens=tokens or [],
        )  # fmt: skip

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Tensor -> (shape, dtype) that the checkpoint must hold; dtype None: the model's."""
        expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
            "weight": ((self.nnz,), None),
            "weight_mask": ((self.versions, (self.in_features + 7) // 8), torch.uint8),
            "row_map": ((self.experts, self.out_features), torch.int32),
        }
        if self.experts > 1:
            expected["router_weight"] = ((self.experts, self.in_features), torch.float32)
            expected["router_bias"] = ((self.experts,), torch.float32)
        if self.bias:
            expected["bias"] = ((self.out_features,), None)
        return expected


class WexpandConfig(BaseModel):
    """`quantization_config` of config.json."""

    model_config = ConfigDict(extra="forbid")

    quant_method: Literal["wexpand"] = "wexpand"
    format_version: Literal[1] = 1
    linears: dict[str, LinearEntry]
    made_by: dict[str, Any] = Field(default_factory=dict)
    """what made the checkpoint (versions, recipe values); informative"""
    checksums: dict[str, str] = Field(default_factory=dict)
    """tensor of the model -> crc32 of its bytes, 8 hexadecimal digits"""
    digest: str = ""
    """sha256 of everything above, see `seal`"""

    def _digest(self) -> str:
        text = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def seal(self) -> "WexpandConfig":
        """A copy whose digest is right."""
        return self.model_copy(update={"digest": self._digest()})

    def checked(self, where: str) -> "WexpandConfig":
        """Self, or WexpandError if the config was edited after it was sealed."""
        if self.digest != self._digest():
            raise WexpandError(
                f"{where}: quantization_config was changed after it was written (its digest is "
                f"{self.digest[:12]}..., its content gives {self._digest()[:12]}...)"
            )
        return self


def parse_config(values: Mapping[str, Any], where: str = "config.json") -> WexpandConfig:
    """Validate a `quantization_config`. Errors name the key, its value and what would be right."""
    version = values.get("format_version")
    if values.get("quant_method") == QUANT_METHOD and version != FORMAT_VERSION:
        raise WexpandError(
            f"{where}: format_version {version!r} is not {FORMAT_VERSION}, the one this version of "
            "wexpand-plugin reads"
        )
    try:
        config = WexpandConfig.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = reprlib.repr(first.get("input"))
        raise WexpandError(
            f"{where}: quantization_config.{key}: {value}: {first['msg']}"
        ) from None
    return config.checked(where)


def read_config(directory: str | Path) -> WexpandConfig:
    """The `quantization_config` of a model directory of ours."""
    path = Path(directory) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise WexpandError(f"{path}: there is no such file; a model directory has one") from None
    except (ValueError, RecursionError) as error:
        raise WexpandError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise WexpandError(f"{path}: cannot be read ({error})") from None
    quantization = values.get("quantization_config") if isinstance(values, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        found = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise WexpandError(
            f"{path}: quantization_config.quant_method is {found!r}, not {QUANT_METHOD!r}: "
            "this is not a model that wexpand wrote"
        )
    return parse_config(quantization, str(path))


def tensor_names(name: str, entry: LinearEntry) -> list[str]:
    """The checkpoint's tensors of linear `name`."""
    return [f"{name}.{kind}" for kind in entry.shapes()]


def tensor_files(source: str | Path | Iterable[str | Path]) -> dict[str, Path]:
    """Tensor -> safetensors file, from the files' headers.

    :param source: a model directory, all of whose safetensors files count, or the files themselves
    """
    from safetensors import SafetensorError, safe_open

    if isinstance(source, str | Path):
        files = sorted(Path(source).glob("*.safetensors"))
        if not files:
            raise WexpandError(f"{source}: holds no .safetensors file")
    else:
        files = sorted(Path(file) for file in source)
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise WexpandError(f"{file}: not a complete safetensors file ({error})") from None
        for name in names:
            if name in found:
                raise WexpandError(f"{file}: holds {name}, which {found[name].name} holds too")
            found[name] = file
    return found


def tensors_of(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each entry of `tensor_files`, one tensor in memory at a time."""
    from safetensors import safe_open

    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(n for n, f in files.items() if f == file):
                yield name, tensors.get_tensor(name)


def checksum(tensor: Tensor) -> str:
    """crc32 of a tensor's bytes, as 8 hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(memoryview(data.numpy())):08x}"


def check_linear(
    name: str,
    entry: LinearEntry,
    tensors: Mapping[str, Tensor],
    checksums: Mapping[str, str] | None = None,
    where: Callable[[str], str] = lambda tensor: tensor,
) -> tuple[RowPool, Router | None]:
    """Check every tensor of linear `name` and return its pool and router.

    :param entry: the sizes that config.json promises
    :param tensors: kind -> tensor ("weight", "weight_mask", ...), as read, before any cast
    :param checksums: `WexpandConfig.checksums`; None skips them (tensors that never were on disk)
    :param where: full tensor name -> how an error names it, usually with its file
    :raises WexpandError: naming the tensor, what was found and what would be right
    """
    for kind, (shape, dtype) in entry.shapes().items():
        label = where(f"{name}.{kind}")
        tensor = tensors.get(kind)
        if tensor is None:
            raise WexpandError(f"{label}: missing; config.json promises {list(shape)}")
        if tuple(tensor.shape) != shape:
            raise WexpandError(
                f"{label}: shape {list(tensor.shape)} should be {list(shape)} by config.json"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise WexpandError(f"{label}: dtype {tensor.dtype} should be {dtype}")
        if checksums is not None and checksums.get(f"{name}.{kind}") != (found := checksum(tensor)):
            raise WexpandError(
                f"{label}: damaged: its checksum is {found}, config.json has "
                f"{checksums.get(f'{name}.{kind}')}"
            )
    pool = RowPool(tensors["weight"], tensors["weight_mask"], tensors["row_map"], entry.in_features)
    pool.validate(where(name))
    for kind in ("router_weight", "router_bias", "bias"):
        if kind in entry.shapes() and not bool(torch.isfinite(tensors[kind]).all()):
            raise WexpandError(f"{where(f'{name}.{kind}')}: holds NaN or infinite values")
    router = None
    if entry.experts > 1:
        router = Router(tensors["router_weight"], tensors["router_bias"])
    return pool, router


def read_linear(
    files: Mapping[str, Path], name: str, config: WexpandConfig
) -> tuple[RowPool, Router | None, Tensor | None]:
    """Read and check linear `name`: pool, router and bias (None where it has none)."""
    from safetensors import safe_open

    entry, tensors = config.linears[name], {}
    for kind in entry.shapes():
        file = files.get(f"{name}.{kind}")
        if file is not None:
            with safe_open(file, framework="pt") as handle:
                tensors[kind] = handle.get_tensor(f"{name}.{kind}")

    def where(tensor: str) -> str:
        return f"{files[tensor]}: {tensor}" if tensor in files else tensor

    pool, router = check_linear(name, entry, tensors, config.checksums, where)
    return pool, router, tensors.get("bias")


def problems(
    files: Mapping[str, Path],
    config: WexpandConfig,
    progress: Callable[[str], None] = lambda tensor: None,
) -> Iterator[WexpandError]:
    """Every problem of a checkpoint's tensors, as the errors that a loader would raise.

    A loader raises the first and stops; `wexpand verify` lists them all. One linear or tensor is in
    memory at a time.

    :param files: `tensor_files` of the checkpoint
    :param progress: called with each linear's or tensor's name before it is read
    """
    ours = {t: name for name, entry in config.linears.items() for t in tensor_names(name, entry)}
    for tensor in sorted(config.checksums.keys() - files.keys() - ours.keys()):
        yield WexpandError(f"{tensor}: missing; config.json has its checksum")
    for tensor in sorted(files.keys() - config.checksums.keys() - ours.keys()):
        yield WexpandError(f"{files[tensor]}: {tensor}: unknown; config.json has no checksum of it")
    for name in config.linears:
        progress(name)
        try:
            read_linear(files, name, config)
        except WexpandError as error:
            yield error
    others = {t: f for t, f in files.items() if t not in ours and t in config.checksums}
    for tensor, value in tensors_of(others):
        progress(tensor)
        if (found := checksum(value)) != config.checksums[tensor]:
            yield WexpandError(
                f"{files[tensor]}: {tensor}: damaged: its checksum is {found}, config.json has "
                f"{config.checksums[tensor]}"
            )
        elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
            yield WexpandError(f"{files[tensor]}: {tensor}: holds NaN or infinite values")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON so that readers see the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf8")
    os.replace(partial, path)


def finalize(
    directory: str | Path, linears: Mapping[str, LinearEntry], made_by: Mapping[str, Any]
) -> WexpandConfig:
    """Turn a directory that `save_pretrained` has filled into a checkpoint of ours.

    Reads every tensor once for its checksum, checks the linears, and puts the sealed config into
    config.json.
    """
    directory = Path(directory)
    files = tensor_files(directory)
    checksums = {name: checksum(tensor) for name, tensor in tensors_of(files)}
    config = WexpandConfig(linears=dict(linears), made_by=dict(made_by), checksums=checksums).seal()
    for name in config.linears:
        read_linear(files, name, config)
    values = json.loads((directory / "config.json").read_text(encoding="utf8"))
    values.pop("sparsity_config", None)
    values["quantization_config"] = config.model_dump(mode="json")
    write_json(directory / "config.json", values)
    return config
