"""One dial: how sparse each linear is and in how many bits, for a number of bytes over the model.

Every linear has a few candidates, each with the loss that it is predicted to add (`sensitivity`)
and the bytes that it stores. Losses of different linears add up, so with a price per byte each
linear takes the candidate of least loss plus price times bytes, and no choice with as many bytes
adds less loss. The price is bisected until the bytes fit. What is then left of the budget is less
than one step of one linear, and buys smaller steps that lie beside the best line.

The linears of an input group are often run as one layer, of one kind of values: they choose theirs
together, and their sparsities each for itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import WexpandError

__all__ = ["Candidate", "Setting", "allocate_settings", "smallest"]

BISECTIONS = 200


class Setting(NamedTuple):
    """How a linear is stored."""

    values: str
    """one of GRIDS, or "auto": in the dtype of the dense weight"""
    sparsity: float
    """fraction of weights pruned; 0 and "auto": dense, as it was"""

    def __str__(self) -> str:
        """Like "int4, 50% zeros"."""
        if self == ("auto", 0.0):
            return "dense"
        kind = "values as they are" if self.values == "auto" else self.values
        return f"{kind}, {self.sparsity:.0%} zeros" if self.sparsity else kind


@dataclass(frozen=True)
class Candidate:
    """A setting of one linear, and what it would do."""

    setting: Setting
    loss: float
    """predicted to be added, nats per token"""
    stored: int
    """bytes"""


Group = Mapping[str, Sequence[Candidate]]
"""the candidates of each linear of an input group, by name"""
Choice = dict[str, Candidate]


def smallest(groups: Sequence[Group]) -> int:
    """The fewest bytes that any choice takes."""
    return sum(
        min(
            sum(min(c.stored for c in own) for own in kind.values())
            for kind in _kinds(group).values()
        )
        for group in groups
    )


def allocate_settings(groups: Sequence[Group], budget: float) -> Choice:
    """A candidate for each linear: about the least loss in `budget` bytes, never more bytes.

    A larger budget never adds more loss.

    :raises WexpandError: no choice is as small; the message says how small one can be
    """
    if (least := smallest(groups)) > budget:
        raise WexpandError(
            f"size_budget: {budget:.0f} bytes are below {least}, the least that the candidates take"
        )
    kinds = [list(_kinds(group).values()) for group in groups]
    within = _choose(kinds, float("inf"))
    above = _choose(kinds, 0.0)
    if _stored(above) <= budget:
        return above
    low, high = 0.0, 1.0
    while _stored(found := _choose(kinds, high)) > budget:
        # losses of nats and budgets of bytes: a price above this only ever chooses the smallest
        low, high, above = high, high * 16, found
        if high > 1e30:
            break
    else:
        within = found
    for _ in range(BISECTIONS):
        # prices lie many decades apart
        middle = (low * high) ** 0.5 if low > 0 else high / 1024
        if not low < middle < high:
            break
        found = _choose(kinds, middle)
        if _stored(found) <= budget:
            high, within = middle, found
        else:
            low, above = middle, found
    return _filled(groups, within, budget, _stored(above) - _stored(within))


def _kinds(group: Group) -> dict[str, Group]:
    """The candidates of a group by their values, those that all of its linears have."""
    values = dict.fromkeys(c.setting.values for own in group.values() for c in own)
    found = {
        kind: {name: [c for c in own if c.setting.values == kind] for name, own in group.items()}
        for kind in values
    }
    return {kind: of for kind, of in found.items() if all(of.values())}


def _choose(kinds: Sequence[Sequence[Group]], price: float) -> Choice:
    """What costs least at this price; of equals the smaller. An infinite price: the smallest."""

    def cost(candidates: Sequence[Candidate]) -> tuple[float, float]:
        loss, stored = sum(c.loss for c in candidates), sum(c.stored for c in candidates)
        return (stored, loss) if price == float("inf") else (loss + price * stored, stored)

    choice: Choice = {}
    for group in kinds:
        ways: list[Choice] = [
            {name: min(own, key=lambda c: cost([c])) for name, own in kind.items()}
            for kind in group
        ]
        best: Choice = min(ways, key=lambda way: cost(list(way.values())))
        choice.update(best)
    return choice


def _stored(choice: Choice) -> int:
    return sum(c.stored for c in choice.values())


def _filled(groups: Sequence[Group], choice: Choice, budget: float, gap: int) -> Choice:
    """`choice` and the steps of single linears that the rest of the budget buys.

    The best loss per byte first, until one does not fit: which steps are taken depends on the
    budget in their number alone. Steps as large as the `gap` to the next best choice are none.
    """
    found, left = dict(choice), budget - _stored(choice)
    candidates = {name: own for group in groups for name, own in group.items()}
    while True:
        steps = [
            ((found[name].loss - c.loss) / (c.stored - found[name].stored), name, c)
            for name, own in candidates.items()
            for c in own
            if c.setting.values == found[name].setting.values
            and 0 < c.stored - found[name].stored < gap
            and c.loss < found[name].loss
        ]
        if not steps:
            return found
        _, name, best = max(steps, key=lambda step: step[0])
        left -= best.stored - found[name].stored
        if left < 0:
            return found
        found[name] = best
