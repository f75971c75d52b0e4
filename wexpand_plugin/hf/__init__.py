"""The transformers half: `from_pretrained` and `save_pretrained` of checkpoints of ours.

`register` is called when transformers is imported, if `wexpand_plugin` was. Nothing of transformers
is imported with this package: it may be imported while transformers is.
"""

__all__ = ["register"]


def register() -> None:
    """Make transformers know quant_method "wexpand"; a second call does nothing."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    from ..format.config import QUANT_METHOD
    from .quantizer import WexpandQuantizationConfig, WexpandQuantizer

    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(WexpandQuantizationConfig)
        register_quantizer(QUANT_METHOD)(WexpandQuantizer)
