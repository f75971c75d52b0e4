"""Calibration by replay: run a block again to see the inputs of one of its linears.

llm-compressor's sequential pipeline runs every block once for calibration and once for propagation.
During the first run only the block's own arguments are kept. At its end the block is run again as
often as needed: an earlier linear of the block may have been replaced by then, so a later one is
seen with the inputs it will have in use. A replay stops as soon as the wanted linear is reached.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor, nn

from ..method.inputs import InputGroup, find_groups, record_inputs, token_rows
from .bypass import Bypass

__all__ = ["BlockReplay", "ReplayedInputs"]


class BlockReplay:
    """Records the arguments of `block` while the pipeline calibrates, and runs it again on them.

    :param register_hook: of the modifier: its hooks rest while the pipeline propagates
    :param counts: says which tokens of the batch that runs now count (`calibration`)
    :param bypass: where nothing else is wanted of the pipeline's run
    """

    def __init__(
        self,
        block: nn.Module,
        register_hook: Callable[..., Any],
        counts: Callable[[], Tensor | None],
        bypass: Bypass | None = None,
    ):
        self.block, self._counts_now, self._bypass = block, counts, bypass
        self.counts: list[Tensor | None] = []
        self.cache = IntermediatesCache(None, torch.device("cpu"))
        register_hook(block, self._record, "forward_pre", with_kwargs=True)

    def _record(self, _block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.cache.append({"args": args, "kwargs": kwargs})
        self.counts.append(self._counts_now())
        if self._bypass is not None:
            self._bypass.reached(self.block)

    def __len__(self) -> int:
        return len(self.cache)

    def _run(self, number: int) -> None:
        with torch.no_grad():
            self.output(number)

    def output(self, number: int, hidden: Tensor | None = None) -> Tensor:
        """The hidden states that the block gives for a batch; with gradients where they are on.

        :param hidden: hidden states to read, instead of those that were recorded
        """
        inputs = self.cache.fetch(number)
        args, kwargs = list(inputs["args"]), dict(inputs["kwargs"])
        if hidden is not None and args:
            args[0] = hidden.to(args[0])
        elif hidden is not None:
            kwargs["hidden_states"] = hidden.to(kwargs["hidden_states"])
        with HooksMixin.disable_hooks():
            found = self.block(*args, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    def groups(self, linears: Mapping[str, nn.Linear]) -> list[InputGroup]:
        """The input groups among `linears` (name -> module of this block), in calling order."""
        return find_groups(linears, (partial(self._run, number) for number in range(len(self))))

    def inputs(
        self, linears: Sequence[nn.Module], numbers: Iterable[int] | None = None
    ) -> Iterator[dict[nn.Module, Tensor]]:
        """The input rows [tokens, in] that reach each of `linears` in each of the given batches.

        A linear that a batch does not reach is missing from that batch's dict.
        """
        numbers = list(range(len(self)) if numbers is None else numbers)
        found = record_inputs(linears, (partial(self._run, number) for number in numbers))
        for number, seen in zip(numbers, found, strict=True):
            yield {module: token_rows(x, self.counts[number]) for module, x in seen.items()}


class ReplayedInputs:
    """The calibration batches of one linear, as the method reads them (`method.group.Batches`)."""

    def __init__(self, replay: BlockReplay, linear: nn.Module):
        self.replay, self.linear = replay, linear

    def __len__(self) -> int:
        return len(self.replay)

    def __call__(self, numbers: Iterable[int] | None = None) -> Iterator[Tensor]:
        for seen in self.replay.inputs([self.linear], numbers):
            yield from seen.values()
