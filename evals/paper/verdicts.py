"""Whether a hypothesis holds, by a rule.

Each hypothesis is a number, measured once with each seed, and a mark that it should reach, set by
what the paper says or what would matter. With the mean and the standard deviation over seeds:

    holds         mean and mean less two deviations reach the mark
    fails         not even mean and two deviations reach it
    inconclusive  otherwise

With one seed there is no deviation: the number alone decides, and the verdict gets a star.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

__all__ = ["Claim"]


@dataclass(frozen=True)
class Claim:
    """A hypothesis and what was found."""

    hypothesis: str
    """short, for a table; "..." goes on from the one before"""
    measure: str
    """what the numbers are, in words"""
    values: Sequence[float]
    """one for each seed"""
    mark: float
    at_most: bool = False
    """the mark is to be undercut, not reached"""

    @property
    def verdict(self) -> str:
        """holds, fails or inconclusive; with a star where one seed decided."""
        if not self.values or any(math.isnan(value) for value in self.values):
            return "inconclusive"
        sign = -1 if self.at_most else 1
        beyond = sign * (mean(self.values) - self.mark)
        spread = 2 * stdev(self.values) if len(self.values) > 1 else 0.0
        if beyond - spread >= 0:
            found = "holds"
        elif beyond + spread < 0:
            found = "fails"
        else:
            found = "inconclusive"
        return found if len(self.values) > 1 else f"{found}*"

    @property
    def found(self) -> str:
        """The numbers in short."""
        if not self.values:
            return ""
        spread = f" +- {stdev(self.values):.2f}" if len(self.values) > 1 else ""
        return f"{mean(self.values):.2f}{spread}"
