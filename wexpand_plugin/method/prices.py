"""Prices for two budgets: bytes that are stored, and bytes that a token reads.

Whatever is chosen by the least error plus price times bytes has the least error of all choices with
as few bytes. So the best choice in a budget is found by searching its price, and with two budgets
one price is searched inside the other: for each price of what is read, the price of what is stored
follows from its budget, and what is read falls as its price rises.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

__all__ = ["HIGHEST_READ", "Found", "Prices", "best_in_budgets", "cheapest"]

T = TypeVar("T")
HIGHEST, HIGHEST_READ = 1e30, 1e12
"""prices, over one that may do, at which even the last byte is not worth it; of a byte that is read
lower, so that there are prices of a byte stored far above it"""


class Prices(NamedTuple):
    """Of a byte stored, and of a byte that a token reads."""

    stored: float
    read: float


class Found(NamedTuple, Generic[T]):
    """What `cheapest` found."""

    within: T
    """the best choice that is known to fit"""
    above: T
    """the next larger one that is known; `within` where the largest fits"""
    price: float


def cheapest(
    choose: Callable[[float], T],
    weigh: Callable[[T], tuple[float, float]],
    budget: float,
    *,
    start: float = 1.0,
    highest: float = HIGHEST,
    steps: int = 200,
    full: float = 1.0,
    lines: bool = True,
) -> Found[T] | None:
    """The choice at the lowest price of which the bytes are within `budget`.

    Prices lie many decades apart and are bisected by their logarithms. Every other step takes the
    price at which the two nearest choices cost the same: nothing between them ends the search.

    :param weigh: error and bytes of a choice
    :param start: a price that may do
    :param full: share of the budget that is as good as all of it
    :param lines: whether choices have the least error plus price times bytes
    :return: None if no price below `highest` times `start` fits
    """
    above = choose(0.0)
    if weigh(above)[1] <= budget:
        return Found(above, above, 0.0)
    low, high = 0.0, start
    while weigh(within := choose(high))[1] > budget:
        low, high, above = high, high * 16, within
        if high > highest * start:
            return None
    for step in range(steps):
        (error, bytes_), (less, more) = weigh(within), weigh(above)
        if bytes_ >= full * budget:
            break
        middle = (low * high) ** 0.5 if low > 0 else high / 64
        equal = (error - less) / (more - bytes_)
        if exact := lines and step % 2 == 1 and low < equal < high:
            middle = equal
        if not low < middle < high:
            break
        found = choose(middle)
        if (here := weigh(found)[1]) <= budget:
            high, within = middle, found
        else:
            low, above = middle, found
        if exact and here in (bytes_, more):
            break
    return Found(within, above, high)


def best_in_budgets(
    choose: Callable[[Prices], T],
    weigh: Callable[[T], tuple[float, float, float]],
    stored: float,
    read: float,
    *,
    start: float = 1.0,
    steps: int = 60,
    full: float = 1.0,
) -> tuple[Found[T], Prices] | None:
    """The best choice in both budgets; either may be infinite.

    :param weigh: error of a choice, and its bytes, stored and read
    :param steps: where both budgets bind, of the outer search
    :param full: share of a budget that is as good as all of it
    :return: that of the last search, and both prices; None if nothing fits
    """

    def in_stored(of_read: float) -> Found[T] | None:
        def cost(choice: T) -> tuple[float, float]:
            error, bytes_, further = weigh(choice)
            return error + of_read * further, bytes_

        return cheapest(
            lambda price: choose(Prices(price, of_read)), cost, stored, start=start, full=full
        )

    plain = in_stored(0.0)
    if plain is None:
        return None
    if weigh(plain.within)[2] <= read:
        return plain, Prices(plain.price, 0.0)

    def reading(choice: T) -> tuple[float, float]:
        error, _, bytes_ = weigh(choice)
        return error, bytes_

    alone = cheapest(
        lambda price: choose(Prices(0.0, price)), reading, read, start=start, full=full
    )
    if alone is None:
        return None
    if weigh(alone.within)[1] <= stored:
        return alone, Prices(0.0, alone.price)
    inner: dict[float, Found[T]] = {}

    def both(of_read: float) -> T:
        found = in_stored(of_read)
        assert found is not None  # as it is at price 0, and prices of what is stored go further
        inner[of_read] = found
        return found.within

    outer = cheapest(
        both, reading, read, start=start, highest=HIGHEST_READ, steps=steps,
        full=full, lines=False,
    )  # fmt: skip
    if outer is None:
        return None
    found = inner[outer.price]
    return found, Prices(found.price, outer.price)
