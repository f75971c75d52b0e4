"""Block tuning in llm-compressor's pipeline: the dense path beside the compressed one.

The pipeline hands every block the outputs of compressed blocks only. What a block should give,
though, is what the dense model has at that place, so its hidden states are kept here, block after
block, and run through each block before it is compressed. Where they are not known, as the block
before was not one of the recipe's, or as something else lies between the two, the block's own
inputs stand for them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from loguru import logger
from torch import Tensor, nn

from ..errors import WexpandError
from ..hf.linear import RoutedLinear
from ..method.clusters import Router
from ..method.constant import constant_parts
from ..method.grids import Grid
from ..method.settings import Settings
from ..method.training import TuneResult
from ..method.tunable import TunableLinear
from ..method.tuning import tune_block
from ..method.versions import RowVersions, SolvedRows
from .replay import BlockReplay
from .rows import packed, packed_biases, replace_linear

__all__ = ["DensePath", "say", "trainable", "trained", "tune"]

SAME = 0.05
"""relative difference of hidden states that are the same but for how they were computed"""


class DensePath:
    """The hidden states of the dense model between two blocks."""

    def __init__(self) -> None:
        self._states: list[Tensor] | None = None
        self._left: Tensor | None = None
        self._place = -1

    def leave(self, replay: BlockReplay) -> None:
        """The block of `replay` is compressed: by what it gives now, the next one is known."""
        with torch.no_grad():
            self._left = replay.output(0).cpu() if len(replay) else None

    def _leads_to(self, replay: BlockReplay, place: int) -> bool:
        """Whether a block, not seen yet, reads what the one before it gives, and nothing else does
        something to that: as blocks that are whole decoder layers do."""
        if self._left is None or not self._states or place != self._place + 1 or not len(replay):
            return False
        read = replay.hidden(0).cpu()
        return any(  # of the dense block, where all blocks were calibrated before one was expanded
            read.shape == left.shape and bool((read - left).norm() < SAME * left.norm())
            for left in (self._left, self._states[0])
        )

    @property
    def states(self) -> list[Tensor]:
        """After the last block of which there were targets, for each batch."""
        return self._states or []

    @torch.no_grad()
    def targets(
        self, replay: BlockReplay, place: int, *, unbroken: bool = False
    ) -> list[Tensor]:
        """What the block of `replay`, still dense, gives on the dense path, for each batch.

        :param place: number of the block among all of the model's
        :param unbroken: whether it has to go on from the block before
        :raises WexpandError: it does not
        """
        known = self._states if self._leads_to(replay, place) else None
        if unbroken and known is None and self._states is not None:
            raise WexpandError(
                f"tune_model_epochs: block {place} does not read what block {self._place} gives; "
                "sequential_targets should be whole decoder layers, or use 0"
            )
        outputs = [
            replay.output(number, None if known is None else known[number]).cpu()
            for number in range(len(replay))
        ]
        self._states, self._place = outputs, place
        return outputs


def tune(
    name: str,
    model: nn.Module,
    linears: Mapping[str, RoutedLinear],
    replay: BlockReplay,
    targets: list[Tensor],
    settings: Settings,
) -> tuple[dict[str, RoutedLinear], TuneResult]:
    """Train what the routed `linears` of a block keep, and put the result in their places.

    :param targets: from `DensePath.targets`
    :return: the new linears, by name, and what was gained
    """
    with trainable(model, linears, replay.block) as tunable:
        most = replay.remembered_bytes(settings.max_bytes)
        with constant_parts(replay.block, replay.output, most) as run:
            result = tune_block(
                run, targets, list(tunable.values()), epochs=settings.tune_epochs,
                lr=settings.learning_rate, seed=settings.seed,
                counts=[known.counts for known in replay.known],
            )  # fmt: skip
    say(name, result, "relative squared error of the block's outputs")
    found = trained(model, linears, tunable)
    for linear in found.values():
        linear.materialise()
    return found, result


@contextmanager
def trainable(
    model: nn.Module, linears: Mapping[str, RoutedLinear], within: nn.Module
) -> Iterator[dict[str, TunableLinear]]:
    """Trainable linears in the places of `linears`; until it ends nothing else is trained.

    :param within: the part of `model` that is run
    """
    tunable = {key: _tunable(linear) for key, linear in linears.items()}
    frozen = [p for p in within.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for key, linear in tunable.items():
        model.set_submodule(key, linear)
    try:
        yield tunable
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def trained(
    model: nn.Module, linears: Mapping[str, RoutedLinear], tunable: Mapping[str, TunableLinear]
) -> dict[str, RoutedLinear]:
    """Linears as `linears` were, with what has become of their values, put into `model`."""
    found = {}
    for key, linear in tunable.items():
        old = linears[key]
        row_map = old.pool.row_map
        if row_map is None:
            row_map = torch.zeros(1, old.out_features, dtype=torch.uint8)
        versions = RowVersions(linear.solved(), row_map, 0.0, linear.solved_cluster_bias())
        bias = linear.solved_bias()
        found[key] = replace_linear(
            model, key, old, packed(versions, old.pool.codec), old.router, group=old.group,
            tokens=old.tokens, bias=None if bias is None else bias.to(old.dtype),
            cluster_bias=packed_biases(versions),
        )  # fmt: skip
    return found


def _tunable(linear: RoutedLinear) -> TunableLinear:
    pool, stored, biases = linear.pool, linear.router, linear.cluster_biases
    rows = SolvedRows(pool.rows(dtype=linear.dtype), pool.scale)
    keep = torch.ones_like(rows.weights, dtype=torch.bool)
    if pool.mask is not None:
        keep = rows.weights != 0
    return TunableLinear(
        rows,
        keep,
        pool.version_map().long(),
        Grid(pool.codec.bits, pool.codec.group) if pool.codec.scaled else None,
        None if stored is None else Router(*stored),
        None if linear.bias is None else linear.bias.detach(),
        None if biases is None else biases.decoded(),
        linear.cluster_expert,
    )


def say(name: str, result: TuneResult, what: str) -> None:
    """Tell how training went; `what` is the error that was to fall."""
    if result.diverged:
        logger.warning(
            f"{name}: tuning led to values that are not finite after {result.epochs} epochs; the "
            "best before that are kept (a smaller learning rate may help)"
        )
    logger.info(
        f"{name}: tuned for {result.epochs} epochs, {what} "
        f"{result.before:.4f} -> {result.after:.4f} on held-out tokens"
    )
