"""One expanded layer in vLLM: from the checkpoint's tensors to a kernel's layout to a forward.

Each tensor kind of the checkpoint gets an empty parameter that keeps what arrives (`params.py`).
After loading, the row pools of a fused layer's linears are checked, joined into one pool, cut to
this rank's share (`tensor_parallel.py`), given the kernel's layout, and dropped: what stays in
memory is the layout, the router and cluster biases (as stored) and the bias. No dense weight is
ever made.

Loading weights into a running engine again (sleep level 2, weight updates in training) is not
supported.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase

from .. import kernels
from ..errors import WexpandError
from ..format.config import KINDS
from ..format.linear import StoredLinear
from ..format.router import choice
from ..format.rowpool import RowPool
from . import ops
from .params import LoadedLinear, RowPoolParameter, loaded_linears
from .tensor_parallel import cluster_biases_of, columns_of, neurons_of, refuse_own_layout

if TYPE_CHECKING:
    from .config import WexpandConfig

__all__ = ["WexpandLinearMethod"]

logger = init_logger("vllm.wexpand_plugin")
# what a layer keeps beside its layout and its bias
ROUTING = ("router_weight", "router_bias", "cluster_expert", "cluster_bias", "cluster_bias_scale")


class WexpandLinearMethod(LinearMethodBase):
    """How vLLM creates, loads and runs one layer with at least one expanded linear.

    :param prefix: vLLM's name of the layer
    :param names: the linears it consists of, by their names in the checkpoint
    """

    def __init__(self, prefix: str, names: list[str], quant_config: "WexpandConfig"):
        self.prefix, self.names, self.quant_config = prefix, names, quant_config

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        if layer.quant_method is not self:
            raise WexpandError(
                f"{self.prefix}: expanded weights cannot be quantized when they are loaded; leave "
                "this layer out of --quantization-config (`targets`, or `ignore`)"
            )
        refuse_own_layout(layer)
        linears = self.quant_config.checkpoint.linears
        entries = [linears[name] for name in self.names if name in linears]
        # vLLM warns of a parameter that has another dtype than what is loaded into it
        dtypes = {kind: known[0] for e in entries for kind, (_, known) in e.shapes().items()}
        self.parameters = {
            kind: RowPoolParameter(
                data=torch.empty(0, dtype=dtypes.get(kind, params_dtype)),
                label=f"{self.prefix}.{kind}",
            )
            for kind in KINDS
        }
        for kind in KINDS:
            if kind != "bias":
                layer.register_parameter(kind, self.parameters[kind])
        # vLLM's layers make their bias after this call, with the loader found here
        layer.weight_loader = self.parameters["bias"].load
        self.shards, self.out_features = len(output_partition_sizes), sum(output_partition_sizes)
        self.dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        device = layer.weight.device
        for kind in KINDS:
            if kind != "bias":
                delattr(layer, kind)
        del layer.weight_loader
        config, model_dir = self.quant_config.checkpoint, self.quant_config.model_dir
        with model_dir.locating_errors() if model_dir else nullcontext():
            linears = loaded_linears(self.prefix, self.names, self.shards, self.parameters, config)
        del self.parameters
        neurons, columns = neurons_of(layer, linears, self.out_features), columns_of(layer)
        self._set_bias(layer, linears, neurons)
        stored = [linear.stored for linear in linears]
        pool = RowPool.concat([one.pool for one in stored]).take(neurons, columns)
        pool = pool.to(device, self.dtype)
        self.kernel, sentence = kernels.choose(device, self.dtype, kernels.LayerShape.of(pool))
        logger.info_once("wexpand: %s", sentence)
        layout = self.kernel.prepare(pool, self.dtype)
        self.quant_config.note_layout(self.kernel.name, layout)
        self.layout = [f"layout_{number}" for number in range(len(layout))]
        for name, tensor in zip(self.layout, layout, strict=True):
            layer.register_buffer(name, tensor, persistent=False)
        self.experts = pool.experts
        parts = self._routing(stored, columns) | cluster_biases_of(layer, stored, neurons)
        for name in ROUTING:
            part = parts.get(name)
            if part is not None:
                # a copy: one view of a file that is mapped keeps all of it in memory
                part = part.to(device, copy=True, memory_format=torch.contiguous_format)
            layer.register_buffer(name, part, persistent=False)

    def _routing(
        self, linears: list[StoredLinear], columns: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        """The parts, by kind, that say which cluster and expert a token has; none for one."""
        # linears that vLLM runs as one layer have one router, or none
        routed = next((linear for linear in linears if linear.router is not None), None)
        if self.experts == 1 and not any(linear.cluster_bias for linear in linears):
            routed = None  # it would have nothing to choose
        self.parents, self.reduces = 0, False
        if routed is None or routed.router is None:
            return {}
        weight, bias, self.parents = routed.router
        self.reduces = columns is not None
        if columns is not None:
            weight = weight[:, slice(*columns)]
        found = {"router_weight": weight, "router_bias": bias}
        if routed.cluster_expert is not None:
            found["cluster_expert"] = routed.cluster_expert
        return found

    def _set_bias(self, layer: Any, linears: list[LoadedLinear], neurons: Tensor | None) -> None:
        """Fill the layer's bias, where it has one, with this rank's share of the linears'."""
        if layer.bias is not None:
            biases = [
                layer.bias.new_zeros(linear.stored.pool.out_features)
                if linear.stored.bias is None
                else linear.stored.bias.to(layer.bias)
                for linear in linears
            ]
            bias = torch.cat(biases) if neurons is None else torch.cat(biases)[neurons]
            # older vLLMs make it with requires_grad, and our op has no gradient
            layer.bias.requires_grad_(False).copy_(bias)
        elif any(linear.stored.bias is not None for linear in linears):
            raise WexpandError(f"{self.prefix}: the checkpoint has a bias, vLLM's layer has none")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        clusters = None
        if self.reduces:
            from vllm.distributed import tensor_model_parallel_all_reduce

            logits = ops.router_logits(rows, layer.router_weight, self.kernel.name)
            logits = tensor_model_parallel_all_reduce(logits)
            clusters = choice(logits + layer.router_bias, self.parents)
        y = ops.routed_linear(
            rows,
            [getattr(layer, name) for name in self.layout],
            layer.router_weight,
            layer.router_bias,
            self.parents,
            clusters,
            layer.cluster_expert,
            self.experts,
            bias,
            layer.cluster_bias,
            layer.cluster_bias_scale,
            self.out_features,
            self.kernel.name,
        )
        return y.view(*x.shape[:-1], self.out_features)
