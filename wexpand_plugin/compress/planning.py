"""A plan: what every setting of every targeted linear would cost, found before anything is changed.

The dense model runs over a few batches of the calibration set: once with gradients, for the
sensitivity of its linears, once to find the input groups, and then as often as it takes to keep
the Hessians of the groups in memory in turn. Each group's candidates are solved and measured, and
only numbers stay.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import WexpandError
from ..format.sizes import StoredBytes
from ..format.values import codec, codec_of
from ..method import ranks
from ..method.dial import Candidate, Setting, allocate_settings, least_read, smallest
from ..method.inputs import InputGroup, agreed, find_groups, record_inputs, token_rows
from ..method.prospects import Dial, Weighs, prospects
from ..method.sensitivity import Sensitivity
from ..method.statistics import GroupStatistics
from .calibration import run
from .plan_batches import PlanBatch
from .precision import stored_dtype
from .sensitivity import output_sensitivity

__all__ = ["Plan", "plan_linears", "weighing"]

HESSIAN_BYTES = 2 << 30


@dataclass(frozen=True)
class Plan:
    """The candidates of all linears."""

    groups: list[dict[str, list[Candidate]]]
    """of each input group, by linear"""
    dense: dict[str, int]
    """bytes of each linear as it is"""
    weights: int
    """how many there are"""
    tokens: int
    """that the plan was made from"""
    seconds_per_token: float
    """of the dense model's forward"""
    seconds: float
    """that the plan took"""

    @property
    def dense_bytes(self) -> int:
        """Of all linears as they are."""
        return sum(self.dense.values())

    @property
    def least(self) -> float:
        """The smallest size that can be chosen, of dense bytes."""
        return smallest(self.groups) / self.dense_bytes

    def choose(
        self, size_budget: float | None, read_budget: float | None = None
    ) -> dict[str, Candidate]:
        """The best candidate of each linear that stores `size_budget` and reads `read_budget` times
        the dense bytes, at most; None: as many as it takes.

        :raises WexpandError: no choice is as small
        """
        if size_budget is not None and size_budget < self.least:
            raise WexpandError(
                f"size_budget: {size_budget} is below {self.least:.4f}, the smallest that the "
                "linears can be made; raise it"
            )
        # to a thousandth of a byte: a size of whole bytes, divided and multiplied again, is whole
        stored, read = (
            float("inf") if budget is None else round(budget * self.dense_bytes, 3)
            for budget in (size_budget, read_budget)
        )
        if read_budget is not None and read < (least := least_read(self.groups, stored)):
            raise WexpandError(
                f"read_budget: {read_budget} is below {least / self.dense_bytes:.4f}, the least "
                f"that a token can read of the linears"
                f"{'' if size_budget is None else f' in size_budget {size_budget}'}; raise it"
            )
        return allocate_settings(self.groups, stored, read)


def weighing(model: Any, linear: nn.Linear, dial: Dial) -> Weighs:
    """What things weigh in the settings of `linear`."""
    dtype = stored_dtype(model, linear.weight)

    def weighs(setting: Setting) -> StoredBytes:
        values, group = setting.values, dial.base.value_group
        return StoredBytes(codec_of(dtype) if values == "auto" else codec(values, group), dtype)

    return weighs


def plan_linears(
    model: Any,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[PlanBatch],
    dial: Dial,
) -> Plan:
    """The candidates of `linears`, measured on `batches`; the model stays as it is.

    :raises WexpandError: inputs or gradients that are not finite
    """
    training = model.training
    model.eval()
    try:
        with HooksMixin.disable_hooks():
            return _plan(model, linears, batches, dial)
    finally:
        model.train(training)


def _plan(
    model: Any,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[PlanBatch],
    dial: Dial,
) -> Plan:
    begin = time.perf_counter()
    sensitivity = output_sensitivity(model, linears, batches, dial.base.seed)
    tokens = sum(ranks.gathered(sum(batch.known.tokens for batch in batches)))
    found: list[dict[str, list[Candidate]]] = []
    with torch.no_grad():
        forwards = [partial(run, model, batch.inputs) for batch in batches]
        groups = agreed(find_groups(linears, forwards))
        start = time.perf_counter()
        forwards[0]()
        running = time.perf_counter() - start
        bar = tqdm(total=len(groups), desc="Planning", leave=False)
        for some in _chunks(groups):
            known = _hessians(some, forwards, batches, dial)
            own = []
            for group, hessians in ranks.own(list(zip(some, known, strict=True))):
                own.append(_candidates(model, group, *hessians, sensitivity, dial))
                bar.update(ranks.count())
            found += ranks.interleaved(ranks.gathered(own))
        bar.close()
    missed = linears.keys() - {name for group in groups for name in group.names}
    if missed:
        logger.warning(f"no token of the plan reached {', '.join(sorted(missed))}: they stay dense")
    dense, weights = {}, 0
    with disable_onloading():  # sizes alone
        for group in groups:
            for name, linear in zip(group.names, group.linears, strict=True):
                dense[name] = linear.weight.numel() * stored_dtype(model, linear.weight).itemsize
                weights += linear.weight.numel()
    first = batches[0].inputs["input_ids"].numel()
    return Plan(
        found, dense, weights, tokens, running / first,
        time.perf_counter() - begin,
    )  # fmt: skip


def _candidates(
    model: Any,
    group: InputGroup,
    hessian: Tensor,
    other: Tensor,
    sensitivity: Mapping[str, Sensitivity],
    dial: Dial,
) -> dict[str, list[Candidate]]:
    """Those of each linear of a group; parameters as of `prospects`."""
    weights = [linear.weight.detach() for linear in group.linears]
    try:
        found = prospects(
            weights, hessian, other, [sensitivity[name] for name in group.names], dial,
            weighing(model, group.linears[0], dial),
        )  # fmt: skip
    except WexpandError as error:
        raise WexpandError(f"{group.label}: {error}") from None
    return dict(zip(group.names, found, strict=True))


def _chunks(groups: Sequence[InputGroup]) -> Iterator[list[InputGroup]]:
    """Groups whose Hessians are in memory together."""
    some: list[InputGroup] = []
    held = 0
    for group in groups:
        size = 2 * 4 * group.linears[0].weight.shape[1] ** 2
        if some and held + size > HESSIAN_BYTES:
            yield some
            some, held = [], 0
        some.append(group)
        held += size
    if some:
        yield some


def _hessians(
    groups: Sequence[InputGroup], forwards: Sequence, batches: Sequence[PlanBatch], dial: Dial
) -> list[tuple[Tensor, Tensor]]:
    """Of each group the mean of x x^T over most batches, and over those kept to measure on."""
    firsts = [group.linears[0] for group in groups]
    parts: dict[nn.Module, list[GroupStatistics]] = {
        linear: [
            GroupStatistics(
                linear.weight.shape[1], None, seed=dial.base.seed, device=linear.weight.device
            )
            for _ in range(2)
        ]
        for linear in firsts
    }
    for batch, seen in zip(batches, record_inputs(firsts, forwards), strict=True):
        for linear, x in seen.items():
            parts[linear][batch.unseen].add(token_rows(x, batch.known.counts))
    found = []
    for linear in firsts:
        solved, other = parts[linear]
        for part in parts[linear]:
            part.flush()
            part.join()
        measured = other if int(other.tokens.sum()) else solved
        found.append((solved.total(), measured.total()))
    return found
