"""A finished block, as it is kept: what has become of its linears, and how to put that back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..format.linear import StoredLinear
from ..format.rowpool import RowPool
from ..hf.linear import RoutedLinear
from ..method.candidates import Candidates
from .expansion import Target
from .records import read_record, recorded
from .rows import replace_linear

__all__ = ["FinishedLinear", "finished_linears", "restore_linears", "wait_in"]


@recorded
@dataclass(frozen=True)
class FinishedLinear:
    """What has replaced a targeted linear."""

    stored: StoredLinear
    group: str
    """name of its input group in the checkpoint"""
    label: str
    """and in messages"""
    tokens: list[int]
    """calibration tokens of each cluster"""
    candidates: Candidates | None
    """what a model-wide budget has yet to choose from"""
    calibrating: RowPool | None
    """the experts that later blocks are calibrated on until it does"""
    calibrating_bias: Tensor | None
    """and biases of clusters, float32 [clusters, out]"""


def finished_linears(targets: Mapping[str, Target]) -> dict[str, FinishedLinear]:
    """Those of `targets` that have been replaced, as they are kept."""
    found = {}
    for name, target in targets.items():
        if target.routed is None:
            continue
        routed, rows, bias = target.routed, None, None
        if target.candidates is not None:
            weights, bias = routed.computes_with
            assert weights is not None
            own = torch.arange(len(weights), device=weights.device).unsqueeze(1)
            rows = RowPool.pack(
                weights.transpose(0, 1).flatten(0, 1), own.expand(weights.shape[:2])
            )
        found[name] = FinishedLinear(
            routed.stored, routed.group, target.label, routed.tokens,
            None if target.candidates is None else target.candidates(), rows, bias,
        )  # fmt: skip
    return found


def wait_in(file: Path, targets: Mapping[str, Target]) -> None:
    """The candidates of `targets` stay in the record that they are in, and not in memory."""
    for name, target in targets.items():
        if target.candidates is not None:
            target.candidates = _in_record(file, name)


def _in_record(file: Path, name: str) -> Callable[[], Candidates]:
    return partial(read_record, file, "linears", name, "candidates")


def restore_linears(
    model: nn.Module,
    targets: Mapping[str, Target],
    finished: Mapping[str, FinishedLinear],
    file: Path,
) -> None:
    """Put the linears of a block in the places of the dense ones, as they were when it ended.

    :param file: the record that they are from
    """
    for name, known in finished.items():
        target, stored = targets[name], known.stored
        assert target.linear is not None
        device = target.linear.weight.device
        biases, experts = stored.cluster_bias, stored.cluster_expert
        routed = replace_linear(
            model, name, target.linear, stored.pool.to(device),
            None if stored.router is None else stored.router.to(device),
            group=known.group, tokens=known.tokens,
            bias=None if stored.bias is None else stored.bias.to(device),
            cluster_bias=None if biases is None else biases.to(device),
            cluster_expert=None if experts is None else experts.to(device),
        )  # fmt: skip
        _compute_with(routed, known, device)
        target.linear, target.routed, target.label = None, routed, known.label
        target.candidates = None if known.candidates is None else _in_record(file, name)


def _compute_with(routed: RoutedLinear, known: FinishedLinear, device: torch.device) -> None:
    if known.calibrating is None:
        routed.materialise()
        return
    rows, bias = known.calibrating, known.calibrating_bias
    weights = torch.stack([rows.expert(e) for e in range(rows.experts)]).to(device)
    routed.materialise(weights, None if bias is None else bias.to(device))
