"""What transformers calls when it loads a checkpoint of ours; registered by `hf.register`.

transformers hands a model whose config.json names a quantization method to the quantizer
registered under that name. Ours replaces the linears that the checkpoint expanded by
`RoutedLinear`, while the model is still without memory (on the meta device), and leaves the loading
to transformers: a RoutedLinear's state dict has the checkpoint's tensor names. With a quantizer,
transformers no longer compares shapes and only warns of missing tensors, so everything is checked
here first, from the files.
"""

from typing import Any

# not from transformers.quantizers, which may be half imported when this is
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..format import checkpoint
from .linear import RoutedLinear
from .names import check_tensors, install_linears
from .saving import wrap_save_pretrained

__all__ = ["WexpandQuantizationConfig", "WexpandQuantizer"]


class WexpandQuantizationConfig(QuantizationConfigMixin):
    """config.json's `quantization_config`, checked when made. Raises WexpandError."""

    def __init__(self, **values: Any):
        parsed = checkpoint.parse_config(values)
        self.__dict__.update(parsed.model_dump(mode="json"))

    def parsed(self) -> checkpoint.WexpandConfig:
        """The same as the checkpoint module's own type."""
        return checkpoint.WexpandConfig.model_validate(self.to_dict())


class WexpandQuantizer(HfQuantizer):
    """Builds the routed linears before transformers loads the weights into them."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config.parsed()
        files = checkpoint.tensor_files(checkpoint_files) if checkpoint_files else {}
        if files:
            for problem in checkpoint.problems(files, config):
                raise problem
        install_linears(model, config.linears)
        if files:
            check_tensors(model, files)
        # routing must not depend on the dtype that the model is loaded in
        kept = set(model._keep_in_fp32_modules_strict or ())
        model._keep_in_fp32_modules_strict = kept | {"router_weight", "router_bias"}
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, RoutedLinear):
                module.requires_grad_(False)
        wrap_save_pretrained(model, self.quantization_config.made_by)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        """Yes: `save_pretrained` writes a checkpoint again (`saving.wrap_save_pretrained`)."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: kept weights and masks have no gradient."""
        return False
