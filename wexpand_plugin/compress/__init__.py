"""The llm-compressor half: modifiers for recipes, calibration by replay, and `compress`.

`register` is called by `import wexpand_plugin` as soon as llm-compressor is imported too, so that a
YAML recipe can name the modifiers.
"""

__all__ = ["register"]


def register() -> None:
    """Make the modifiers known to llm-compressor's recipes; any number of times."""
    from llmcompressor.modifiers.factory import ModifierFactory

    from .modifier import SparseExpansionModifier
    from .packing import PackModifier
    from .scoring import NeuronScoringModifier

    for modifier in (SparseExpansionModifier, NeuronScoringModifier, PackModifier):
        ModifierFactory.register(modifier.__name__, modifier)
