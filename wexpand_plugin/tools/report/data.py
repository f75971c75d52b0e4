"""What a checkpoint says about itself, for the report: sizes, settings, and who uses which row.

Only headers, masks and row maps are read. A row version that k experts use costs each of them 1/k
of a row; summed over neurons, that is the share of a full copy of the linear that an expert takes
from the budget.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...format.clusters import tokens_per_expert
from ...format.config import GroupEntry
from ...format.model_dir import ModelDir
from ..inspect import Inspection, LinearInspection, inspect

__all__ = ["Group", "ReportData", "Sharing", "collect", "common_versions", "short_name", "users"]


@dataclass(frozen=True)
class Sharing:
    """How the experts of one linear share its row versions."""

    cost: Tensor
    """float32 [experts]: row versions that an expert takes, over the neurons; a version with k
    users counts 1/k for each"""
    users: Tensor
    """float32 [experts]: share of all (neuron, expert) pairs whose row has 1, 2, ... users"""
    versions: Tensor
    """float32 [experts]: share of the neurons that have 1, 2, ... versions"""

    @classmethod
    def of(cls, row_map: Tensor) -> "Sharing":
        """From a row map [experts, out]."""
        experts, count = row_map.shape[0], users(row_map)
        versions = (1 / count).sum(dim=0).round().long()
        return cls(
            (1 / count).mean(dim=1),
            torch.bincount(count.flatten(), minlength=experts + 1)[1:] / count.numel(),
            torch.bincount(versions, minlength=experts + 1)[1:] / versions.numel(),
        )


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor and share a router."""

    linears: list[str]
    tokens: list[int]
    """calibration tokens per cluster, empty where not recorded"""
    of_experts: list[int]
    """the same per expert"""

    @property
    def label(self) -> str:
        """The group in short: `3.mlp gate_proj up_proj`."""
        parent = self.linears[0].rpartition(".")[0]
        same = [name for name in self.linears if name.rpartition(".")[0] == parent]
        names = [short_name(parent)] + [name.rpartition(".")[2] for name in same]
        rest = [short_name(name) for name in self.linears if name not in same]
        return " ".join(name for name in names if name) + "".join(f", {name}" for name in rest)


@dataclass(frozen=True)
class ReportData:
    """A checkpoint of ours, without its values."""

    directory: Path
    model: dict[str, Any]
    """config.json without quantization_config"""
    sizes: Inspection
    sharing: dict[str, Sharing]
    groups: list[Group]

    @property
    def linears(self) -> list[LinearInspection]:
        """The expanded linears and their sizes, in the checkpoint's order."""
        return self.sizes.linears

    @property
    def experts(self) -> int:
        """The largest number of experts of a linear; 1: plain sparse."""
        return max((linear.experts for linear in self.linears), default=1)

    @property
    def clusters(self) -> int:
        """The largest number of clusters of a linear, at least its experts."""
        return max((linear.clusters for linear in self.linears), default=1)

    @property
    def unit(self) -> str:
        """What the router tells apart: "expert", or "cluster" where these are more."""
        return "cluster" if self.clusters > self.experts else "expert"


def collect(directory: str | Path) -> ReportData:
    """Read a checkpoint; WexpandError if the directory holds none of ours, or a damaged one."""
    model = ModelDir(directory)
    config, sizes = model.config, inspect(directory)  # which looks at every header
    sharing = {}
    for name, entry in config.linears.items():
        row_map = torch.zeros(1, entry.out_features, dtype=torch.uint8)
        if entry.experts > 1:
            row_map = model.read(f"{name}.row_map")
        sharing[name] = Sharing.of(row_map)
    return ReportData(
        model.path,
        {key: value for key, value in model.config_json.items() if key != "quantization_config"},
        sizes,
        sharing,
        [_group(model, group) for group in config.groups],
    )


def _group(model: ModelDir, group: GroupEntry) -> Group:
    named, first = None, next(iter(group.linears))
    if 1 < group.experts < group.clusters:
        named = model.read(f"{first}.cluster_expert")
    of_experts: list[int] = []
    if group.tokens:
        of_experts = tokens_per_expert(group.tokens, named, group.experts).tolist()
    return Group(list(group.linears), list(group.tokens), of_experts)


def users(row_map: Tensor) -> Tensor:
    """How many experts use the row of each (expert, neuron) pair: int64 [experts, out]."""
    count = torch.zeros(row_map.shape, dtype=torch.int64, device=row_map.device)
    for expert in row_map:
        count += row_map == expert
    return count


def common_versions(row_map: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """The row version that most calibration tokens use, and how many experts use it: [out] each.

    Where tokens were not recorded, the version that most experts use. Ties go to the lower expert.
    """
    weight = torch.tensor(tokens or [1] * row_map.shape[0], device=row_map.device)
    used = torch.zeros(row_map.shape, dtype=torch.int64, device=row_map.device)
    for expert, count in zip(row_map, weight, strict=True):
        used += (row_map == expert) * count
    best = used.argmax(dim=0, keepdim=True)
    return row_map.gather(0, best)[0], users(row_map).gather(0, best)[0]


def short_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `3.mlp.up_proj`: from the block's number on."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] :]) if numbers else name
