"""Tuning: what is kept is trained to give what the dense model gives, block by block, then whole.

A solver sees one linear at a time and minimises the error of its outputs. What matters is the error
of the block's output, to which the linears contribute together, and to which earlier blocks have
contributed already: the inputs are those that the compressed model produces. So after a block has
been solved, its kept values, biases and cluster biases are trained on the squared error between the
block's output on those inputs and the dense model's output, each token's relative to the size of
what the dense model gives: the next block normalises its input, and a few tokens that are a
thousand times larger than the rest would else be all that counts. So would a token that only the
compressed model makes so large: from the dense model's size on, an error counts by its size and no
longer by its square (Huber's loss).

A block cannot know which of its errors later blocks mend and which they blow up. Once all blocks
are there, the same can be trained through the whole model, on the divergence of its predictions
from the dense model's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .training import TuneResult, train
from .tunable import TunableLinear

__all__ = ["tune_block", "tune_model"]


def tune_block(
    run: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    linears: Sequence[TunableLinear],
    *,
    counts: Sequence[Tensor | None] | None = None,
    **how: Any,
) -> TuneResult:
    """Train `linears`, in place, until the block's outputs are close to `targets`.

    :param run: output [..., hidden] of the block, with `linears` in it, on a numbered batch
    :param targets: what the dense model has there, one for each batch, as `run` gives it
    :param counts: of each batch, which tokens count: booleans [...]; None: all
    :param how: see `training.train`; the learning rate is relative to the size of a linear's
        weights
    :return: relative squared errors, as `_bounded` has them
    """
    counts = counts or [None] * len(targets)

    def error(number: int) -> Tensor:
        y, target = run(number).float(), targets[number].float()
        size = target.square().sum(dim=-1)
        change = (y - target.to(y)).square().sum(dim=-1) / size.clamp(min=1e-12).to(y)
        return _sum(_bounded(change), counts[number])

    tokens = [
        target[..., 0].numel() if count is None else int(count.sum())
        for target, count in zip(targets, counts, strict=True)
    ]
    return train(error, tokens, *_parameters(linears), **how)


def tune_model(
    run: Callable[[int], tuple[Tensor, Tensor]],
    linears: Sequence[TunableLinear],
    counts: Sequence[Tensor],
    **how: Any,
) -> TuneResult:
    """Train `linears`, in place, until the model predicts what the dense model predicts.

    :param run: logits [..., vocabulary] of a numbered calibration batch: those of the model with
        `linears` in it, and the dense model's
    :param counts: of each batch, which tokens count: booleans [...]
    :param how: see `training.train`
    :return: Kullback-Leibler divergences from the dense model, nats per token
    """

    def error(number: int) -> Tensor:
        found, dense = (logits.float().log_softmax(dim=-1) for logits in run(number))
        lost = torch.nn.functional.kl_div(found, dense.detach(), reduction="none", log_target=True)
        return _sum(lost.sum(dim=-1), counts[number])

    tokens = [int(count.sum()) for count in counts]
    return train(error, tokens, *_parameters(linears), what="Tuning the whole", **how)


def _bounded(squares: Tensor) -> Tensor:
    """Huber's loss of the roots of `squares`: what is below 1 as it is, x^2 above as 2x - 1."""
    return torch.where(squares > 1, 2 * squares.clamp(min=1).sqrt() - 1, squares)


def _sum(errors: Tensor, counts: Tensor | None) -> Tensor:
    return errors.sum() if counts is None else errors[counts.to(errors.device)].sum()


def _parameters(linears: Sequence[TunableLinear]) -> tuple[list[Tensor], list[float]]:
    """What is trained, and the pace of each."""
    every = [(p, linear.pace) for linear in linears for p in linear.parameters()]
    return [p for p, _ in every], [pace for _, pace in every]
