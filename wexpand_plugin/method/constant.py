"""Parts of a block whose outputs never change while others are trained are run once a batch.

Block tuning runs a block on the same inputs again and again. What comes before the first trained
linear gives the same outputs each time; where only the MLP is trained that is all of attention,
most of the block's time. Such a part is found by itself: with gradients on, what it gives requires
none.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["constant_parts"]

Run = Callable[[int], Tensor]


@contextmanager
def constant_parts(block: nn.Module, run: Run, max_bytes: float = float("inf")) -> Iterator[Run]:
    """A `run` that gives the same, and computes constant parts of `block` once for each number.

    Parts are the children of `block` that hold a matrix and return tensors; their outputs are kept
    in main memory.

    :param run: output of the block, with trainable linears in it, for a numbered batch
    :param max_bytes: of outputs that are kept; what would take more runs each time
    """
    parts = [m for m in block.children() if any(p.dim() > 1 for p in m.parameters())]
    varying, kept = set[nn.Module](), dict[tuple[nn.Module, int, int], _Kept]()
    number, calls, left = 0, Counter[nn.Module](), max_bytes

    def remembering(part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run_once(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if part in varying:
                return forward(*args, **kwargs)
            calls[part] += 1
            key = part, number, calls[part]
            if key not in kept:
                found = forward(*args, **kwargs)
                if not _constant(found):
                    varying.add(part)
                    return found
                keep = _Kept(found)
                if keep.bytes <= left:
                    kept[key], left = keep, left - keep.bytes
                return found
            return kept[key].again()

        return run_once

    def repeated(which: int) -> Tensor:
        nonlocal number
        number = which
        calls.clear()
        if torch.is_grad_enabled():
            return run(which)
        # whether something requires gradients is seen only where they are on
        with torch.enable_grad():
            return run(which).detach()

    own = {part: part.__dict__.get("forward") for part in parts}
    for part in parts:
        part.forward = remembering(part, part.forward)  # type: ignore[method-assign]
    try:
        yield repeated
    finally:
        for part, forward in own.items():
            if forward is None:
                del part.forward
            else:
                part.forward = forward  # type: ignore[method-assign]


class _Kept:
    """What a part gave: a tensor, or a tuple of tensors and None."""

    def __init__(self, found: Any):
        self.single = isinstance(found, Tensor)
        parts = (found,) if self.single else found
        self.devices = [None if part is None else part.device for part in parts]
        self.tensors = [None if part is None else part.detach().cpu() for part in parts]
        self.bytes = sum(tensor.nbytes for tensor in self.tensors if tensor is not None)

    def again(self) -> Any:
        """The same, on the devices where it was."""
        pairs = zip(self.tensors, self.devices, strict=True)
        parts = tuple(None if tensor is None else tensor.to(device) for tensor, device in pairs)
        return parts[0] if self.single else parts


def _constant(found: Any) -> bool:
    """Whether these are tensors (or None among them), none of which requires a gradient."""
    parts = found if type(found) is tuple else (found,)
    return all(
        part is None or (isinstance(part, Tensor) and not part.requires_grad) for part in parts
    )
