"""The pipeline's calibration runs of blocks, left out where nobody needs what they compute.

llm-compressor's sequential pipeline runs each block twice, for modifiers' hooks and, when they are
done with it, for the inputs of the next block. What the first run computes is for hooks inside of
the block; the outputs are thrown away. Where blocks are replayed (`replay`), only the arguments of
that run are wanted, and the block need not run at all.

That the outputs are thrown away is not assumed but seen in the first block: it must be alone in
what the pipeline calibrates at a time, with no other modifier that may have hooks inside, and must
be run again before the pipeline reaches the next one. Later blocks then hand on what they are
given, but for their first batch, which shows what they return and whether another block follows.
"""

from collections.abc import Callable
from typing import Any

from llmcompressor.core import active_session
from torch import Tensor, nn

__all__ = ["Bypass", "Instead"]


class Instead:
    """Another forward in the place of a module's, until `end`.

    :param make: the other forward, from the module's own
    """

    def __init__(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self._module, self._set = module, module.__dict__.get("forward")
        module.forward = make(module.forward)

    def end(self) -> None:
        """The module's own again."""
        del self._module.forward
        if self._set is not None:
            self._module.forward = self._set


class Bypass:
    """Decides whether a block's calibration run may be left out, and leaves it out."""

    def __init__(self) -> None:
        self._sure = self._never = False
        self._handles: list[Any] = []
        self._block: nn.Module | None = None
        self._instead: Instead | None = None

    def expanded(self, block: nn.Module, together: int) -> None:
        """What the pipeline calibrated last was `together` blocks, of which `block` is now done."""
        alone = together == 1 and len(active_session().lifecycle.recipe.modifiers) == 1
        if alone and not self._sure and not self._never:
            self._handles.append(block.register_forward_pre_hook(self._run_again))

    def _run_again(self, _block: nn.Module, _args: tuple) -> None:
        self._sure = True
        self._remove()

    def reached(self, block: nn.Module) -> None:
        """The pipeline calibrates a batch of `block`, which is about to run."""
        if self._block is not None and block is not self._block:  # the first batch: nothing is lost
            self.end()
            self._sure, self._never = False, True
        if self._sure and block is not self._block and not self._handles:
            self._handles.append(block.register_forward_hook(self._shown, with_kwargs=True))

    def _shown(self, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._remove()
        if _alike(output, _hidden(args, kwargs)):
            self._block = block
            self._instead = Instead(block, lambda _: lambda *args, **kwargs: _hidden(args, kwargs))

    def end(self) -> None:
        """From now on blocks run."""
        self._remove()
        if self._instead is not None:
            self._instead.end()
        self._block = self._instead = None

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _hidden(args: tuple, kwargs: dict) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _alike(one: Any, other: Any) -> bool:
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and (one.shape, one.dtype) == (other.shape, other.dtype)
