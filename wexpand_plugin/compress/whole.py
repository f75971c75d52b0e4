"""Tuning through the whole model, once every block is there.

What the dense model predicts is known though it is gone: the dense path (`tuning.DensePath`) ends
with its hidden states after the last block that was compressed, and all that follows is as it was.
So the model is run once on each batch with these states in place of that block's output, and what
then reaches its head is kept. From now on a batch gives both predictions: the head reads the
compressed model's hidden states and, behind them, the dense model's.

Blocks are checkpointed, so that a batch needs the memory of one block's activations beside the
hidden states between blocks. The model has to fit on its device.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import WexpandError
from ..hf.linear import RoutedLinear
from ..method.settings import Settings
from ..method.training import TuneResult
from ..method.tuning import tune_model
from .calibration import counted_tokens, run
from .tuning import say, trainable, trained

__all__ = ["refuse_gaps", "tune_whole"]


def refuse_gaps(model: Any, places: Sequence[int]) -> None:
    """Refuse what cannot be tuned as a whole.

    :param places: numbers of the blocks that hold targets, among all of the model's
    :raises WexpandError: a block between two of these holds none, so that the dense path ends
        there; a model without a head
    """
    if len(places) <= max(places) - min(places):
        missing = min(set(range(min(places), max(places))) - set(places))
        raise WexpandError(
            f"tune_model_epochs: block {missing} lies between others and holds no targets; give "
            "it some, or use 0"
        )
    if model.get_output_embeddings() is None:
        raise WexpandError(
            f"tune_model_epochs: {type(model).__name__} has no output embeddings, so it predicts "
            "no tokens; use 0"
        )


def tune_whole(
    model: Any,
    blocks: Sequence[nn.Module],
    linears: Mapping[str, RoutedLinear],
    batches: Sequence[Mapping[str, Tensor]],
    states: Sequence[Tensor],
    settings: Settings,
) -> tuple[dict[str, RoutedLinear], TuneResult]:
    """Train what the routed `linears` keep, and put the result in their places.

    :param blocks: that hold the linears, in the model's order
    :param batches: the calibration batches, as the model's forward takes them
    :param states: the dense model's hidden states after the last of `blocks`, for each batch
    :return: the new linears, by name, and what was gained
    """
    device = torch.device(get_execution_device(model.get_input_embeddings()))
    batches = [
        {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        for batch in batches
    ]
    counts = [_predicted(batch) for batch in batches]
    head = model.get_output_embeddings()
    with _without_dropout(model), trainable(model, linears, model) as tunable:
        read = [
            _read(model, head, blocks[-1], batch, state)
            for batch, state in zip(batches, states, strict=True)
        ]

        def both(number: int) -> tuple[Tensor, Tensor]:
            with _beside(head, read[number]):
                found, dense = run(model, batches[number]).chunk(2)
                return found, dense

        with _checkpointed(blocks):
            result = tune_model(
                both, list(tunable.values()), counts, epochs=settings.tune_model_epochs,
                lr=settings.tune_model_lr, seed=settings.seed,
            )  # fmt: skip
    say("The whole model", result, "divergence from the dense model's predictions")
    return trained(model, linears, tunable), result


def _predicted(batch: Mapping[str, Tensor]) -> Tensor:
    """Of which tokens the predictions count: those that count themselves."""
    counts = counted_tokens(batch)
    assert counts is not None
    return counts


@torch.no_grad()
def _read(
    model: Any, head: nn.Module, block: nn.Module, batch: Mapping[str, Tensor], state: Tensor
) -> Tensor:
    """What the dense model's head reads: `state` is given for the output of `block`."""

    def replace(_module: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (state.to(output[0]), *output[1:])
        return state.to(output)

    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(replace),
        head.register_forward_pre_hook(lambda _module, args: found.append(args[0].cpu())),
    ]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0]


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """While it lasts, all of `model` is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _beside(head: nn.Module, read: Tensor) -> Iterator[None]:
    """While it lasts, the head reads `read`, too: a second half of each batch."""

    def join(_module: nn.Module, args: tuple) -> tuple:
        return (torch.cat([args[0], read.to(args[0])]), *args[1:])

    handle = head.register_forward_pre_hook(join)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, the activations within a block are computed again when they are needed."""
    with ExitStack() as stack:
        for block in blocks:
            own = block.__dict__.get("forward")
            block.forward = partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False
            )
            stack.callback(_restore, block, own)
        yield


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward  # type: ignore[method-assign]
