"""The method applied to a model: blocks are expanded one by one, then all of them share a budget.

Inputs come from replaying a block (`replay`); what the method finds for an input group
(`method.group.expand_group`) takes the place of the group's linears.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import WexpandError
from ..format.clusters import ClusterBias
from ..format.rowpool import RowPool
from ..format.values import ValueCodec
from ..hf.linear import RoutedLinear
from ..method import ranks
from ..method.allocation import Allocation
from ..method.candidates import Candidates, allocate_model
from ..method.group import GroupResult, expand_group
from ..method.inputs import InputGroup, agreed
from ..method.settings import Settings
from ..method.statistics import GroupStatistics
from ..method.training import TuneResult
from .passing import PassingStatistics
from .precision import stored_dtype
from .replay import BlockReplay, ReplayedInputs
from .rows import codec_for, packed, packed_biases, replace_linear, settings_for
from .tuning import tune

__all__ = ["Block", "Target", "allocate_targets", "expand_block", "parts"]


class Block(NamedTuple):
    """A block that holds targets."""

    name: str
    module: nn.Module
    place: int
    """its number among all blocks of the model"""


@dataclass
class Target:
    """A targeted linear, and what has become of it."""

    linear: nn.Linear | None
    """the dense one, until it is replaced"""
    block: str
    """name of its block"""
    depth_weight: float
    """share of the model's blocks that an error of the linear reaches: its own and later ones"""
    routed: RoutedLinear | None = None
    """what has replaced it"""
    label: str = ""
    """of its input group, once replaced"""
    settings: Settings | None = None
    """its own, where they are chosen linear by linear"""
    loss: float | None = None
    """that these are predicted to add, nats per token"""
    candidates: Callable[[], Candidates] | None = None
    """gives what a model-wide budget has yet to choose from, from memory or from a file"""


def expand_block(
    model: nn.Module,
    block: Block,
    targets: Mapping[str, Target],
    replay: BlockReplay,
    passing: PassingStatistics | None,
    outputs: list[Tensor],
    settings: Settings,
) -> TuneResult | None:
    """Replace the `targets` of one block, group by group, calibrated by `replay`, and tune them.

    Later groups are calibrated on what earlier ones have become; until they are dematerialised, the
    new linears compute with what calibrates best. One expert is calibrated on the dense block as a
    whole, as in llm-compressor's SparseGPT, which comes out better (evals/LOG.md).

    :param passing: where the method needs no more, in place of replays
    :param outputs: where blocks are tuned, what the dense model has after this one, of each batch
    :return: what tuning has gained, if there was any
    """
    if passing is None:
        linears = {n: t.linear for n, t in targets.items() if t.linear is not None}
        groups = agreed(replay.groups(linears))
        replay.remember(settings.max_bytes)
    else:
        groups = agreed(passing.groups())
    solved: list[_Solved] = []
    for whole in tqdm(groups, "Expanding", leave=False):
        statistics = passing.take(whole) if passing else None
        for group, own in _alike(whole, targets, settings):
            found = _solve_group(model, group, replay, statistics, own)
            solved.append(_Solved(group, whole.names[0], found, own[0]))
            del found  # what calibrates is copied next, and must not stay beside its copy
        if settings.num_experts > 1:
            _replace_groups(model, solved, targets)
    if solved:
        replay.end()  # what is remembered is of the dense block
        _replace_groups(model, solved, targets)
    routed = {name: t.routed for name, t in targets.items() if t.routed is not None}
    if not settings.tune_epochs or not routed:
        return None
    replay.end()
    tuned, gained = tune(block.name, model, routed, replay, outputs, settings)
    for name, linear in tuned.items():
        targets[name].routed = linear
    return gained


def _alike(
    group: InputGroup, targets: Mapping[str, Target], settings: Settings
) -> list[tuple[InputGroup, list[Settings]]]:
    """The linears of an input group with the same settings, but for their size_budget, together;
    and the settings of each."""
    own = [targets[name].settings or settings for name in group.names]
    found: dict[Settings, list[int]] = {}
    for place, settings in enumerate(own):
        found.setdefault(replace(settings, size_budget=None), []).append(place)
    return [
        (
            InputGroup(
                tuple(group.names[place] for place in places),
                tuple(group.linears[place] for place in places),
            ),
            [own[place] for place in places],
        )
        for places in found.values()
    ]


class _Solved(NamedTuple):
    """An input group that is solved and not yet replaced."""

    group: InputGroup
    called: str
    """its name in the checkpoint"""
    result: GroupResult
    settings: Settings


def _solve_group(
    model: nn.Module,
    group: InputGroup,
    replay: BlockReplay,
    statistics: GroupStatistics | None,
    settings: list[Settings],
) -> GroupResult:
    """What expansion finds for a group; says so.

    :param settings: of each linear, alike but for their size_budget
    """
    start, first = time.perf_counter(), group.linears[0]
    weights = [linear.weight.detach() for linear in group.linears]
    biases: list[Tensor | None] = [
        None if linear.bias is None else linear.bias.detach() for linear in group.linears
    ]
    dtype = stored_dtype(model, weights[0])
    try:
        result = expand_group(
            weights, biases, ReplayedInputs(replay, first),
            settings_for(dtype, settings[0]), statistics, [own.size_budget for own in settings],
        )  # fmt: skip
    except WexpandError as error:
        raise WexpandError(f"{group.label}: {error}") from None
    tokens = result.tokens
    errors = ", ".join(f"{found.calibrating.error:.3f}" for found in result.linears)
    waits = any(found.stored is None for found in result.linears)
    which = " (full expansion, for calibration)" if waits else ""
    logger.info(
        f"{group.label}: {parts(settings[0])}, tokens of each "
        f"{int(tokens.min())}/{int(tokens.median())}/{int(tokens.max())} (min/median/max), "
        f"relative error {errors}{which}, {time.perf_counter() - start:.1f} s"
    )
    return result


def _replace_groups(model: nn.Module, solved: list[_Solved], targets: Mapping[str, Target]) -> None:
    """Put what was found in the places of the linears; empties `solved`."""
    while solved:
        group, called, result, settings = solved.pop(0)
        for name, linear, found in zip(group.names, group.linears, result.linears, strict=True):
            target, stored = targets[name], found.stored
            experts = found.calibrating.experts()
            if stored is None:
                # until the budget's choice, the base versions stand for what will be stored
                assert found.candidates is not None
                stored = found.candidates.base()
            how = codec_for(stored_dtype(model, linear.weight), settings)
            target.routed = replace_linear(
                model, name, linear, packed(stored, how, None if found.candidates else experts),
                result.router, group=called,
                tokens=result.tokens.tolist(), cluster_bias=packed_biases(stored),
                cluster_expert=result.cluster_expert,
            )  # fmt: skip
            target.linear, target.label = None, group.label
            weights = shift = None
            if found.candidates is not None:
                # the first of several ranks chooses
                candidates = found.candidates if ranks.rank() == 0 else None
                target.candidates = partial(_itself, candidates)
                weights, biases = experts.weights, packed_biases(found.calibrating)
                shift = None if biases is None else biases.decoded()
            elif not how.scaled:  # what unpacking would give
                weights = experts.weights.to(how.storage)
            # until the block has been propagated and its other groups have been replayed
            target.routed.materialise(weights, shift)


def _itself(candidates: Candidates | None) -> Candidates:
    assert candidates is not None
    return candidates


def parts(settings: Settings) -> str:
    """How many experts there are, and of how many clusters, in words."""
    experts = f"{settings.num_experts} expert{'s' if settings.num_experts > 1 else ''}"
    if not settings.biased:
        return experts
    return f"{experts} of {settings.clusters} cluster{'s' if settings.clusters > 1 else ''}"


def allocate_targets(model: nn.Module, targets: Mapping[str, Target], settings: Settings) -> None:
    """Spend a model-wide budget over all targets that have candidates; says what is stored."""
    waiting = {n: (t, t.candidates) for n, t in targets.items() if t.candidates is not None}
    budget, read, routers = 0.0, 0.0, set()
    for target, _ in waiting.values():
        assert target.routed is not None
        out_features, in_features = target.routed.out_features, target.routed.in_features
        own = settings_for(target.routed.dtype, target.settings or settings)
        budget += own.version_bytes(out_features, in_features)
        read += own.read_bytes(out_features, in_features, target.routed.group not in routers)
        routers.add(target.routed.group)

    def choose() -> list[Allocation]:
        return allocate_model(
            # one after another: they may be too many to be in memory together
            (candidates() for _, candidates in waiting.values()),
            [target.depth_weight for target, _ in waiting.values()],
            budget,
            read,
        )

    uses = [found.use for found in ranks.of_first(choose)]
    errors: dict[str, list[str]] = {}
    for (name, (target, candidates)), use in zip(waiting.items(), uses, strict=True):
        assert target.routed is not None
        old, device = target.routed, target.routed.weight.device
        how = codec_for(old.dtype, target.settings or settings)
        pool, biases, error = ranks.of_first(partial(_chosen, candidates, use, how))
        new = replace_linear(
            model, name, old, pool.to(device), old.router, group=old.group, tokens=old.tokens,
            cluster_bias=None if biases is None else biases.to(device),
        )  # fmt: skip
        target.routed, target.candidates = new, None
        share = new.stored_bytes() / new.dense_bytes()
        errors.setdefault(target.label, []).append(f"{error:.3f} ({share:.2f} of dense)")
    for label, found in errors.items():
        logger.info(f"{label}: stored with relative error {', '.join(found)}")


def _chosen(
    candidates: Callable[[], Candidates], use: Tensor, how: ValueCodec
) -> tuple[RowPool, ClusterBias | None, float]:
    """What stores the versions in `use` (`Allocation.use`), in main memory, and its error."""
    stored = candidates().select(use)
    biases = packed_biases(stored)
    pool = packed(stored, how).to("cpu")
    return pool, None if biases is None else biases.to("cpu"), stored.error
