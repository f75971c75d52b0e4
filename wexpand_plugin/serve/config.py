"""What vLLM asks first: which method serves a layer of the model.

The checkpoint's config lists the expanded linears by their Hugging Face names. vLLM fuses some of
them (q, k, v into qkv_proj) and renames others; the model class says how, through
`packed_modules_mapping` and `apply_vllm_mapper`.
"""

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from ..errors import WexpandError
from ..format.config import QUANT_METHOD, parse_config

__all__ = ["WexpandServeConfig"]


class WexpandServeConfig(QuantizationConfig):
    """The `quantization_config` of a wexpand checkpoint, as vLLM wants it."""

    def __init__(self, values: dict[str, Any]):
        super().__init__()
        self.checkpoint = parse_config(values)
        self.hf_names = {name: name for name in self.checkpoint.linears}
        """vLLM's name of each expanded linear -> its name in the checkpoint"""

    def get_name(self) -> str:
        """What `quant_method` in config.json says."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that a model may be served in: those that the kernels have."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere, the oldest GPU that `kernels/triton.py` runs on; CPUs are not asked."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WexpandServeConfig":
        """From config.json's `quantization_config`; WexpandError if it is damaged."""
        return cls(config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Rename the expanded linears as the model class renames its checkpoint's tensors."""
        self.hf_names = hf_to_vllm_mapper.apply_dict(self.hf_names)

    def members(self, prefix: str) -> list[str]:
        """The linears, by vLLM's names, that vLLM's layer `prefix` consists of."""
        parent, dot, last = prefix.rpartition(".")
        packed = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}{dot}{name}" for name in packed]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Ours for a linear with an expanded member, vLLM's own for other layers.

        :raises WexpandError: a layer that cannot be served expanded
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if not isinstance(layer, LinearBase):
            self.refuse_inside(layer, prefix)
            return None
        members = self.members(prefix)
        if not any(name in self.hf_names for name in members):
            return UnquantizedLinearMethod()

        from .linear import WexpandLinearMethod

        refuse_lora(prefix)
        # a member that is not expanded keeps the name that its expanded siblings suggest
        known = [name for name in members if name in self.hf_names]
        sibling, hf_sibling = known[0], self.hf_names[known[0]]
        parent, hf_parent = sibling.rpartition(".")[0], hf_sibling.rpartition(".")[0]
        hf_members = [
            self.hf_names.get(name, hf_parent + name.removeprefix(parent)) for name in members
        ]
        return WexpandLinearMethod(prefix, hf_members, self.checkpoint)

    def refuse_inside(self, layer: torch.nn.Module, prefix: str) -> None:
        """Raise if `layer`, which is no linear of vLLM's, stands for expanded linears."""
        inside = [
            hf_name
            for name, hf_name in self.hf_names.items()
            if prefix and (name == prefix or name.startswith(f"{prefix}."))
        ]
        if inside:
            raise WexpandError(
                f"{inside[0]}: vLLM runs it as {type(layer).__name__}, where expanded weights "
                "cannot be served (no embeddings, no output head, no experts of a mixture); "
                "compress the model with such linears under `ignore`"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.hf_names)} expanded linears)"


def refuse_lora(prefix: str) -> None:
    """Raise if this engine was started with LoRA."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is not None and config.lora_config is not None:
        raise WexpandError(
            f"{prefix}: LoRA adapters cannot be served on expanded linears; start without "
            "--enable-lora, or merge the adapter before compressing"
        )
