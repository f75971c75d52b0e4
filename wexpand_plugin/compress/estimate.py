"""What expanding a model takes and gives, known before any work from the shapes of its linears."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import WexpandError
from ..method.settings import Settings
from .precision import stored_dtype
from .rows import settings_for

__all__ = ["refuse_unreadable", "working_bytes"]


def working_bytes(
    linears: Mapping[str, nn.Linear], settings: Settings, on_disk: bool = False
) -> int:
    """Bytes beside the model: those of the widest input group, and what is kept until the end.

    An input group needs a Hessian for every expert and one for all tokens (float32, in x in each),
    the solved versions, and the solver's `max_bytes`; with cluster biases also the means of the
    clusters, and more rows that are clustered. Candidates of all linears are kept where the whole
    model competes for one budget, with the means that their biases follow from; of those that wait
    `on_disk` the errors and sizes alone, when all blocks are done. Linears of one parent and width
    count as one group, which they nearly always are.
    """
    groups = _groups(linears)
    versions = settings.num_experts if settings.size_budget is None else 2 * settings.num_experts
    # of the sample twice as many rows are held at times; sums, means and held-out sums of clusters
    extra = 4 * (2 * settings.samples + 4 * settings.clusters) if settings.biased else 0
    widest = max(
        (settings.num_experts + 1) * width**2 * 4 + versions * _dense(group) + extra * width
        for (_, width), group in groups.items()
    )
    kept = 0.0
    if settings.size_budget is not None and settings.budget_scope == "model":
        outputs = sum(len(linear.weight) for linear in linears.values())
        if on_disk:
            nodes = 2 * settings.num_experts - 1
            # an error of each expert in float32, a cost in int64, a yes or no
            problems = outputs * nodes * (4 * settings.num_experts + 9)
            return max(widest + settings.max_bytes, problems)
        kept = max(settings.shortlist) * settings.size_budget * _dense(linears.values())
        if settings.biased:
            inputs = sum(width for _, width in groups)
            kept += 2 * 4 * settings.clusters * (outputs + inputs)
    return widest + round(kept) + settings.max_bytes


def refuse_unreadable(model: Any, linears: Mapping[str, nn.Linear], settings: Settings) -> None:
    """With one sparsity for all, what a token reads is known beforehand: versions of a row are
    alike in size, so no allocation reads less.

    :raises WexpandError: that is more than `read_budget`
    """
    if settings.read_budget is None:
        return
    read = dense = 0
    for (_, width), group in _groups(linears).items():
        for place, linear in enumerate(group):
            dtype, rows = stored_dtype(model, linear.weight), len(linear.weight)
            own = settings_for(dtype, settings)
            kept = torch.tensor([width - round(width * settings.sparsity)])
            router = place == 0 or settings.budget_scope == "layer"
            read += rows * int(own.weighs.row(kept, width)) + own.fixed_read(rows, width, router)
            dense += own.weighs.dense(rows, width)
    if settings.read_budget * dense < read:
        raise WexpandError(
            f"read_budget: {settings.read_budget} is below {read / dense:.4f}, what a token reads "
            f"of the linears (sparsity {settings.sparsity}, values {settings.values}, "
            f"{settings.num_experts} experts); raise it or the sparsity, or choose sparsity auto"
        )


def _groups(linears: Mapping[str, nn.Linear]) -> dict[tuple[str, int], list[nn.Linear]]:
    """Linears that nearly always read one tensor: those of one parent and width."""
    groups: dict[tuple[str, int], list[nn.Linear]] = {}
    for name, linear in linears.items():
        groups.setdefault((name.rpartition(".")[0], linear.weight.shape[1]), []).append(linear)
    return groups


def _dense(linears: Iterable[nn.Linear]) -> int:
    return sum(linear.weight.nbytes for linear in linears)
