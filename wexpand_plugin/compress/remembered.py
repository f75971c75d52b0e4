"""What the parts of a block that are done have given, kept while the rest of it is replayed.

Every input group is seen by another replay of the block, which stops at the first linear that is
yet to be replaced. What has run by then follows from what is done, and does not change any more: of
a part of the block (attention, usually the first) that has ended the outputs are kept, and it does
not run again. Where a part hands on what its last linear gives, as most do, it is enough to have
reached that linear: what it reads is kept, and from then on it alone runs in the part's place.

What is kept is kept by run, that is by which batches were joined in it: how many rows a product has
may change the last bits of each, and a run that is resumed has to come to the same bits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bypass import Instead

__all__ = ["End", "Remembered", "find_ends", "remembered_bytes"]

STATES = 3
"""times the hidden states of all batches, which are kept anyway, that a part may take"""


def remembered_bytes(max_bytes: int, states: int) -> int:
    """Bytes that may be kept of a part.

    :param max_bytes: of working memory
    :param states: bytes of the hidden states before the block, of all batches
    """
    return max(max_bytes, STATES * states)


class End(NamedTuple):
    """The linear whose outputs a part of a block hands on."""

    name: str
    """within the part"""
    values: int
    """0: as they are; else as the first of a tuple of so many, the others None"""

    def wrapped(self, output: Tensor) -> Any:
        """What the part gives where the linear gives `output`."""
        return (output, *[None] * (self.values - 1)) if self.values else output


@contextmanager
def find_ends(parts: Iterable[nn.Module]) -> Iterator[Mapping[nn.Module, End]]:
    """The ends of those of `parts` that have one, once a run within the context is over."""
    found: dict[nn.Module, End] = {}
    handles = []
    for part in parts:
        calls: list[tuple[nn.Module, Any]] = []
        names = {m: n for n, m in part.named_modules() if isinstance(m, nn.Linear) and n}

        def called(module: nn.Module, _args: tuple, output: Any, calls=calls) -> None:
            calls.append((module, output))

        def ended(part: nn.Module, _args: tuple, output: Any, calls=calls, names=names) -> None:
            if calls:
                linear, given = calls[-1]
                first, *others = output if isinstance(output, tuple) and output else (output,)
                once = sum(module is linear for module, _ in calls) == 1
                if once and first is given and all(other is None for other in others):
                    values = len(output) if isinstance(output, tuple) else 0
                    found[part] = End(names[linear], values)
            calls.clear()

        handles += [module.register_forward_hook(called) for module in names]
        handles.append(part.register_forward_hook(ended))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Remembered:
    """What `module` gives in each run. What it gives, or its last linear reads, waits for `keep` or
    `drop`.

    :param running: the numbers of the batches that run now, joined; none if it is not known
    :param batches: how many there are
    :param max_bytes: of outputs that are kept, and of what the last linear reads; if all of them
        are larger, none are
    :param end: the module's, if it has one
    """

    def __init__(
        self,
        module: nn.Module,
        running: Callable[[], Sequence[int]],
        batches: int,
        max_bytes: int,
        end: End | None = None,
    ):
        self._module, self._running, self._end = module, running, end
        self._outputs, self._inputs = _Store(batches, max_bytes), _Store(batches, max_bytes)
        self._instead = Instead(module, self._remembering)
        self.drop()

    def end(self) -> None:
        """The module runs again."""
        self._instead.end()
        self._outputs.clear()
        self._inputs.clear()
        self.drop()

    def _remembering(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            numbers = tuple(self._running())
            if numbers in self._outputs.known:
                return _back(self._outputs.known[numbers])
            if numbers in self._inputs.known:
                assert self._end is not None
                linear = self._module.get_submodule(self._end.name)
                found = self._end.wrapped(linear(_back(self._inputs.known[numbers])))
            else:
                found = forward(*args, **kwargs)
            self._output = found
            return found

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs: what the last linear reads is seen."""
        if self._end is None:
            yield
            return

        def seen(_module: nn.Module, args: tuple) -> None:
            self._input = args[0]

        # whatever is there now, and before anything that ends the run there
        linear = self._module.get_submodule(self._end.name)
        handle = linear.register_forward_pre_hook(seen, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def drop(self) -> None:
        """What was seen last may change."""
        self._output = self._input = None

    def keep(self) -> None:
        """What was seen last does not change any more."""
        numbers = tuple(self._running())
        if self._output is not None and self._outputs.put(numbers, self._output):
            self._inputs.known.pop(numbers, None)
        elif self._input is not None:
            self._inputs.put(numbers, self._input)
        self.drop()

    def forget(self) -> None:
        """The batches that run now do not run again."""
        numbers = tuple(self._running())
        self._outputs.known.pop(numbers, None)
        self._inputs.known.pop(numbers, None)


class _Store:
    """Values by run, in main memory, unless all of them would be larger than `max_bytes`."""

    def __init__(self, batches: int, max_bytes: int):
        self.known: dict[tuple[int, ...], Any] = {}
        self._batches, self._max_bytes = batches, max_bytes
        self._room = torch.empty(0, dtype=torch.uint8)

    def put(self, numbers: tuple[int, ...], found: Any) -> bool:
        """Whether `found` is kept as that of the batches with these numbers, if there are any."""
        if not numbers or numbers in self.known:
            return bool(numbers)
        try:
            runs = -(-self._batches // len(numbers))
            if _bytes(found) * self._batches > self._max_bytes * len(numbers):
                return False
            if not self.known:  # in one piece, which goes back as one
                self._room = torch.empty(runs * _bytes(found), dtype=torch.uint8)
            self.known[numbers] = self._away(found)
        except TypeError:
            return False
        return True

    def clear(self) -> None:
        """Nothing is kept any more."""
        self.known.clear()
        self._room = self._room[:0].clone()

    def _away(self, found: Any) -> Any:
        if found is None:
            return None
        if isinstance(found, tuple):
            return tuple(self._away(part) for part in found)
        taken, self._room = self._room[: found.nbytes], self._room[found.nbytes :]
        if len(taken) < found.nbytes or taken.storage_offset() % 16:  # another shape
            return _Away(found.detach().to("cpu", copy=True), found.device)
        own = taken.view(found.dtype).view(found.shape).copy_(found.detach())
        return _Away(own, found.device)


@dataclass(frozen=True)
class _Away:
    tensor: Tensor
    device: torch.device


def _back(found: Any) -> Any:
    if isinstance(found, _Away):
        return found.tensor.to(found.device)
    return None if found is None else tuple(_back(part) for part in found)


def _bytes(found: Any) -> int:
    """:raises TypeError: neither a tensor nor a tuple of tensors"""
    if found is None:
        return 0
    if isinstance(found, Tensor):
        return found.nbytes
    if not isinstance(found, tuple):
        raise TypeError(type(found))
    return sum(_bytes(part) for part in found)
