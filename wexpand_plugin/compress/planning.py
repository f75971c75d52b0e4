"""A plan: what every setting of every targeted linear would cost, found before anything is changed.

The dense model runs over a few batches of the calibration set: once with gradients, for the
sensitivity of its linears, once to find the input groups, and then as often as it takes to keep
the Hessians of the groups in memory in turn. Each group's candidates are solved and measured, and
only numbers stay.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import WexpandError
from ..format.sizes import StoredBytes
from ..format.values import codec, codec_of
from ..method.dial import Candidate, Setting, allocate_settings, smallest
from ..method.inputs import InputGroup, find_groups, record_inputs, token_rows
from ..method.prospects import DENSE, Dial, Weighs, prospects
from ..method.statistics import GroupStatistics
from .calibration import counted_tokens, run
from .expansion import Target
from .precision import stored_dtype
from .sensitivity import output_sensitivity, unseen

__all__ = [
    "Plan",
    "choose_settings",
    "plan_batches",
    "plan_linears",
    "refuse_unreachable",
    "use_settings",
]

PLAN_TOKENS = 8192
"""tokens that a plan is made from"""
PLAN_TOKENS_PER_COLUMN = 4
"""and for each input column of the widest linear"""
HESSIAN_BYTES = 2 << 30


@dataclass(frozen=True)
class Plan:
    """The candidates of all linears."""

    groups: list[dict[str, list[Candidate]]]
    """of each input group, by linear"""
    dense_bytes: int
    weights: int
    """how many there are"""
    tokens: int
    """that the plan was made from"""
    seconds_per_token: float
    """of the dense model's forward"""
    seconds: float
    """that the plan took"""

    @property
    def least(self) -> float:
        """The smallest size that can be chosen, of dense bytes."""
        return smallest(self.groups) / self.dense_bytes

    def choose(self, size_budget: float) -> dict[str, Candidate]:
        """The best candidate of each linear in `size_budget` times the dense bytes.

        :raises WexpandError: no choice is as small
        """
        if size_budget < self.least:
            raise WexpandError(
                f"size_budget: {size_budget} is below {self.least:.4f}, the smallest that the "
                "linears can be made; raise it"
            )
        return allocate_settings(self.groups, size_budget * self.dense_bytes)


def _weighs(model: Any, linear: nn.Linear, dial: Dial) -> Weighs:
    """What things weigh in the settings of `linear`."""
    dtype = stored_dtype(model, linear.weight)

    def weighs(setting: Setting) -> StoredBytes:
        values, group = setting.values, dial.base.value_group
        return StoredBytes(codec_of(dtype) if values == "auto" else codec(values, group), dtype)

    return weighs


def refuse_unreachable(model: Any, linears: Mapping[str, nn.Linear], dial: Dial) -> None:
    """A budget that no settings meet is known from shapes alone.

    :raises WexpandError: with the smallest that can be met
    """
    weights = [linear.weight for linear in linears.values()]
    dense = sum(weight.numel() * stored_dtype(model, weight).itemsize for weight in weights)
    least = sum(
        dial.least([linear.weight.shape], _weighs(model, linear, dial))
        for linear in linears.values()
    )
    if dial.size_budget * dense < least:
        raise WexpandError(
            f"size_budget: {dial.size_budget} is below {least / dense:.4f}, the smallest that the "
            f"linears can be made (values {dial.values}, mask_structure {dial.base.structure}); "
            "raise it"
        )


def choose_settings(
    model: Any,
    linears: Mapping[str, nn.Linear],
    loader: Iterable[Mapping[str, Tensor]],
    dial: Dial,
) -> dict[str, Candidate]:
    """What a plan chooses for each of `linears`, by name; one that is missing stays dense.

    :param loader: of the calibration batches, of which a part is used
    """
    device = get_execution_device(next(iter(linears.values())))
    # a run that goes on has no plan to make, and is to see the data in the same order
    with torch.random.fork_rng(devices=[]):
        batches = plan_batches(loader, linears, torch.device(device))
    choice = plan_linears(model, linears, batches, dial).choose(dial.size_budget)
    counts = Counter(candidate.setting for candidate in choice.values())
    found = "; ".join(f"{setting}: {count}" for setting, count in sorted(counts.items()))
    loss = sum(candidate.loss for candidate in choice.values())
    logger.info(f"Of {len(choice)} linears {found}; predicted to add {loss:.3f} nats, untuned")
    return choice


def use_settings(targets: dict[str, Target], choice: Mapping[str, Candidate], dial: Dial) -> None:
    """Give each of `targets` the settings that were chosen; those that stay dense are dropped."""
    for name in list(targets):
        candidate = choice.get(name)
        if candidate is None or candidate.setting == DENSE:
            del targets[name]
        else:
            logger.debug(f"{name}: {candidate.setting}, predicted to add {candidate.loss:.5f}")
            targets[name].settings = dial.settings(candidate.setting)
            targets[name].loss = candidate.loss


def plan_batches(
    loader: Iterable[Mapping[str, Tensor]], linears: Mapping[str, nn.Linear], device: torch.device
) -> list[dict[str, Tensor]]:
    """As many batches of a data loader as a plan needs, on `device`."""
    widest = max(linear.weight.shape[1] for linear in linears.values())
    need, found = max(PLAN_TOKENS, PLAN_TOKENS_PER_COLUMN * widest), []
    for batch in loader:
        counts = counted_tokens(batch)
        need -= 0 if counts is None else int(counts.sum())
        found.append({k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)})
        if need <= 0:
            break
    return found


def plan_linears(
    model: Any,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Mapping[str, Tensor]],
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
    batches: Sequence[Mapping[str, Tensor]],
    dial: Dial,
) -> Plan:
    begin = time.perf_counter()
    sensitivity = output_sensitivity(model, linears, batches, dial.base.seed)
    counts = [counted_tokens(batch) for batch in batches]
    tokens = sum(int(count.sum()) for count in counts if count is not None)
    found = []
    with torch.no_grad():
        forwards = [partial(run, model, batch) for batch in batches]
        groups = find_groups(linears, forwards)
        start = time.perf_counter()
        forwards[0]()
        running = time.perf_counter() - start
        bar = tqdm(total=len(groups), desc="Planning", leave=False)
        for some in _chunks(groups):
            known = _hessians(some, forwards, counts, dial)
            for group, (hessian, other) in zip(some, known, strict=True):
                weights = [linear.weight.detach() for linear in group.linears]
                try:
                    candidates = prospects(
                        weights, hessian, other, [sensitivity[name] for name in group.names],
                        dial, _weighs(model, group.linears[0], dial),
                    )  # fmt: skip
                except WexpandError as error:
                    raise WexpandError(f"{group.label}: {error}") from None
                found.append(dict(zip(group.names, candidates, strict=True)))
                bar.update()
        bar.close()
    missed = linears.keys() - {name for group in groups for name in group.names}
    if missed:
        logger.warning(f"no token of the plan reached {', '.join(sorted(missed))}: they stay dense")
    sizes = [linear.weight for group in groups for linear in group.linears]
    dense = sum(weight.numel() * stored_dtype(model, weight).itemsize for weight in sizes)
    first = batches[0]["input_ids"].numel()
    return Plan(
        found, dense, sum(weight.numel() for weight in sizes), tokens, running / first,
        time.perf_counter() - begin,
    )  # fmt: skip


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
    groups: Sequence[InputGroup], forwards: Sequence, counts: Sequence[Tensor | None], dial: Dial
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
    for number, seen in enumerate(record_inputs(firsts, forwards)):
        for linear, x in seen.items():
            parts[linear][unseen(number)].add(token_rows(x, counts[number]))
    found = []
    for linear in firsts:
        solved, other = parts[linear]
        solved.flush()
        other.flush()
        measured = other if int(other.tokens.sum()) else solved
        found.append((solved.total(), measured.total()))
    return found
