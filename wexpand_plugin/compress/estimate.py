"""What expanding a model takes and gives, known before any work from the shapes of its linears."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import WexpandError
from ..method import ranks
from ..method.settings import Settings
from ..method.solvers.sparsegpt import chunk_bytes, chunk_size
from .duration import START, Speed, seconds
from .precision import stored_dtype
from .remembered import remembered_bytes
from .rows import settings_for

__all__ = ["Expected", "expected", "kept_bytes", "refuse_unreadable", "working_bytes"]


TRAINED = 20
"""bytes of a weight while it is trained: value, gradient, Adam's two means, and the best so far"""


@dataclass(frozen=True)
class Expected:
    """What expanding a model is expected to take and give."""

    seconds: float
    """of calibration and everything after it"""
    memory: int
    """bytes beside the model, at most at a time"""
    stored: int
    """bytes of the expanded linears"""

    def __str__(self) -> str:
        minutes = self.seconds / 60
        taken = f"{self.seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
        return (
            f"expected: {taken}, {self.memory / 2**30:.2f} GiB beside the model, "
            f"{self.stored / 2**20:.1f} MiB of expanded linears"
        )


def expected(
    model: Any,
    blocks: Mapping[nn.Module, Mapping[str, nn.Linear]],
    tokens: int,
    batches: int,
    settings: Settings,
    size: float | None,
    tried: int = 0,
    on_disk: bool = False,
) -> Expected:
    """Known from shapes, and how fast this machine is from a measurement of about a second.

    :param blocks: block -> its targets by name
    :param tokens, batches: of calibration; tokens that count
    :param size: bytes stored over dense bytes, if that is given
    :param tried: settings of each linear that a plan solves before
    :param on_disk: see `working_bytes`
    """
    speed = Speed.measured(next(iter(blocks)), tokens // max(1, batches), settings)
    # where blocks are replayed, only the first one's calibration runs (`bypass`)
    taken, stored = (0.0 if settings.clusters == 1 else tokens * speed.token), 0.0
    trained = []
    for block, linears in blocks.items():
        weights = 0.0
        groups = _groups(linears)
        shapes = [
            (sum(len(linear.weight) for linear in group), width)
            for (_, width), group in groups.items()
        ]
        targeted = {id(linear) for linear in linears.values()}
        others = [
            (len(linear.weight), linear.weight.shape[1])
            for linear in block.modules()
            if isinstance(linear, nn.Linear) and id(linear) not in targeted
        ]
        parts = [parent for parent, _ in groups]
        taken += seconds(shapes, tokens, settings, speed, others, ranks.count(), parts)
        taken += sum(tried * speed.solved(rows, width) for rows, width in shapes)
        for linear in linears.values():
            own = settings_for(stored_dtype(model, linear.weight), settings)
            rows, width = linear.weight.shape
            kept = torch.tensor([width - round(width * settings.sparsity)])
            each, versions = int(own.weighs.row(kept, width)), float(settings.num_experts * rows)
            whole = versions * each + own.fixed_bytes(rows, width)
            if size is not None:
                dense = size * own.weighs.dense(rows, width)
                versions, whole = min(versions, max(rows, dense / each)), min(whole, dense)
            stored += whole
            weights += versions * width
        trained.append(weights)
    tuned = sum(trained) if settings.tune_model_epochs else max(trained)
    if not settings.tune_epochs and not settings.tune_model_epochs:
        tuned = 0
    every = {name: linear for linears in blocks.values() for name, linear in linears.items()}
    solving = working_bytes(every, settings, tokens, on_disk) + kept_bytes(every, settings, tokens)
    memory = max(solving, round(TRAINED * tuned))
    return Expected(START + taken, memory, round(stored))


def working_bytes(
    linears: Mapping[str, nn.Linear], settings: Settings, tokens: int, on_disk: bool = False
) -> int:
    """Bytes beside the model: those of the widest input group, and what is kept until the end.

    An input group needs a Hessian for every expert and one for all tokens (float32, in x in each),
    the solved versions, the rows that are clustered, and what the solver takes, at most its
    `max_bytes`; with cluster biases also the means of the clusters. Candidates of all linears are
    kept where the whole model competes for one budget, with the means that their biases follow
    from; of those that wait `on_disk` the errors and sizes alone, when all blocks are done. Linears
    of one parent and width count as one group, which they nearly always are. Of the
    calibration `tokens`, hidden states are kept before and after a block.
    """
    groups = _groups(linears)
    versions = settings.num_experts if settings.size_budget is None else 2 * settings.num_experts
    # of the sample twice as many rows are held at times, and those of the batches it was taken
    # from; sums, means and held-out sums of clusters
    extra = 4 * 3 * min(settings.samples, tokens) if settings.clusters > 1 else 0
    extra += 4 * 4 * settings.clusters if settings.biased else 0

    def of_group(width: int, group: list[nn.Linear]) -> int:
        rows = sum(len(linear.weight) for linear in group)
        together = min(versions, chunk_size(rows, width, settings.max_bytes))
        hessians = 4 * width**2 * (settings.num_experts + 1)
        solver = together * chunk_bytes(rows, width)
        return hessians + solver + versions * _dense(group) + extra * width

    widest = max(of_group(width, group) for (_, width), group in groups.items())
    # hidden states before and after a block
    widest += 2 * 4 * tokens * min(width for _, width in groups)
    kept = 0.0
    if settings.size_budget is not None and settings.budget_scope == "model":
        outputs = sum(len(linear.weight) for linear in linears.values())
        if on_disk:
            nodes = 2 * settings.num_experts - 1
            # an error of each expert in float32, a cost in int64, a yes or no
            return max(widest, outputs * nodes * (4 * settings.num_experts + 9))
        kept = max(settings.shortlist) * settings.size_budget * _dense(linears.values())
        if settings.biased:
            inputs = sum(width for _, width in groups)
            kept += 2 * 4 * settings.clusters * (outputs + inputs)
    return widest + round(kept)


def kept_bytes(linears: Mapping[str, nn.Linear], settings: Settings, tokens: int) -> int:
    """Bytes, in main memory, of what is kept of a block that is replayed: what a part of it has
    given and what the last linear of another reads (`remembered`), where these may be kept."""
    if settings.clusters == 1:
        return 0
    widths = [width for _, width in _groups(linears)]
    least, most = (4 * tokens * width for width in (min(widths), max(widths)))
    fits = remembered_bytes(settings.max_bytes, least)
    return sum(own for own in (least, most) if own <= fits)


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
