"""What transformers calls when it loads a checkpoint of ours; registered by `hf.register`.

transformers hands a model whose config.json names a quantization method to the quantizer
registered under that name. Ours replaces the linears that are ours by `RoutedLinear`, while the
model is still without memory (on the meta device), and leaves the loading to transformers: a
RoutedLinear's state dict has the checkpoint's tensor names. With a quantizer, transformers no
longer compares shapes and only warns of missing tensors, so the files' headers are checked before,
and what was loaded into a RoutedLinear after. Every tensor is read once; `WEXPAND_VERIFY=1` makes
`wexpand verify` of it first, checksums and all.
"""

import os
from pathlib import Path
from typing import Any

# not from transformers.quantizers, which may be half imported when this is
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..format.checks import check_affine, check_pool
from ..format.config import CheckpointConfig, parse_config
from ..format.model_dir import ModelDir
from ..format.problems import problems
from .linear import WIDENED, RoutedLinear
from .names import check_headers, install_linears
from .saving import wrap_save_pretrained

__all__ = ["WexpandQuantizationConfig", "WexpandQuantizer"]


class WexpandQuantizationConfig(QuantizationConfigMixin):
    """config.json's `quantization_config`, checked when made. Raises WexpandError."""

    def __init__(self, **values: Any):
        self.__dict__.update(parse_config(values).model_dump(mode="json"))

    def parsed(self) -> CheckpointConfig:
        """The same as the format's own type."""
        return CheckpointConfig.model_validate(self.to_dict())


class WexpandQuantizer(HfQuantizer):
    """Builds the routed linears before transformers loads the weights into them."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config.parsed()
        install_linears(model, config)
        if checkpoint_files:
            directory = ModelDir(Path(checkpoint_files[0]).parent, checkpoint_files, config)
            for name, entry in config.linears.items():
                for kind in entry.shapes():
                    directory.header(name, kind)
            check_headers(model, directory)
            if os.environ.get("WEXPAND_VERIFY") == "1":
                for problem in problems(directory):
                    raise problem
        # routing and scales must not depend on the dtype that the model is loaded in
        kept = set(model._keep_in_fp32_modules_strict or ())
        model._keep_in_fp32_modules_strict = kept | set(WIDENED)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, RoutedLinear):
                module.requires_grad_(False)
                if not any(tensor.is_meta for tensor in module.state_dict().values()):
                    _check(name, module)
        wrap_save_pretrained(model, self.quantization_config.made_by)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        """Yes: `save_pretrained` writes a checkpoint again (`saving.wrap_save_pretrained`)."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: kept weights and masks have no gradient."""
        return False


def _check(name: str, module: RoutedLinear) -> None:
    """The content of what was loaded; shapes and dtypes were those of the headers."""
    check_pool(module.pool, name)
    check_affine(name, module.stored)
