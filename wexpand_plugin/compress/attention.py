"""Blocks run with the attention that their model was loaded with.

llm-compressor forces eager attention while it calibrates, as the graph that it traces needs a mask
tensor whatever the batch. Blocks are not traced; when one runs, the mask is made. There the fused
attention of PyTorch gives the same from the same mask, in about two thirds of a block's time and
without a score for each pair of tokens in memory. Others (flash_attention_2) take masks of another
form, and stay eager.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

__all__ = ["FusedAttention"]

FUSED = "sdpa"


class FusedAttention:
    """Which blocks of a model to run with fused attention; made before calibration begins.

    :param blocks: those of the recipe
    """

    def __init__(self, blocks: Iterable[nn.Module] = ()):
        self._configs: dict[nn.Module, list[Any]] = {}
        self._handles: list[Any] = []
        for block in blocks:
            configs = (getattr(module, "config", None) for module in block.modules())
            fused = {id(c): c for c in configs if getattr(c, "_attn_implementation", "") == FUSED}
            if fused:
                self._configs[block] = list(fused.values())

    def hook(self) -> None:
        """From now on attention is fused while a block runs."""
        for block, configs in self._configs.items():
            begin, end = _switch(configs)
            self._handles += [
                block.register_forward_pre_hook(begin),
                block.register_forward_hook(end, always_call=True),
            ]

    def remove(self) -> None:
        """Blocks run as the model's configuration says again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _switch(configs: list[Any]) -> tuple[Callable[..., None], Callable[..., None]]:
    before: list[str] = []

    def begin(_module: nn.Module, _args: tuple) -> None:
        before[:] = [config._attn_implementation for config in configs]
        for config in configs:
            config._attn_implementation = FUSED

    def end(_module: nn.Module, _args: tuple, _output: Any) -> None:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own

    return begin, end
