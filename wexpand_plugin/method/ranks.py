"""Several processes that compress one model together: ranks, in the words of torch.distributed.

Each rank runs the model on its own share of the calibration batches. What is learned from them is
added up or gathered, so that all ranks go on with the same numbers; work that needs no batches is
spread over them and its results handed round. So every rank ends with the same model, and with what
one process would have found, but for the order of sums.

All of this does nothing where there is one process. Where there are several, they have to come to
the same calls in the same order: what decides on a call must be the same everywhere. Each call
first asks whether all are well, so that an error on one rank ends the others with its message.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import WexpandError, reason

__all__ = [
    "count",
    "gathered",
    "interleaved",
    "joined",
    "of_first",
    "own",
    "rank",
    "spread",
    "start",
    "together",
    "total",
]

T = TypeVar("T")

PATIENCE = timedelta(hours=24)
"""that one rank waits for what another computes"""
TELLING = timedelta(minutes=1)
"""that a rank with an error waits for the others to listen"""


def start() -> None:
    """Meet the other processes that torchrun has started; each has an accelerator of its own.

    Nothing happens where it started one, or none, or where they have met already.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        own = int(os.environ.get("LOCAL_RANK", 0))
        if own >= torch.accelerator.device_count():
            raise WexpandError(
                f"torchrun: rank {own} of this machine has no {accelerator} of its own; start "
                f"{torch.accelerator.device_count()} processes at most"
            )
        torch.accelerator.set_device_index(own)
    dist.init_process_group("gloo" if accelerator is None else None)
    atexit.register(_end)
    _host(dist.group.WORLD)


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if count() > 1 else 0


@cache
def _host(_world: Any) -> Any:
    """The group that exchanges what is in main memory, whatever the accelerators use."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _group(device: torch.device) -> Any:
    return _host(dist.group.WORLD) if device.type == "cpu" else dist.group.WORLD


@contextmanager
def together() -> Iterator[None]:
    """An error in what it encloses ends the other ranks, too, at their next call."""
    try:
        yield
    except Exception as error:
        if count() > 1 and not getattr(error, "told", False):
            error.told = True  # type: ignore[attr-defined]
            with suppress(Exception):  # nobody may be there any more
                _all_well(reason(error))
        raise


def _all_well(problem: str = "") -> None:
    """Find out whether all ranks are, and say what it is where this one is not.

    :raises WexpandError: one of them is not, with its problem
    """
    group, problems = _host(dist.group.WORLD), torch.tensor(int(bool(problem)))
    work = dist.all_reduce(problems, group=group, async_op=True)
    try:
        work.wait(TELLING if problem else PATIENCE)
    except RuntimeError:  # the connection is closed
        raise _told("another rank has ended; it says why") from None
    if problems:
        said: list[Any] = [None] * count()
        dist.all_gather_object(said, problem, group=group)
        first = next(number for number, problem in enumerate(said) if problem)
        raise _told(f"rank {first}: {said[first]}")


def _told(problem: str) -> WexpandError:
    error = WexpandError(problem)
    error.told = True  # type: ignore[attr-defined]
    return error


def gathered(value: T) -> list[T]:
    """The `value` of each rank, in their order; tensors in it have to be in main memory."""
    if count() == 1:
        return [value]
    _all_well()
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value, group=_host(dist.group.WORLD))
    return found


def of_first(make: Callable[[], T]) -> T:
    """What the first rank makes; tensors in it have to be in main memory."""
    if count() == 1:
        return make()
    with together():
        made: list[Any] = [make() if rank() == 0 else None]
    _all_well()
    dist.broadcast_object_list(made, 0, group=_host(dist.group.WORLD))
    return made[0]


def total(*tensors: Tensor) -> None:
    """Add up, in place, what the ranks have in `tensors`, of the same shapes and dtypes on each."""
    if count() > 1:
        _all_well()
        for tensor in tensors:
            dist.all_reduce(tensor, group=_group(tensor.device))


def joined(rows: Tensor) -> Tensor:
    """The `rows` [n, ...] of all ranks, one rank's after another's."""
    if count() == 1:
        return rows
    return torch.cat([own.to(rows.device) for own in gathered(rows.cpu())])


def spread(
    works: Iterable[Callable[[], tuple[Tensor | None, ...]]], device: torch.device
) -> list[tuple[Any, ...]]:
    """What each of `works` gives: tensors on `device`, or None; each is done by one rank."""
    if count() == 1:
        return [work() for work in works]
    with together():
        mine = {number: work() for number, work in own(list(enumerate(works)))}
    shapes: dict[int, list[Any]] = {}
    for some in gathered({number: _about(made) for number, made in mine.items()}):
        shapes |= some
    return [
        _handed_round(mine.pop(number, None), about, number % count(), device)
        for number, about in sorted(shapes.items())
    ]


def _about(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]


def _handed_round(
    own: Sequence[Tensor | None] | None, shapes: list[Any], owner: int, device: torch.device
) -> tuple[Tensor | None, ...]:
    if own is None:
        own = [
            None if known is None else torch.empty(known[0], dtype=known[1], device=device)
            for known in shapes
        ]
    tensors = [None if tensor is None else tensor.contiguous() for tensor in own]
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            # as bytes: not every backend knows every dtype
            some = tensor.view(-1).view(torch.uint8)
            dist.broadcast(some, owner, group=_group(tensor.device))
    return tuple(tensors)


def own(items: Sequence[T]) -> Sequence[T]:
    """Those of `items` that are this rank's: every so many, as `interleaved` joins them again."""
    return items[rank() :: count()]


def interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """The first of each of `parts`, then the second of each, and so on."""
    longest = max(len(part) for part in parts)
    return [part[place] for place in range(longest) for part in parts if place < len(part)]
