"""What vLLM asks first: which method serves a layer of the model.

The checkpoint's config lists the expanded linears by their Hugging Face names. vLLM fuses some of
them (q, k, v into qkv_proj) and renames others; the model class says how, through
`packed_modules_mapping` and `apply_vllm_mapper`.

Only the tensors of these linears are checked as they are loaded, and only their structure. With
WEXPAND_VERIFY=1 in the environment everything is checked once, before vLLM loads a weight: all that
`wexpand verify` finds in the directory's files, checksums of all tensors included.
"""

import os
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from .. import __version__
from ..errors import WexpandError, reason
from ..format.config import QUANT_METHOD, parse_config
from ..format.model_dir import ModelDir
from ..format.problems import problems

__all__ = ["QUANT_METHOD", "WexpandConfig"]

logger = init_logger("vllm.wexpand_plugin")
# vLLM's load formats that read *.safetensors of the model's directory, as they are
_FORMATS = {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"}
# model types whose loaders take every tensor of a fused qkv, known by its name, for a dense matrix
_REARRANGED = {"bloom", "gpt_neox"}


class WexpandConfig(QuantizationConfig):
    """The `quantization_config` of a wexpand checkpoint, as vLLM wants it."""

    def __init__(self, values: dict[str, Any]):
        super().__init__()
        self.checkpoint = parse_config(values)
        self.hf_names = {name: name for name in self.checkpoint.linears}
        """vLLM's name of each expanded linear -> its name in the checkpoint"""
        self.model_dir: ModelDir | None = None
        """what vLLM loads, where that is known"""
        self._graph_key = [__version__]
        self._source = ""
        self._revision: str | None = None
        self._begun = False

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
    def from_config(cls, config: dict[str, Any]) -> "WexpandConfig":
        """From config.json's `quantization_config`; WexpandError if it is damaged."""
        return cls(config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Rename the expanded linears as the model class renames its checkpoint's tensors."""
        self.hf_names = hf_to_vllm_mapper.apply_dict(self.hf_names)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Told by vLLM: the directory or the hub's name of the model that has this config."""
        self._source, self._revision = model_name, revision

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Ours for a layer with an expanded linear, vLLM's own for other layers.

        :raises WexpandError: a layer that cannot be served expanded; or, at the first call with
            WEXPAND_VERIFY=1, damaged files
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        engine = get_current_vllm_config_or_none()
        if engine is not None and engine.model_config is None:
            engine = None  # a layer on its own
        if engine is not None and not self._begun:
            self._begin(engine)
        if not isinstance(layer, LinearBase):
            self._refuse_inside(layer, prefix)
            return None
        names = self._linears_of(prefix)
        if not names:
            return UnquantizedLinearMethod()

        from .linear import WexpandLinearMethod

        if engine is not None:
            _refuse_engine(engine, layer, prefix, names)
        self._refuse_several_routers(prefix, names)
        return WexpandLinearMethod(prefix, names, self)

    def note_layout(self, kernel: str, layout: list[torch.Tensor]) -> None:
        """A layer's kernel and layout: a compiled graph holds them, and vLLM's hash of the engine's
        config, the name under which it keeps the graph, should know.
        """
        key = f"{kernel} {[str(part.dtype) for part in layout]}"
        if key not in self._graph_key:
            self._graph_key.append(key)

    def _linears_of(self, prefix: str) -> list[str]:
        """The linears, by their names in the checkpoint, that vLLM's layer `prefix` consists of;
        none if none of them is expanded.
        """
        parent, dot, last = prefix.rpartition(".")
        names = [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(last, [last])]
        expanded = next((name for name in names if name in self.hf_names), None)
        if expanded is None:
            return []
        # one that is not expanded is named as its expanded siblings are
        own, hf_own = expanded.rpartition(".")[0], self.hf_names[expanded].rpartition(".")[0]
        return [self.hf_names.get(name, hf_own + name.removeprefix(own)) for name in names]

    def _refuse_inside(self, layer: torch.nn.Module, prefix: str) -> None:
        """Raise if `layer`, which is no linear of vLLM's, stands for expanded linears."""
        for name, hf_name in self.hf_names.items():
            if prefix and (name == prefix or name.startswith(f"{prefix}.")):
                raise WexpandError(
                    f"{hf_name}: vLLM runs it as {type(layer).__name__}, where expanded weights "
                    "cannot be served (no embeddings, no output head, no experts of a mixture); "
                    "compress the model with such linears under `ignore`"
                )

    def _refuse_several_routers(self, prefix: str, names: list[str]) -> None:
        """Raise if linears that vLLM runs as one layer belong to several input groups."""
        linears = self.checkpoint.linears
        routed = [name for name in names if name in linears and linears[name].clusters > 1]
        for name in routed[1:]:
            if self.checkpoint.group_of(name) is not self.checkpoint.group_of(routed[0]):
                raise WexpandError(
                    f"{routed[0]} and {name} have different routers, but vLLM runs them as one "
                    f"layer, {prefix}, which has room for one"
                )

    def _begin(self, engine: Any) -> None:
        """At the first layer of a model: find its files, verify them if that is asked for."""
        self._begun = True
        verify = os.environ.get("WEXPAND_VERIFY") == "1" and _first_of_machine()
        try:
            self.model_dir = ModelDir(self._directory(engine, download=verify))
        except Exception as error:  # also of the hub, or a vLLM with another interface
            if verify:
                why = "wexpand: WEXPAND_VERIFY: the files were not checked: %s"
                logger.warning(why, reason(error))
        if verify and self.model_dir:
            with torch.device("cpu"):  # not the one that vLLM makes its layers on at this moment
                for problem in problems(self.model_dir):
                    raise problem
            logger.info("wexpand: WEXPAND_VERIFY: %s is sound", self.model_dir.path)
        if isinstance(engine.additional_config, dict):
            # hashed when all layers are there, see note_layout
            engine.additional_config[f"wexpand {self.checkpoint.digest}"] = self._graph_key

    def _directory(self, engine: Any, download: bool) -> Path:
        """Where vLLM reads the model.

        :param download: what is missing of a model of the hub, as vLLM will in a moment
        :raises Exception: of any kind, for a model that is not loaded from local files
        """
        load, model = engine.load_config, engine.model_config
        if load.load_format not in _FORMATS:
            raise WexpandError(f"load format {load.load_format} reads other files")
        if model.model_weights not in ("", model.model):
            raise WexpandError(f"{model.model_weights} is not local")
        if Path(self._source).is_dir():
            return Path(self._source)
        from huggingface_hub import snapshot_download

        directory = snapshot_download(
            self._source,
            revision=self._revision,
            cache_dir=load.download_dir,
            local_files_only=not download,
            allow_patterns=["*.json", "*.safetensors"],
        )
        return Path(directory)


def _first_of_machine() -> bool:
    from vllm.distributed.parallel_state import get_world_group

    return get_world_group().local_rank == 0


def _refuse_engine(engine: Any, layer: Any, prefix: str, names: list[str]) -> None:
    """Raise if an engine is one that expanded linears do not go with."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    kind = engine.model_config.hf_config.model_type
    if engine.lora_config is not None:
        problem = (
            "LoRA adapters cannot be served on expanded linears; start without --enable-lora, or "
            "merge the adapter before compressing"
        )
    elif engine.load_config.load_format == "ipc_cache":
        problem = (
            "--load-format ipc_cache maps weights that another process has prepared, which "
            "expanded linears cannot take over; start without it"
        )
    elif kind in _REARRANGED and isinstance(layer, QKVParallelLinear) and len(names) == 1:
        problem = (
            f"this vLLM rearranges the rows of it while it loads a {kind} model, which packed rows "
            "do not survive; compress the model with it under `ignore`"
        )
    else:
        return
    raise WexpandError(f"{prefix}: {problem}")
