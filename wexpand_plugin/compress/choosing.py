"""`sparsity: auto`: what a plan chooses for each linear, and how its experts share the rest.

One version of each row is chosen by both budgets. With several experts it is what a token reads;
what `size_budget` leaves beside it goes to versions of their own, to each linear in proportion.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from loguru import logger
from torch import Tensor, nn

from ..errors import WexpandError
from ..method.dial import Candidate, margins
from ..method.prospects import DENSE, Dial
from .expansion import Target, parts
from .plan_batches import plan_batches, plan_tokens
from .planning import Plan, plan_linears, weighing
from .precision import stored_dtype
from .records import recorded

__all__ = ["Choice", "choose_settings", "refuse_unreachable", "use_settings"]

POINTS = 24
"""of the curve that a checkpoint remembers"""


@recorded
@dataclass(frozen=True)
class Choice:
    """What was chosen, and beside what."""

    linears: dict[str, Candidate]
    """by name; one that is missing stays dense"""
    dense: dict[str, int]
    """dense bytes of each linear of the plan"""
    reasons: dict[str, dict[str, Any]]
    """of each linear, what its bytes are worth: `next`, the loss that further bytes would remove at
    best, and `last`, that fewer would add at least, both in nats per MB stored; None: there are no
    such bytes"""
    curve: list[list[float]]
    """[bytes over dense bytes, predicted loss] of sizes beside the chosen one"""

    def about(self) -> dict[str, Any]:
        """For config.json: why each linear got what it did, and the curve."""
        return {"linears": self.reasons, "curve": self.curve}


def refuse_unreachable(model: Any, linears: Mapping[str, nn.Linear], dial: Dial) -> None:
    """A budget that no settings meet is known from shapes alone.

    :raises WexpandError: with the smallest that can be met
    """
    weights = [linear.weight for linear in linears.values()]
    dense = sum(weight.numel() * stored_dtype(model, weight).itemsize for weight in weights)
    every = [
        dial.least(linear.weight.shape, weighing(model, linear, dial))
        for linear in linears.values()
    ]
    stored, read = (sum(sizes) / dense for sizes in zip(*every, strict=True))
    for key, least, what in (
        ("size_budget", stored, "the smallest that the linears can be made"),
        ("read_budget", read, "the least that a token can read of the linears"),
    ):
        if (budget := dial.budgets.get(key)) is not None and budget < least:
            raise WexpandError(
                f"{key}: {budget} is below {least:.4f}, {what} (values {dial.values}, "
                f"mask_structure {dial.base.structure}, {parts(dial.base)}); raise it"
            )


def choose_settings(
    model: Any,
    linears: Mapping[str, nn.Linear],
    loader: Iterable[Mapping[str, Tensor]],
    dial: Dial,
) -> Choice:
    """What a plan chooses for each of `linears`.

    :param loader: of the calibration batches, of which a part is used
    """
    device = get_execution_device(next(iter(linears.values())))
    # a run that goes on has no plan to make, and is to see the data in the same order
    with torch.random.fork_rng(devices=[]):
        need, seed = plan_tokens(linears.values()), dial.base.seed
        batches = plan_batches(loader, torch.device(device), need, seed)
    plan = plan_linears(model, linears, batches, dial)
    choice = plan.choose(dial.size_budget, dial.read_budget)
    counts = Counter(candidate.setting for candidate in choice.values())
    found = "; ".join(f"{setting}: {count}" for setting, count in sorted(counts.items()))
    loss = sum(candidate.loss for candidate in choice.values())
    logger.info(f"Of {len(choice)} linears {found}; predicted to add {loss:.3f} nats, untuned")
    return Choice(choice, plan.dense, _reasons(plan, choice), _curve(plan, choice))


def _reasons(plan: Plan, choice: Mapping[str, Candidate]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "next": _rounded(found.next * 1e6) if found.next else None,
            "last": _rounded(found.last * 1e6) if found.last < float("inf") else None,
        }
        for name, found in margins(plan.groups, choice).items()
    }


def _curve(plan: Plan, choice: Mapping[str, Candidate]) -> list[list[float]]:
    """Sizes from half of the chosen one, or the least there is, to twice it, and the loss of each;
    the chosen one is among them."""
    here = sum(c.stored for c in choice.values()) / plan.dense_bytes
    low, high = max(plan.least, here / 2), min(1.0, 2 * here)
    points = []
    for n in range(POINTS):
        size = low * (high / low) ** (n / (POINTS - 1))
        points.append((max(size, plan.least), plan.choose(max(size, plan.least))))
    found = [
        [_rounded(sum(c.stored for c in own.values()) / plan.dense_bytes),
         _rounded(sum(c.loss for c in own.values()))]
        for _, own in [*points, (here, dict(choice))]
    ]  # fmt: skip
    return sorted(found)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def use_settings(targets: dict[str, Target], choice: Choice, dial: Dial) -> None:
    """Give each of `targets` the settings that were chosen; those that stay dense are dropped."""
    dense = sum(c.stored for c in choice.linears.values() if c.setting == DENSE)
    once = sum(c.stored for c in choice.linears.values() if c.setting != DENSE)
    for name in list(targets):
        candidate = choice.linears.get(name)
        if candidate is None or candidate.setting == DENSE:
            del targets[name]
            continue
        logger.debug(f"{name}: {candidate.setting}, predicted to add {candidate.loss:.5f}")
        settings = dial.settings(candidate.setting)
        if settings.size_budget is not None:
            left = settings.size_budget * sum(choice.dense.values()) - dense
            own = candidate.stored / choice.dense[name]
            settings = replace(settings, size_budget=own * left / once)
        targets[name].settings = settings
        targets[name].loss = candidate.loss
