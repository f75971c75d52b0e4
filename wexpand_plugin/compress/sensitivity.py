"""The sensitivity of every targeted linear's outputs, from one backward pass over a few batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import WexpandError
from ..method import ranks
from ..method.row_sample import RowSample, generator_of
from ..method.sensitivity import Sensitivity, sampled_loss
from .calibration import run
from .plan_batches import PlanBatch

__all__ = ["output_sensitivity"]

SAMPLE_TOKENS = 1024
"""whose gradients and inputs are kept, of each linear"""


def output_sensitivity(
    model: Any, linears: Mapping[str, nn.Linear], batches: Sequence[PlanBatch], seed: int
) -> dict[str, Sensitivity]:
    """What gradients say of each of `linears`, by name (see `method.sensitivity`).

    Weights get no gradients: what is held is the activations of one batch.

    :param batches: those that are `unseen`, or all if none are, give the tokens that are kept
    :param seed: of the labels, which are drawn from the model's predictions
    :raises WexpandError: predictions or gradients that are not finite, or no gradients at all
    """
    squares = {name: torch.zeros(len(linear.weight)) for name, linear in linears.items()}
    # of one seed: the same tokens of both
    gradients = {name: RowSample(SAMPLE_TOKENS, seed) for name in linears}
    inputs = {name: RowSample(SAMPLE_TOKENS, seed) for name in linears}

    def take(name: str, x: Tensor, gradient: Tensor) -> None:
        rows = gradient.detach().float().flatten(0, -2)
        squares[name] += rows.square().sum(dim=0).cpu()
        if sampled:
            gradients[name].add(rows.bfloat16().cpu(), batch.known.identity)
            inputs[name].add(x.detach().flatten(0, -2).bfloat16().cpu(), batch.known.identity)

    from_all = not any(ranks.gathered(any(batch.unseen for batch in batches)))
    tokens = 0
    with torch.enable_grad(), _gradients_of(model, linears, take):
        for batch in tqdm(batches, "Measuring sensitivity", leave=False):
            sampled = from_all or batch.unseen
            logits = run(model, batch.inputs)
            if not bool(torch.isfinite(logits).all()):
                raise WexpandError("model: its predictions on the calibration text are not finite")
            tokens += logits[..., 0].numel() if batch.known.counts is None else batch.known.tokens
            labels = generator_of(seed, batch.known.identity)
            sampled_loss(logits, batch.known.counts, labels).backward()
    tokens = sum(ranks.gathered(tokens))
    ranks.total(*squares.values())
    for name, summed in squares.items():
        gradients[name].join()
        inputs[name].join()
        if not bool(torch.isfinite(summed).all()):
            raise WexpandError(f"{name}: the loss has gradients that are not finite there")
        summed /= max(1, tokens)
    if not any(bool(summed.any()) for summed in squares.values()):
        raise WexpandError("sparsity: auto needs gradients, and none reached the targeted linears")
    return {
        name: Sensitivity(summed, gradients[name].rows, inputs[name].rows)
        for name, summed in squares.items()
    }


@contextmanager
def _gradients_of(
    model: nn.Module, linears: Mapping[str, nn.Linear], take: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """While it lasts, backward passes give inputs [..., in] and gradients [..., out] to `take`."""
    frozen = [p for p in model.parameters() if p.requires_grad]

    def begin(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    def watch(name: str):
        def hook(_module: nn.Module, args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(partial(take, name, args[0]))

        return hook

    handles = [model.get_input_embeddings().register_forward_hook(begin)]  # type: ignore[operator]
    handles += [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
