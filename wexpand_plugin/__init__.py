"""Sparse Expansion for llm-compressor, served by vLLM.

Importing this package makes two libraries know about it, each only once it is imported itself:

- llm-compressor: recipes may name `SparseExpansionModifier`, `NeuronScoringModifier` and
  `PackModifier`;
- transformers: `from_pretrained` of its Auto classes reads checkpoints of quant_method "wexpand".

vLLM finds its half by an entry point (`wexpand_plugin.serve:register`) and needs no import.
"""

import importlib
import logging
from importlib.metadata import PackageNotFoundError, version

import wrapt

__all__ = ["__version__"]

try:
    __version__ = version("wexpand-plugin")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"


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
