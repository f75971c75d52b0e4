"""Sparse Expansion for llm-compressor, served by vLLM.

A Python recipe imports its modifiers from here; `recipe` finds the YAML recipes that come along:

    from wexpand_plugin import SparseExpansionModifier, recipe
    oneshot(model=..., dataset=..., recipe=recipe("sparse_expansion_budget"))

Importing this package makes two libraries know about it, each only once it is imported itself:

- llm-compressor: recipes may name `SparseExpansionModifier`, `NeuronScoringModifier` and
  `PackModifier`;
- transformers: `from_pretrained` of its Auto classes reads checkpoints of quant_method "wexpand".

vLLM finds its half by an entry point (`wexpand_plugin.serve:register`) and needs no import.
"""

import importlib
import logging
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from .compress.modifier import SparseExpansionModifier
    from .compress.packing import PackModifier
    from .compress.progress import resumable
    from .compress.recipes import recipe
    from .compress.scoring import NeuronScoringModifier

__all__ = [
    "NeuronScoringModifier",
    "PackModifier",
    "SparseExpansionModifier",
    "__version__",
    "recipe",
    "resumable",
]

try:
    __version__ = version("wexpand-plugin")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

# imported on first use: the modifiers import llm-compressor, which takes some seconds
_HOMES = {
    "NeuronScoringModifier": ".compress.scoring",
    "PackModifier": ".compress.packing",
    "SparseExpansionModifier": ".compress.modifier",
    "recipe": ".compress.recipes",
    "resumable": ".compress.progress",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def _when_imported(library: str, half: str) -> None:
    """Call `half`.register() after `library` has been imported; at once if it already has.

    Nothing is imported before, so that the command line and vLLM's processes start quickly. A
    version of `library` that we cannot work with must stay usable without us.
    """

    def register(_module) -> None:
        try:
            importlib.import_module(half, __name__).register()
        except Exception as error:
            logging.getLogger(__name__).warning(
                "wexpand_plugin cannot be used with this %s: %s: %s",
                library.partition(".")[0],
                type(error).__name__,
                error,
            )

    wrapt.register_post_import_hook(register, library)


_when_imported("llmcompressor", ".compress")
_when_imported("transformers.quantizers.auto", ".hf")
