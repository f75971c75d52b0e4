"""Training on the calibration batches: Adam, until batches that are held out gain no more.

The steps are the same whatever is trained and towards what; `tuning` says both. What did best on
the held-out batches is kept, be it what was there before. How large a step may be hangs on how
little is left to be gained: an epoch that makes the error worse is taken back, and the next ones
take smaller steps.

Several ranks (`ranks`) train together, each on its own batches: a step is made of some of each, and
gradients and held-out errors are added up, so that parameters stay the same on all of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from . import ranks

__all__ = ["TuneResult", "train"]

HELD_OUT = 16
"""one batch in so many is held out"""
STEP_TOKENS = 2048
"""tokens of a step, at least, if the calibration set is not small"""
LEAST_STEPS = 8
"""steps of an epoch, at least, if there are as many batches"""
PATIENCE = 3
"""epochs without progress on the held-out batches before training ends"""
BACK = 0.3
"""times which steps are smaller after an epoch that has been taken back"""


@dataclass(frozen=True)
class TuneResult:
    """Error per token, the mean over the held-out tokens."""

    before: float
    after: float
    epochs: int
    """that were trained"""
    diverged: bool = False
    """training led to values that are not finite; what was there before has been kept"""


def train(
    error: Callable[[int], Tensor],
    tokens: Sequence[int],
    parameters: Sequence[Tensor],
    paces: Sequence[float] | None = None,
    *,
    epochs: int,
    lr: float,
    seed: int = 0,
    quiet: bool = False,
    what: str = "Tuning",
) -> TuneResult:
    """Train `parameters`, in place, until the error on held-out batches is lowest.

    :param error: of a batch, by its number: the sum over its tokens that count; with gradients
        where they are on
    :param tokens: how many count, of each batch of this rank
    :param paces: of each parameter, times `lr`; None: 1
    :param epochs: passes over the batches that are not held out, at most
    :param lr: of Adam; falls linearly to 0
    :param seed: of the order of the batches
    :param what: name of the progress bar
    """
    generator = torch.Generator().manual_seed(seed)
    counts = ranks.gathered(list(tokens))
    order = _shuffled([range(len(own)) for own in counts], generator)
    # batches of which nothing counts teach nothing, and would measure nothing
    order = [(rank, number) for rank, number in order if counts[rank][number]] or order
    held_out = order[: max(1, len(order) // HELD_OUT)] if len(order) > 1 else order
    trained_on = order[len(held_out) :] or order
    seen = max(1, sum(counts[rank][number] for rank, number in held_out))

    def measure() -> float:
        with torch.no_grad():
            found = sum(float(error(number)) for number in _own(held_out))
        summed = torch.tensor(found, dtype=torch.float64)
        ranks.total(summed)
        return float(summed) / seen

    usual = max(1, sum(counts[rank][number] for rank, number in trained_on) / len(trained_on))
    size = max(1, min(round(STEP_TOKENS / usual), len(trained_on) // LEAST_STEPS))
    size = max(size, len(counts))  # no rank idles
    steps = -(-len(trained_on) // size)
    rates = [lr * pace for pace in paces or [1.0] * len(parameters)]
    adam = torch.optim.Adam(
        [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    )
    parts = [[number for rank, number in trained_on if rank == r] for r in range(len(counts))]
    before = lowest = measure()
    best, since, trained = _copy(parameters), 0, 0
    slower, taken = 1.0, 0
    diverged = not math.isfinite(before)
    with tqdm(total=epochs * steps, desc=what, leave=False, disable=quiet) as bar:
        for _ in range(0 if diverged else epochs):
            trained += 1
            shuffled = _shuffled(parts, generator)
            for first in range(0, len(trained_on), size):
                some = shuffled[first : first + size]
                adam.zero_grad()
                with torch.enable_grad():
                    for number in _own(some):
                        (error(number) / (usual * len(some))).backward()
                _add_gradients(parameters)
                for group, rate in zip(adam.param_groups, rates, strict=True):
                    group["lr"] = rate * slower * (1 - taken / (epochs * steps + 1))
                adam.step()
                taken += 1
                bar.update()
            found = measure()
            bar.set_postfix_str(f"error {before:.4f} -> {found:.4f}")
            if not math.isfinite(found):
                diverged = True
                break
            if found < lowest:
                lowest, best, since = found, _copy(parameters), 0
            elif (since := since + 1) >= PATIENCE:
                break
            else:
                _put_back(parameters, best)
                adam.state.clear()
                slower *= BACK
    _put_back(parameters, best)
    return TuneResult(before, lowest, trained, diverged)


def _shuffled(
    parts: Sequence[Sequence[int]], generator: torch.Generator
) -> list[tuple[int, int]]:
    """(rank, number) of the batches of each rank, in random order, the ranks by turns."""
    return ranks.interleaved(
        [
            [(rank, own[place]) for place in torch.randperm(len(own), generator=generator).tolist()]
            for rank, own in enumerate(parts)
        ]
    )


def _own(batches: Sequence[tuple[int, int]]) -> list[int]:
    return [number for rank, number in batches if rank == ranks.rank()]


def _add_gradients(parameters: Sequence[Tensor]) -> None:
    if ranks.count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # no batch of this rank is in the step
            parameter.grad = torch.zeros_like(parameter)
    ranks.total(*(parameter.grad for parameter in parameters if parameter.grad is not None))


@torch.no_grad()
def _put_back(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _copy(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
