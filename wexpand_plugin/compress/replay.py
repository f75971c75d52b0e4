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

__all__ = ["BlockReplay", "ReplayedInputs"]


class BlockReplay:
    """Records the arguments of `block` while the pipeline calibrates, and runs it again on them.

    :param register_hook: of the modifier: its hooks rest while the pipeline propagates
    """

    def __init__(self, block: nn.Module, register_hook: Callable[..., Any]):
        self.block = block
        self.cache = IntermediatesCache(None, torch.device("cpu"))
        register_hook(block, self._record, "forward_pre", with_kwargs=True)

    def _record(self, _block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.cache.append({"args": args, "kwargs": kwargs})

    def __len__(self) -> int:
        return len(self.cache)

    def _run(self, index: int) -> None:
        inputs = self.cache.fetch(index)
        with torch.no_grad(), HooksMixin.disable_hooks():
            self.block(*inputs["args"], **inputs["kwargs"])

    def _runs(self, numbers: Iterable[int] | None = None) -> Iterator[Callable[[], None]]:
        for index in range(len(self)) if numbers is None else numbers:
            yield partial(self._run, index)

    def groups(self, linears: Mapping[str, nn.Linear]) -> list[InputGroup]:
        """The input groups among `linears` (name -> module of this block), in calling order."""
        return find_groups(linears, self._runs())

    def inputs(
        self, linears: Sequence[nn.Module], numbers: Iterable[int] | None = None
    ) -> Iterator[dict[nn.Module, Tensor]]:
        """The input rows [tokens, in] that reach each of `linears` in each of the given batches.

        A linear that a batch does not reach is missing from that batch's dict.
        """
        for seen in record_inputs(linears, self._runs(numbers)):
            yield {module: token_rows(x, None) for module, x in seen.items()}


class ReplayedInputs:
    """The calibration batches of one linear, as the method reads them (`method.group.Batches`)."""

    def __init__(self, replay: BlockReplay, linear: nn.Module):
        self.replay, self.linear = replay, linear

    def __len__(self) -> int:
        return len(self.replay)

    def __call__(self, numbers: Iterable[int] | None = None) -> Iterator[Tensor]:
        for seen in self.replay.inputs([self.linear], numbers):
            yield from seen.values()
