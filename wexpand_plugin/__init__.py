"""Sparse Expansion for llm-compressor, served by vLLM.

Importing this package makes three libraries know about it, each only once it is imported itself:

- llm-compressor: recipes may name `SparseExpansionModifier` and `NeuronScoringModifier`;
- transformers: `AutoModelForCausalLM.from_pretrained` reads checkpoints with quant_method "wexpand".

vLLM finds its half by an entry point (`wexpand_plugin.serve:register`) and needs no import.
"""

from importlib.metadata import PackageNotFoundError, version

import wrapt

__all__ = ["__version__"]

try:
    __version__ = version("wexpand-plugin")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"


def _with_llmcompressor(_module) -> None:
    from . import compress

    compress.register()


def _with_transformers(_module) -> None:
    from . import hf

    hf.register()


# hooks run after the named module has been imported, at once if it already has: nothing is
# imported here, so that the command line and vLLM's processes start quickly
wrapt.register_post_import_hook(_with_llmcompressor, "llmcompressor")
wrapt.register_post_import_hook(_with_transformers, "transformers.quantizers.auto")
