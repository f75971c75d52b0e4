"""config.json of a checkpoint: what `quantization_config` holds, and reading it with distrust.

Every size of every expanded linear is here, so a reader can build a model before it reads a tensor,
and compare afterwards. `digest` finds an edited config, `checksums` a damaged tensor; neither is a
signature.
"""

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
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

from ..errors import WexpandError
from .router import ROUTER_DTYPES
from .rowpool import FLOATS, RowPool

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "LinearEntry",
    "WexpandConfig",
    "model_digest",
    "parse_config",
    "read_config",
    "read_json",
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

    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Tensor -> the shape that it must have in the checkpoint, and the dtypes it may have."""
        expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "weight": ((self.nnz,), FLOATS),
            "weight_mask": ((self.versions, (self.in_features + 7) // 8), (torch.uint8,)),
            "row_map": ((self.experts, self.out_features), (torch.int32,)),
        }
        if self.experts > 1:
            expected["router_weight"] = ((self.experts, self.in_features), ROUTER_DTYPES)
            expected["router_bias"] = ((self.experts,), (torch.float32,))
        if self.bias:
            expected["bias"] = ((self.out_features,), FLOATS)
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
    model_digest: str = ""
    """sha256 of the rest of config.json, see `model_digest`; `wexpand verify` reports another one,
    vLLM logs it: settings such as the context length may be edited on purpose"""
    digest: str = ""
    """sha256 of everything above, see `seal`"""

    def seal(self) -> "WexpandConfig":
        """A copy whose digest is right."""
        values = self.model_dump(mode="json")
        return self.model_copy(update={"digest": _digest_without("digest", values)})


def model_digest(values: Mapping[str, Any]) -> str:
    """sha256 of config.json's `values` without quantization_config, as sorted JSON."""
    return _digest_without("quantization_config", values)


def _digest_without(key: str, values: Mapping[str, Any]) -> str:
    rest = {k: value for k, value in values.items() if k != key}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def parse_config(values: Mapping[str, Any], where: str = "config.json") -> WexpandConfig:
    """Validate a `quantization_config`. Errors name the key, its value and what would be right.

    :param values: as they stand in the file: `digest` is that of the keys that are there, so that
        a writer may leave out those that have a default
    """
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
        raise WexpandError(f"{where}: quantization_config.{key}: {value}: {first['msg']}") from None
    found = _digest_without("digest", values)
    if config.digest != found:
        raise WexpandError(
            f"{where}: quantization_config was changed after it was written (its digest is "
            f"{config.digest[:12]}..., its content gives {found[:12]}...)"
        )
    return config


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


def read_config(directory: str | Path) -> WexpandConfig:
    """The `quantization_config` of a model directory of ours."""
    path = Path(directory) / "config.json"
    quantization = read_json(path).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        found = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise WexpandError(
            f"{path}: quantization_config.quant_method is {found!r}, not {QUANT_METHOD!r}: "
            "this is not a model that wexpand wrote"
        )
    return parse_config(quantization, str(path))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON so that readers see the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf8")
    os.replace(partial, path)
