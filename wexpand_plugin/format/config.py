"""config.json of a checkpoint: what `quantization_config` holds, and reading it with distrust.

It lists the input groups, that is the linears that read the same tensor and share a router, with
every size of every linear: a reader can build a model before it reads a tensor, and compare
afterwards. `digest` finds an edited config; it is no signature. Checksums of tensors stand in a
file of their own (`checksums`).
"""

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from functools import cached_property
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
from .clusters import MAX_CLUSTERS
from .router import ROUTER_DTYPES
from .rowpool import MAX_EXPERTS
from .values import FLOATS, ValueCodec, codec

__all__ = [
    "FORMAT_VERSION",
    "KINDS",
    "QUANT_METHOD",
    "CheckpointConfig",
    "GroupEntry",
    "LinearEntry",
    "digest_of",
    "parse_config",
]

QUANT_METHOD = "wexpand"
FORMAT_VERSION = 1
KINDS = (
    "weight", "weight_mask", "weight_scale", "row_map", "router_weight", "router_bias",
    "cluster_expert", "cluster_bias", "cluster_bias_scale", "bias",
)  # fmt: skip
"""the tensors that a linear may have"""

# no dimension of a model comes near
Size = Annotated[int, Field(gt=0, lt=2**31)]
Experts = Annotated[int, Field(gt=0, le=MAX_EXPERTS)]
Clusters = Annotated[int, Field(gt=0, le=MAX_CLUSTERS)]
Parents = Annotated[int, Field(ge=0, le=MAX_CLUSTERS)]
# what a group writes once for all of its linears
SHARED = ("in_features", "experts", "clusters", "parents")
Shapes = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]


class LinearEntry(BaseModel):
    """The sizes of one linear of ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # of its input group, which writes them once for all of its linears
    in_features: Size = Field(exclude=True)
    experts: Experts = Field(exclude=True)
    clusters: Clusters = Field(exclude=True)
    parents: Parents = Field(exclude=True)

    out_features: Size
    versions: Size
    """rows in the pool, at least out_features and at most experts * out_features"""
    nnz: NonNegativeInt
    """kept weights in the pool, at most versions * in_features; if equal, there is no mask"""
    elements: NonNegativeInt
    """of the tensor `weight`: nnz, but for codecs that put several weights into one"""
    bias: bool = False
    cluster_bias: bool = False
    """whether each cluster has a bias"""
    dtype: Literal["float32", "bfloat16", "float16"]
    """of the dense weight that this linear stands for"""
    values: Literal[
        "float32", "bfloat16", "float16", "int8", "int6", "int5", "int4", "int3", "int2"
    ]  # fmt: skip
    """how kept weights are stored"""
    value_group: NonNegativeInt = 0
    """columns that share a scale; 0 for floats"""

    @model_validator(mode="after")
    def _possible(self) -> "LinearEntry":
        low, high = self.out_features, self.experts * self.out_features
        if not low <= self.versions <= high:
            raise ValueError(f"versions {self.versions} should be {low} to {high}")
        if self.nnz > self.versions * self.in_features:
            raise ValueError(
                f"nnz {self.nnz} exceeds versions * in_features = "
                f"{self.versions * self.in_features}"
            )
        if (self.values in FLOATS) != (self.value_group == 0):
            raise ValueError(f"value_group {self.value_group} does not go with {self.values}")
        low = -(-self.nnz * self.codec.bits // (self.codec.storage.itemsize * 8))
        high = low + self.versions if self.codec.packed else self.nnz
        if not low <= self.elements <= high:
            raise ValueError(f"elements {self.elements} should be {low} to {high}")
        return self

    @property
    def codec(self) -> ValueCodec:
        """How kept weights are stored."""
        return codec(self.values, self.value_group)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight that this linear stands for, without its bias."""
        return self.in_features * self.out_features * FLOATS[self.dtype].itemsize

    def shapes(self) -> Shapes:
        """Tensor kind -> the shape that it must have in the checkpoint, and dtypes it may have."""
        expected: Shapes = {"weight": ((self.elements,), (self.codec.storage,))}
        if self.nnz < self.versions * self.in_features:
            expected["weight_mask"] = (
                (self.versions, (self.in_features + 7) // 8),
                (torch.uint8,),
            )
        if self.codec.scaled:
            scales = self.codec.scales(self.in_features)
            expected["weight_scale"] = ((self.versions, scales), (torch.float16,))
        if self.experts > 1:
            expected["row_map"] = ((self.experts, self.out_features), (torch.uint8,))
        if self.clusters > 1:
            rows = self.parents + self.clusters
            expected["router_weight"] = ((rows, self.in_features), ROUTER_DTYPES)
            expected["router_bias"] = ((rows,), (torch.float32,))
        if 1 < self.experts < self.clusters:
            expected["cluster_expert"] = ((self.clusters,), (torch.uint8,))
        if self.cluster_bias:
            expected["cluster_bias"] = ((self.clusters, self.out_features), (torch.int8,))
            expected["cluster_bias_scale"] = ((self.out_features,), (torch.float16,))
        if self.bias:
            expected["bias"] = ((self.out_features,), tuple(FLOATS.values()))
        return expected


class GroupEntry(BaseModel):
    """One input group: linears that read the same tensor and, with clusters, share a router."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    in_features: Size
    experts: Experts = 1
    clusters: Clusters = 1
    """that the router tells apart; if left out, as many as experts"""
    parents: Parents = 0
    """rows of the router's first level; 0 where it has one level"""
    tokens: list[NonNegativeInt] = Field(default_factory=list)
    """calibration tokens that the router sent to each cluster; empty where not counted"""
    linears: Annotated[dict[str, LinearEntry], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, values: Any) -> Any:
        """Give each linear the sizes that its group has for all."""
        linears = values.get("linears") if isinstance(values, Mapping) else None
        if not isinstance(linears, Mapping):
            return values
        experts = values.get("experts", 1)
        values = {"experts": experts, "clusters": experts, "parents": 0, **values}
        shared = {key: values[key] for key in SHARED if key in values}
        known = {}
        for name, entry in linears.items():
            if isinstance(entry, Mapping):
                if twice := sorted(shared.keys() & entry.keys()):
                    raise ValueError(f"{name}: {twice[0]} should stand in its group alone")
                entry = {**entry, **shared}
            known[name] = entry
        return {**values, "linears": known}

    @model_validator(mode="after")
    def _possible(self) -> "GroupEntry":
        if self.clusters < self.experts:
            raise ValueError(f"clusters {self.clusters} should be at least experts {self.experts}")
        if self.parents == 1 or self.parents > self.clusters:
            raise ValueError(
                f"parents {self.parents} should be 0 or 2 to the {self.clusters} clusters"
            )
        if len(self.tokens) not in (0, self.clusters):
            raise ValueError(f"tokens has {len(self.tokens)} counts for {self.clusters} clusters")
        for name, entry in self.linears.items():
            for key in SHARED:
                if getattr(entry, key) != getattr(self, key):
                    found, right = getattr(entry, key), getattr(self, key)
                    raise ValueError(f"{name}: {key} {found} should be {right}, as in its group")
        return self

    @classmethod
    def of(cls, linears: Mapping[str, LinearEntry], tokens: Sequence[int] = ()) -> "GroupEntry":
        """The group of these linears, by the names of their tensors."""
        first = next(iter(linears.values()))
        shared = {key: getattr(first, key) for key in SHARED}
        return cls(linears=dict(linears), tokens=[int(count) for count in tokens], **shared)


class CheckpointConfig(BaseModel):
    """`quantization_config` of config.json."""

    model_config = ConfigDict(extra="forbid")

    quant_method: Literal["wexpand"] = "wexpand"
    format_version: Literal[1] = 1
    groups: list[GroupEntry]
    """in the order in which the model runs them, where that is known"""
    made_by: dict[str, Any] = Field(default_factory=dict)
    """what made the checkpoint (versions, recipe values); informative"""
    digest: str = ""
    """sha256 of everything above, see `seal`"""

    @model_validator(mode="after")
    def _once(self) -> "CheckpointConfig":
        names = [name for group in self.groups for name in group.linears]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice} stands in two groups")
        return self

    @cached_property
    def linears(self) -> dict[str, LinearEntry]:
        """The linears of all groups by name."""
        return {name: entry for group in self.groups for name, entry in group.linears.items()}

    @cached_property
    def _groups(self) -> dict[str, GroupEntry]:
        return {name: group for group in self.groups for name in group.linears}

    def group_of(self, linear: str) -> GroupEntry:
        """The input group that a linear belongs to; KeyError for one that is not ours."""
        return self._groups[linear]

    def tensors_of(self, linear: str) -> list[str]:
        """The checkpoint's tensors of a linear of ours."""
        return [f"{linear}.{kind}" for kind in self.linears[linear].shapes()]

    def seal(self) -> "CheckpointConfig":
        """A copy whose digest is right."""
        return self.model_copy(update={"digest": digest_of(self.model_dump(mode="json"), "digest")})


def digest_of(values: Mapping[str, Any], without: str) -> str:
    """sha256 of `values` but for the key `without`, as sorted JSON."""
    rest = {key: value for key, value in values.items() if key != without}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def parse_config(values: Mapping[str, Any], where: str = "config.json") -> CheckpointConfig:
    """Validate a `quantization_config`. Errors name the key, its value and what would be right.

    :param values: as they stand in the file: `digest` is that of the keys that are there, so that
        a writer may leave out those that have a default
    """
    if not isinstance(values, Mapping):
        raise WexpandError(f"{where}: quantization_config: {values!r} should be an object")
    if values.get("quant_method") == QUANT_METHOD:
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise WexpandError(
                f"{where}: format_version {version!r} is not {FORMAT_VERSION}, the one this "
                "version of wexpand-plugin reads"
            )
        if "groups" not in values and "linears" in values:
            raise WexpandError(
                f"{where}: quantization_config lists linears without input groups, a layout from "
                "before the first release that is not read any more; compress or pack the dense "
                "model again"
            )
    try:
        config = CheckpointConfig.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = reprlib.repr(first.get("input"))
        raise WexpandError(f"{where}: quantization_config.{key}: {value}: {first['msg']}") from None
    found = digest_of(values, "digest")
    if config.digest != found:
        raise WexpandError(
            f"{where}: quantization_config was changed after it was written (its digest is "
            f"{config.digest[:12]}..., its content gives {found[:12]}...)"
        )
    return config
