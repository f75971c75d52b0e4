"""The sensitivity of every targeted linear's outputs, from one backward pass over a few batches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import WexpandError
from ..method.sensitivity import sampled_loss
from .calibration import counted_tokens, run

__all__ = ["output_sensitivity"]


def output_sensitivity(
    model: Any, linears: Mapping[str, nn.Linear], batches: Sequence[Mapping[str, Tensor]], seed: int
) -> dict[str, Tensor]:
    """G of each neuron of each of `linears`: float32 [out] by name (see `method.sensitivity`).

    Weights get no gradients: what is held is the activations of one batch.

    :param batches: what the model's forward takes, on its device
    :param seed: of the labels, which are drawn from the model's predictions
    :raises WexpandError: predictions or gradients that are not finite, or no gradients at all
    """
    found = {name: torch.zeros(len(linear.weight)) for name, linear in linears.items()}
    generator = torch.Generator().manual_seed(seed)
    tokens = 0
    with torch.enable_grad(), _gradients_of(model, linears, found):
        for batch in tqdm(batches, "Measuring sensitivity", leave=False):
            counts = counted_tokens(batch)
            logits = run(model, batch)
            if not bool(torch.isfinite(logits).all()):
                raise WexpandError("model: its predictions on the calibration text are not finite")
            tokens += logits[..., 0].numel() if counts is None else int(counts.sum())
            sampled_loss(logits, counts, generator).backward()
    for name, summed in found.items():
        if not bool(torch.isfinite(summed).all()):
            raise WexpandError(f"{name}: the loss has gradients that are not finite there")
        summed /= max(1, tokens)
    if not any(bool(summed.any()) for summed in found.values()):
        raise WexpandError("sparsity: auto needs gradients, and none reached the targeted linears")
    return found


@contextmanager
def _gradients_of(
    model: nn.Module, linears: Mapping[str, nn.Linear], sums: Mapping[str, Tensor]
) -> Iterator[None]:
    """While it lasts, backward passes add the squared gradients of outputs to `sums`."""
    frozen = [p for p in model.parameters() if p.requires_grad]

    def begin(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    def watch(name: str):
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(take)

        def take(gradient: Tensor) -> None:
            squared = gradient.detach().float().square().flatten(0, -2).sum(dim=0)
            sums[name].add_(squared.cpu())

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
