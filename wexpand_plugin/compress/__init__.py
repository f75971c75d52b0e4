"""The llm-compressor half: modifiers for recipes, calibration by replay, and `compress`.

`register` is called by `import wexpand_plugin` as soon as llm-compressor is imported too, so that a
YAML recipe can name the modifiers.
"""

import importlib
from typing import TypeVar

__all__ = ["register", "registered"]


def register() -> None:
    """Make the modifiers known to llm-compressor's recipes; any number of times.

    Each registers itself when its class is made. One of them may be what imports llm-compressor
    and so calls this: it is not complete yet, and has no class to be registered here.
    """
    for module in ("modifier", "packing", "scoring"):
        importlib.import_module(f".{module}", __name__)


M = TypeVar("M", bound=type)


def registered(modifier: M) -> M:
    """Class decorator: let llm-compressor's recipes name `modifier`."""
    from llmcompressor.modifiers.factory import ModifierFactory

    ModifierFactory.register(modifier.__name__, modifier)
    return modifier
