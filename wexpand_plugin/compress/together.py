"""Calibration batches of a block run as one.

With experts a batch is cut in as many pieces, and products of a few rows each run at half speed and
read every expert's weights for them. So several batches are joined, along their first dimension,
where each has few tokens.

What a block's arguments mean is not known here: those that differ from batch to batch are taken to
begin with the batch's dimension. That this is so is not assumed but seen: two batches must give
joined what they give alone, or all run alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["TOGETHER", "Arguments", "Apart", "give_the_same", "hidden_states", "joined"]

TOGETHER = 2048
"""tokens that are run at a time, at most, if a batch has fewer"""
CLOSE = 0.01
"""norm of a difference over the norm of what differs, that rounding may make; another meaning of an
argument makes more"""


class Arguments(NamedTuple):
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Apart(Exception):
    """Batches that cannot be joined."""


def hidden_states(arguments: Arguments) -> Tensor:
    """Of a batch [sequences, tokens, in], by the place or the name that blocks read them from."""
    args, kwargs = arguments
    return args[0] if args else kwargs["hidden_states"]


def joined(batches: Sequence[Arguments]) -> Arguments:
    """The arguments of several batches as those of one.

    :raises Apart: they are not alike
    """
    size = len(hidden_states(batches[0]))
    args, kwargs = _join([tuple(batch) for batch in batches], size)
    return Arguments(args, kwargs)


def _join(values: Sequence[Any], size: int) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise Apart
    if isinstance(first, Tensor):
        if any((v.shape, v.dtype) != (first.shape, first.dtype) for v in values):
            raise Apart
        if first.dim() > 1 and len(first) == size:
            return torch.cat(list(values))
        if all(value is first or torch.equal(value, first) for value in values):
            return first
        raise Apart
    if isinstance(first, tuple | list):
        if any(len(value) != len(first) for value in values):
            raise Apart
        return type(first)([_join(each, size) for each in zip(*values, strict=True)])
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise Apart
        return {key: _join([value[key] for value in values], size) for key in first}
    known = first is None or isinstance(first, bool | int | float | str | torch.dtype)
    if not known or any(value != first for value in values):
        raise Apart
    return first


@torch.no_grad()
def give_the_same(run: Callable[[Arguments], Any], one: Arguments, other: Arguments) -> bool:
    """Whether `run`, of a block, gives two batches joined what it gives them alone."""
    try:
        both = run(joined([one, other]))
    except (Apart, RuntimeError, ValueError):
        return False
    alone = [run(one), run(other)]
    if not all(isinstance(found, Tensor) for found in (both, *alone)):
        return False
    expected = torch.cat(alone)
    if both.shape != expected.shape:
        return False
    return bool((both - expected).norm() <= CLOSE * expected.norm())
