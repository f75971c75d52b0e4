"""Outputs of the parts of a block that are done, kept while the rest of it is replayed.

Every input group is seen by another replay of the block, which stops at the first linear that is
yet to be replaced. What a part of the block (attention, usually the first) has given by then
follows from what is done, and does not change any more: it is kept, and the part left out from
then on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bypass import Instead
from .together import Apart

__all__ = ["Remembered"]


class Remembered:
    """The outputs of `module`, by batch. What it gives waits for `keep` or `drop`.

    :param running: the numbers of the batches that run now, joined; none if it is not known
    :param batches: how many there are
    :param max_bytes: of outputs that are kept; if all of them are larger, none are
    """

    def __init__(
        self,
        module: nn.Module,
        running: Callable[[], Sequence[int]],
        batches: int,
        max_bytes: int,
    ):
        self._running, self._batches, self._left = running, batches, max_bytes
        self._known: dict[int, Any] = {}
        self._fresh: tuple[Sequence[int], Any] | None = None
        self._instead = Instead(module, self._remembering)

    def end(self) -> None:
        """The module runs again."""
        self._instead.end()
        self._known.clear()
        self.drop()

    def _remembering(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            numbers = self._running()
            if numbers and all(number in self._known for number in numbers):
                return _together([self._known[number] for number in numbers])
            found = forward(*args, **kwargs)
            if numbers and self._left:
                self._fresh = numbers, found
            return found

        return run

    def drop(self) -> None:
        """What it gave last may change."""
        self._fresh = None

    def keep(self) -> None:
        """What it gave last, if it has run, does not change any more."""
        if self._fresh is None:
            return
        (numbers, found), self._fresh = self._fresh, None
        try:
            parts = _apart(found, len(numbers))
        except Apart:
            self._left = 0
            return
        if _bytes(parts[0]) * self._batches > self._left:
            self._left = 0
            return
        self._known.update(zip(numbers, parts, strict=True))


def _apart(found: Any, count: int) -> list[Any]:
    """Of each of `count` joined batches, a tensor or a tuple of them."""
    if found is None:
        return [None] * count
    if isinstance(found, tuple):
        each = [_apart(value, count) for value in found]
        return list(zip(*each, strict=True)) if each else [()] * count
    if not isinstance(found, Tensor) or not found.dim() or len(found) % count:
        raise Apart
    device = found.device
    return [(part.cpu(), device) for part in found.tensor_split(count)]


def _together(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if first is None:
        return None
    if len(first) == 2 and isinstance(first[0], Tensor) and isinstance(first[1], torch.device):
        return torch.cat([part for part, _ in parts]).to(first[1])
    return tuple(_together(each) for each in zip(*parts, strict=True))


def _bytes(part: Any) -> int:
    if part is None or isinstance(part, torch.device):
        return 0
    return part.nbytes if isinstance(part, Tensor) else sum(_bytes(each) for each in part)
