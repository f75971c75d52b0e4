"""One dial: how sparse each linear is and in how many bits, for a number of bytes over the model.

Every linear has a few candidates, each with the loss that it is predicted to add (`sensitivity`),
the bytes that it stores and those that a token reads of it. Losses of different linears add up, so
with a price per byte each linear takes the candidate of least loss plus price times bytes, and no
choice with as many bytes adds less loss. The prices are bisected until the bytes fit (`prices`).
What is then left of a budget is less than one step of one linear, and buys smaller steps that lie
beside the best line.

The linears of an input group are often run as one layer, of one kind of values: they choose theirs
together, and their sparsities each for itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WexpandError
from .prices import HIGHEST_READ, Prices, best_in_budgets, cheapest

__all__ = ["Candidate", "Margins", "Setting", "allocate_settings", "least_read", "margins",
           "smallest"]  # fmt: skip

INFINITE = float("inf")


class Setting(NamedTuple):
    """How a linear is stored."""

    values: str
    """one of GRIDS, or "auto": in the dtype of the dense weight"""
    sparsity: float
    """fraction of weights pruned; 0 and "auto": dense, as it was"""

    @property
    def kind(self) -> str:
        """What linears that are run as one layer have in common: their values, or being dense."""
        return "dense" if self == ("auto", 0.0) else self.values

    def __str__(self) -> str:
        """Like "int4, 50% zeros"."""
        if self.kind == "dense":
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
    read: int
    """bytes of these that a token reads"""


Group = Mapping[str, Sequence[Candidate]]
"""the candidates of each linear of an input group, by name"""
Choice = dict[str, Candidate]


class Margins(NamedTuple):
    """What bytes are worth to a linear, in nats per byte stored."""

    next: float
    """loss that further bytes would remove, at best; 0: there are none to have"""
    last: float
    """loss that fewer bytes would add, at least; infinite: it cannot have fewer"""


def smallest(groups: Sequence[Group]) -> int:
    """The fewest bytes that any choice stores."""
    return round(float(_Table(groups).best(Prices(INFINITE, 0.0)).stored))


def least_read(groups: Sequence[Group], stored: float = INFINITE) -> int:
    """About the fewest bytes that a token reads in any choice of at most `stored` bytes."""
    table = _Table(groups)
    found = cheapest(
        lambda price: table.best(Prices(price, HIGHEST_READ)),
        lambda c: (c.loss + HIGHEST_READ * c.read, c.stored),
        stored,
    )
    assert found is not None
    return round(found.within.read)


def allocate_settings(
    groups: Sequence[Group], stored: float = INFINITE, read: float = INFINITE
) -> Choice:
    """A candidate for each linear: about the least loss in these bytes, never more bytes.

    A larger budget never adds more loss, where it is the only one.

    :param stored: bytes that are stored, at most
    :param read: bytes that a token reads, at most
    :raises WexpandError: no choice is as small; the message says how small one can be
    """
    if (least := smallest(groups)) > stored:
        raise WexpandError(
            f"size_budget: {stored:.0f} bytes are below {least}, the least that the candidates take"
        )
    table = _Table(groups)
    found = best_in_budgets(table.best, lambda c: c[:3], stored, read)
    if found is None:
        raise WexpandError(
            f"read_budget: {read:.0f} bytes are below {least_read(groups, stored)}, the least that "
            "a token reads of the candidates"
        )
    (within, above, _), prices = found
    # what a byte weighs where it is paid for
    weights = Prices(1.0, 0.0)
    if prices.read > 0:
        weights = Prices(prices.stored / prices.read, 1.0)
    gap = weights.stored * (above.stored - within.stored) + weights.read * (
        above.read - within.read
    )
    return _filled(groups, table.choice(within), (stored, read), weights, gap)


def margins(groups: Sequence[Group], choice: Mapping[str, Candidate]) -> dict[str, Margins]:
    """Of each linear of `choice`, among all its candidates, taken by itself: the linears of a group
    have one kind of values, which may cost some of them less than others."""
    found = {}
    for group in groups:
        for name, own in group.items():
            now = choice[name]
            steps = [
                ((now.loss - c.loss) / (c.stored - now.stored), c.stored > now.stored)
                for c in own
                if c.stored != now.stored
            ]
            found[name] = Margins(
                max([0.0] + [gain for gain, larger in steps if larger]),
                max(0.0, min([INFINITE] + [gain for gain, larger in steps if not larger])),
            )
    return found


class _Picked(NamedTuple):
    """A choice, as places in a table."""

    loss: float
    stored: float
    read: float
    kinds: Tensor
    """of each group, which of its kinds of values"""
    places: Tensor
    """[groups, kinds, linears]: of each, which candidate"""


class _Table:
    """All candidates as tensors [groups, kinds, linears, candidates], to choose at many prices.

    A kind of values that not all linears of a group have is none. Where there is nothing the loss
    is infinite; linears that a group has not cost nothing.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.kinds = [_kinds(group) for group in groups]
        most = [
            max((len(kinds) for kinds in self.kinds), default=1),
            max((len(group) for group in groups), default=1),
            max((len(own) for group in groups for own in group.values()), default=1),
        ]
        shape = (len(groups), *most)
        self.loss = torch.full(shape, INFINITE, dtype=torch.float64)
        self.stored = torch.zeros(shape, dtype=torch.float64)
        self.read = torch.zeros(shape, dtype=torch.float64)
        for g, kinds in enumerate(self.kinds):
            for k, kind in enumerate(kinds):
                self.loss[g, k, len(kind) :, 0] = 0.0
                for n, own in enumerate(kind.values()):
                    numbers = torch.tensor(
                        [(c.loss, c.stored, c.read) for c in own], dtype=torch.float64
                    )
                    for field, column in zip(
                        (self.loss, self.stored, self.read), numbers.unbind(1), strict=True
                    ):
                        field[g, k, n, : len(own)] = column

    def best(self, prices: Prices) -> _Picked:
        """What costs least at these prices; of equals that which stores less. An infinite price of
        what is stored: the smallest."""
        if prices.stored == INFINITE:
            cost, second = torch.where(self.loss < INFINITE, self.stored, INFINITE), self.loss
        else:
            cost = self.loss + prices.stored * self.stored + prices.read * self.read
            second = self.stored
        places = _first(cost, second)
        of_kinds = [
            field.gather(3, places.unsqueeze(3)).squeeze(3).sum(dim=2)
            for field in (cost, second, self.loss, self.stored, self.read)
        ]
        kinds = _first(of_kinds[0], of_kinds[1])
        loss, stored, read = (
            float(field.gather(1, kinds.unsqueeze(1)).sum()) for field in of_kinds[2:]
        )
        return _Picked(loss, stored, read, kinds, places)

    def choice(self, picked: _Picked) -> Choice:
        """The candidates themselves."""
        found = {}
        for g, kinds in enumerate(self.kinds):
            kind = int(picked.kinds[g])
            for n, (name, own) in enumerate(kinds[kind].items()):
                found[name] = own[int(picked.places[g, kind, n])]
        return found


def _first(cost: Tensor, second: Tensor) -> Tensor:
    """Places of the least cost along the last dimension, of equals that with the least second."""
    least = cost.amin(dim=-1, keepdim=True)
    return torch.where(cost == least, second, INFINITE).argmin(dim=-1)


def _kinds(group: Group) -> list[Group]:
    """The candidates of a group by their kind, those that all of its linears have."""
    kinds = dict.fromkeys(c.setting.kind for own in group.values() for c in own)
    found = (
        {name: [c for c in own if c.setting.kind == kind] for name, own in group.items()}
        for kind in kinds
    )
    return [of for of in found if all(of.values())]


def _filled(
    groups: Sequence[Group],
    choice: Choice,
    budgets: tuple[float, float],
    weights: Prices,
    gap: float,
) -> Choice:
    """`choice` and the steps of single linears that the rest of the budgets buys.

    The best loss per byte first, until one does not fit: which steps are taken depends on the
    budget in their number alone. Steps as large as the `gap` to the next best choice are none.

    :param weights: of a byte stored and one read, as they are paid for
    """
    found = dict(choice)
    stored, read = (
        budget - sum(sizes)
        for budget, sizes in zip(
            budgets, zip(*((c.stored, c.read) for c in choice.values()), strict=True), strict=True
        )
    )
    candidates = {name: own for group in groups for name, own in group.items()}

    def step(now: Candidate, to: Candidate) -> float:
        return weights.stored * (to.stored - now.stored) + weights.read * (to.read - now.read)

    while True:
        steps = [
            ((found[name].loss - c.loss) / size, name, c)
            for name, own in candidates.items()
            for c in own
            if c.setting.kind == found[name].setting.kind
            and 0 < (size := step(found[name], c)) < gap
            and c.loss < found[name].loss
        ]
        if not steps:
            return found
        _, name, best = max(steps, key=lambda step: step[0])
        stored -= best.stored - found[name].stored
        read -= best.read - found[name].read
        if stored < 0 or read < 0:
            return found
        found[name] = best
