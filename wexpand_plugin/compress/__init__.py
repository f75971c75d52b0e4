"""The llm-compressor half: modifiers for recipes, calibration by replay, and `compress`.

`register` is called by `import wexpand_plugin` as soon as llm-compressor is imported too, so that a
YAML recipe can name the modifiers.
"""

from importlib import import_module
from importlib.util import find_spec

__all__ = ["register"]


def register() -> None:
    """Make the modifiers known to llm-compressor's recipes; any number of times."""
    from llmcompressor.modifiers.factory import ModifierFactory

    from .modifier import SparseExpansionModifier
    from .packing import PackModifier
    from .scoring import NeuronScoringModifier

    for modifier in (SparseExpansionModifier, NeuronScoringModifier, PackModifier):
        ModifierFactory.register(modifier.__name__, modifier)


# Before any module of ours imports it: at its end it calls `register`, which needs them whole.
if find_spec("llmcompressor"):
    import_module("llmcompressor")
