"""Calibration by replay: run a block again to see the inputs of one of its linears.

llm-compressor's sequential pipeline runs every block once for calibration and once for propagation.
During the first run only the block's own arguments are kept. At its end the block is run again as
often as needed: an earlier linear of the block may have been replaced by then, so a later one is
seen with the inputs it will have in use. A replay stops as soon as the wanted linear is reached.

Short batches are replayed several at a time (`together`), always the same ones together, and so is
the pipeline's propagation: the block is run ahead for the batches that are about to come. Parts of
the block that are done do not run again for either (`remembered`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor, nn

from ..method import ranks
from ..method.inputs import InputGroup, Reached, find_groups, record_inputs, token_rows
from ..method.row_sample import order_of
from .bypass import Bypass, Instead
from .calibration import Known
from .remembered import End, Remembered, find_ends, remembered_bytes
from .together import TOGETHER, Apart, Arguments, give_the_same, hidden_states, joined

__all__ = ["BlockReplay", "ReplayedInputs"]


class BlockReplay:
    """Records the arguments of `block` while the pipeline calibrates, and runs it again on them.

    :param register_hook: of the modifier: its hooks rest while the pipeline propagates
    :param current: says what is known of the batch that runs now (`calibration`)
    :param bypass: where nothing else is wanted of the pipeline's run
    :param keep: whether the block will run again; else no arguments are kept
    """

    def __init__(
        self,
        block: nn.Module,
        register_hook: Callable[..., Any],
        current: Callable[[], Known],
        bypass: Bypass | None = None,
        keep: bool = True,
    ):
        self.block, self._current, self._bypass, self._keep = block, current, bypass, keep
        self.known: list[Known] = []
        """of each batch"""
        self.cache = IntermediatesCache(None, torch.device("cpu"))
        self._together = 1
        self._order: list[int] = []
        self._running: list[int] = []
        self._ordered = False
        self._ends: Mapping[nn.Module, End] = {}
        self._remembered: list[Remembered] = []
        self._instead: Instead | None = None
        self._hook = register_hook(block, self._record, "forward_pre", with_kwargs=True)

    def _record(self, _block: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._keep:
            self.cache.append({"args": args, "kwargs": kwargs})
        self.known.append(self._current())
        if self._bypass is not None:
            self._bypass.reached(self.block)

    def __len__(self) -> int:
        return len(self.known)

    def recorded(self) -> None:
        """All batches have passed: the hook, which would keep this and the block alive, goes."""
        self._hook.remove()

    def forget(self) -> None:
        """What was recorded is wanted no more."""
        self.end()
        self.cache = IntermediatesCache(None, torch.device("cpu"))

    def _arguments(self, number: int) -> Arguments:
        inputs = self.cache.fetch(number)
        return Arguments(tuple(inputs["args"]), dict(inputs["kwargs"]))

    def run_together(self, seed: int) -> None:
        """From now on short batches are run several at a time, if that changes nothing.

        :param seed: of the order in which the method reads them: what it reads one after another
            is run together
        """
        own = order_of([known.identity for known in self.known], seed)
        self._order = [number for rank, number in own if rank == ranks.rank()]
        if len(self) < 2:
            return
        one, other = self._arguments(0), self._arguments(1)
        together = TOGETHER // max(1, hidden_states(one)[..., 0].numel())
        if together > 1:
            self._together = together if give_the_same(self._call, one, other) else 1

    def _call(self, arguments: Arguments, numbers: Sequence[int] = ()) -> Any:
        """:param numbers: of the batches, if their inputs are those that were recorded"""
        with HooksMixin.disable_hooks(), self._run(numbers):
            return self.block(*arguments.args, **arguments.kwargs)

    @contextmanager
    def _run(self, numbers: Sequence[int]) -> Iterator[None]:
        self._running = list(numbers)
        try:
            with ExitStack() as watching:
                for part in self._remembered:
                    watching.enter_context(part.watching())
                yield
        except Reached:
            for part in self._remembered:
                part.keep()
            raise
        finally:
            self._running = []
            for part in self._remembered:
                part.drop()

    def remember(self, max_bytes: int) -> None:
        """Until `end`, parts of the block that are done do not run again.

        :param max_bytes: of what may be kept of a part (`remembered_bytes`)
        """
        most = self.remembered_bytes(max_bytes)
        for part in self._parts() if self._ordered else ():
            end = self._ends.get(part)
            self._remembered.append(Remembered(part, self._runs_now, len(self), most, end))

    def remembered_bytes(self, max_bytes: int) -> int:
        """Bytes that may be kept of a part (`remembered.remembered_bytes`)."""
        return remembered_bytes(max_bytes, hidden_states(self._arguments(0)).nbytes * len(self))

    def _parts(self) -> list[nn.Module]:
        return [
            part
            for part in self.block.children()
            if any(parameter.dim() > 1 for parameter in part.parameters())
        ]

    def _runs_now(self) -> list[int]:
        return self._running

    def end(self) -> None:
        """The block and its parts run as they are."""
        if self._instead is not None:
            self._instead.end()
            self._instead = None
        while self._remembered:
            self._remembered.pop().end()

    def _chunks(self) -> list[int]:
        """The number of the run that each batch is in, if all are run in the method's order."""
        chunks = list(range(len(self.known)))
        for place, number in enumerate(self._order):
            chunks[number] = place // self._together
        return chunks

    def _runs(self, numbers: Iterable[int]) -> Iterator[tuple[list[int], Arguments]]:
        """The batches with these numbers, in this order, as they are run: some at a time."""
        for _, run in groupby(numbers, self._chunks().__getitem__):
            some = list(run)
            batches = [self._arguments(number) for number in some]
            try:
                yield some, joined(batches)
            except Apart:
                yield from zip(([number] for number in some), batches, strict=True)

    def hidden(self, number: int) -> Tensor:
        """The hidden states that the block was given for a batch."""
        return hidden_states(self._arguments(number))

    def output(self, number: int, hidden: Tensor | None = None) -> Tensor:
        """The hidden states that the block gives for a batch; with gradients where they are on.

        :param hidden: hidden states to read, instead of those that were recorded
        """
        arguments = self._arguments(number)
        args, kwargs = list(arguments.args), dict(arguments.kwargs)
        if hidden is not None and args:
            args[0] = hidden.to(args[0])
        elif hidden is not None:
            kwargs["hidden_states"] = hidden.to(kwargs["hidden_states"])
        found = self._call(Arguments(tuple(args), kwargs))
        return found[0] if isinstance(found, tuple) else found

    def groups(self, linears: Mapping[str, nn.Linear]) -> list[InputGroup]:
        """The input groups among `linears` (name -> module of this block), in calling order."""
        took = 0

        def runs() -> Iterator[Callable[[], object]]:
            nonlocal took
            for took in range(len(self)):
                yield partial(self.output, took)

        with torch.no_grad(), find_ends(self._parts()) as self._ends:
            found = find_groups(linears, runs())
        # if it takes more, their order need not be the order in which one batch calls them
        self._ordered = took == 0
        return found

    @torch.no_grad()
    def inputs(self, linear: nn.Module, numbers: Iterable[int] | None = None) -> Iterator[Tensor]:
        """The input rows [tokens, in] that reach `linear` in each of the given batches, none if
        one does not reach it."""
        some: list[list[int]] = []

        def forwards() -> Iterator[Callable[[], object]]:
            for own, arguments in self._runs(range(len(self)) if numbers is None else numbers):
                some.append(own)
                yield partial(self._call, arguments, own)

        for seen in record_inputs([linear], forwards()):
            own, x = some.pop(0), seen.get(linear)
            if x is None:
                yield from (torch.empty(0) for _ in own)
                continue
            # of linears that do not see all tokens, parts of what they see in some batches
            parts = x.reshape(-1, x.shape[-1]).tensor_split(len(own))
            for number, part in zip(own, parts, strict=True):
                yield token_rows(part, self.known[number].counts)

    def propagate(self) -> None:
        """The pipeline is about to run the block on what was recorded, batch by batch: until `end`
        it is given what batches give that are run together. Other inputs run as they are."""
        self._instead = Instead(self.block, self._ahead)

    def _ahead(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[int, Any] = {}
        chunks, count, coming = self._chunks(), len(self), 0

        def run_chunk_of(number: int) -> None:
            wanted = [n for n in self._order or range(count) if chunks[n] == chunks[number]]
            for numbers, arguments in self._runs(wanted):
                with self._run(numbers):
                    found = forward(*arguments.args, **arguments.kwargs)
                    for part in self._remembered:
                        part.forget()
                parts = [found] if len(numbers) == 1 else found.tensor_split(len(numbers))
                known.update(zip(numbers, parts, strict=True))

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal coming
            if coming < count:
                if coming not in known:
                    run_chunk_of(coming)
                own = hidden_states(self._arguments(coming))
                if torch.equal(hidden_states(Arguments(args, kwargs)), own):
                    self.cache.delete(coming)  # the pipeline, too, lets go of what it has run
                    coming += 1
                    return known.pop(coming - 1)
            return forward(*args, **kwargs)

        return run


class ReplayedInputs:
    """The calibration batches of one linear, as the method reads them (`method.group.Batches`)."""

    def __init__(self, replay: BlockReplay, linear: nn.Module):
        self.replay, self.linear = replay, linear

    def __len__(self) -> int:
        return len(self.replay)

    def identity(self, number: int, /) -> int:
        return self.replay.known[number].identity

    def __call__(self, numbers: Iterable[int] | None = None) -> Iterator[Tensor]:
        return self.replay.inputs(self.linear, numbers)
