"""Calibration by replay: run a block again to see the inputs of one of its linears.

llm-compressor's sequential pipeline runs every block once for calibration and once for propagation.
During the first run only the block's own arguments are kept. At its end the block is run again as
often as needed: an earlier linear of the block may have been replaced by then, so a later one is
seen with the inputs it will have in use. A replay stops as soon as the wanted linear is reached.

Input groups are found the same way: the linears of a block that are called with the same tensor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor, nn

from ..errors import WexpandError

__all__ = ["BlockReplay", "InputGroup"]


@dataclass(frozen=True)
class InputGroup:
    """The linears of one block that read the same tensor, in the order they are called."""

    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]

    @property
    def label(self) -> str:
        """Short name for logs, like "model.layers.0.mlp: gate_proj + up_proj"."""
        parents = {name.rpartition(".")[0] for name in self.names}
        if len(parents) > 1:
            return " + ".join(self.names)
        return f"{parents.pop()}: {' + '.join(n.rpartition('.')[2] for n in self.names)}"


class _Reached(Exception):
    """Ends a replay early."""


class BlockReplay:
    """Records the arguments of `block` while the pipeline calibrates, and runs it again on them."""

    def __init__(self, block: nn.Module, modifier: Modifier):
        self.block = block
        self.modifier = modifier
        self.cache = IntermediatesCache(None, torch.device("cpu"))
        # llm-compressor types every hook as a function of one argument
        hook: Any = self._record
        modifier.register_hook(block, hook, "forward_pre", with_kwargs=True)

    def _record(self, _block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.cache.append({"args": args, "kwargs": kwargs})

    def __len__(self) -> int:
        return len(self.cache)

    def _run(self, index: int, hooks: set) -> None:
        inputs = self.cache.fetch(index)
        with torch.no_grad(), HooksMixin.disable_hooks(keep=hooks):
            try:
                self.block(*inputs["args"], **inputs["kwargs"])
            except _Reached:
                pass

    def groups(self, linears: dict[str, nn.Linear]) -> list[InputGroup]:
        """The input groups among `linears` (name -> module of this block), in calling order.

        A linear that no batch reaches (an expert of a mixture that gets no token) is left out.

        :raises WexpandError: a linear is called more than once in a forward
        """
        names = {module: name for name, module in linears.items()}
        found: list[list[nn.Linear]] = []
        for index in range(len(self)):
            calls: list[tuple[nn.Linear, Tensor]] = []

            def note(*call: Any, calls=calls) -> None:
                module, args = call
                calls.append((module, args[0]))

            missing = [m for m in names if not any(m in group for group in found)]
            if not missing:
                break
            hooks = {self.modifier.register_hook(m, note, "forward_pre") for m in missing}
            self._run(index, hooks)
            self.modifier.remove_hooks(hooks)
            fresh: list[tuple[Tensor, list[nn.Linear]]] = []
            for module, x in calls:
                if any(module in group for _, group in fresh):
                    raise WexpandError(
                        f"{names[module]}: called more than once in a forward; add it to `ignore`"
                    )
                for other, group in fresh:
                    if _same(x, other):
                        group.append(module)
                        break
                else:
                    fresh.append((x, [module]))
            found += [group for _, group in fresh]
        return [InputGroup(tuple(names[m] for m in group), tuple(group)) for group in found]

    def inputs(
        self, linears: Sequence[nn.Linear], batches: Sequence[int]
    ) -> Iterator[dict[nn.Linear, Tensor]]:
        """The inputs [tokens, in] that reach each of `linears` in each of the given batches.

        A linear that a batch does not reach is missing from that batch's dict.
        """
        masks = getattr(active_session().state, "loss_masks", None)
        seen: dict[nn.Linear, Tensor] = {}

        def take(*call: Any) -> None:
            seen[call[0]] = call[1][0].detach()
            if len(seen) == len(linears):
                raise _Reached

        hooks = {self.modifier.register_hook(m, take, "forward_pre") for m in linears}
        try:
            for index in batches:
                seen.clear()
                self._run(index, hooks)
                mask = masks[index] if masks else None
                yield {module: _rows(x, mask) for module, x in seen.items()}
        finally:
            self.modifier.remove_hooks(hooks)


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """[..., in] -> [tokens, in], without the tokens that llm-compressor's loss mask leaves out."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.numel() == len(rows):
        rows = rows[mask.flatten().bool().to(rows.device)]
    return rows


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that are both alive are the same values in the same memory."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )
