"""One expanded layer in vLLM: from the checkpoint's tensors to a kernel's layout to a forward.

Each tensor kind of the checkpoint gets an empty parameter whose loader collects what arrives
(`parts.py`). After loading, the row pools of a fused layer's linears are checked, cut to this
rank's share (`shards.py`), joined into one pool, given the kernel's layout, and dropped: what
stays in memory is the layout, the router (as stored) and the bias. No dense weight is ever made.

Loading weights into a running engine again (sleep level 2, weight updates in training) is not
supported.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase

from .. import kernels
from ..errors import WexpandError
from ..format.config import KINDS
from ..format.config import CheckpointConfig as WexpandConfig
from ..format.router import Router
from ..format.rowpool import RowPool
from . import logger, ops
from . import tensor_parallel as shards
from .params import Member, Parts

__all__ = ["WexpandLinearMethod"]

_KINDS = tuple(kind for kind in KINDS if kind != "bias")
_said: set[str] = set()


class WexpandLinearMethod(LinearMethodBase):
    """How vLLM creates, loads and runs a layer with at least one expanded linear.

    :param prefix: vLLM's name of the layer
    :param names: the linears it consists of, by their names in the checkpoint
    :param config: the checkpoint's config
    """

    def __init__(self, prefix: str, names: list[str], config: WexpandConfig):
        self.prefix, self.names, self.config = prefix, names, config

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
        parts = Parts(self.prefix, self.names, len(output_partition_sizes), self.config)
        for kind in _KINDS:
            # a name for vLLM's loader to find; what is loaded keeps its own shape and dtype
            parameter = Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            setattr(parameter, "weight_loader", parts.loader(kind))  # noqa: B010
            layer.register_parameter(kind, parameter)
        # Models that reorder a fused matrix while loading look for its output dimension. Reordered
        # or not, what does not match the checksum is refused, so it can never be used wrongly.
        layer.row_map.output_dim = 1
        # vLLM's layers make their bias after this call, with the loader found here
        layer.weight_loader = parts.loader("bias")
        layer.wexpand_parts = parts
        entries = [self.config.linears[n] for n in self.names if n in self.config.linears]
        shape = kernels.LayerShape(
            input_size_per_partition,
            sum(output_partition_sizes),
            max(entry.experts for entry in entries),
            1 - sum(e.nnz for e in entries) / sum(e.versions * e.in_features for e in entries),
        )
        kernel, sentence = kernels.choose(layer.weight.device, params_dtype, shape)
        layer.wexpand_kernel = kernel.name
        layer.wexpand_dtype = params_dtype
        layer.wexpand_out = sum(output_partition_sizes)
        _key_compile_cache(f"{kernel.name} {self.config.digest}")
        if sentence not in _said:
            _said.add(sentence)
            logger.info("wexpand: %s", sentence)

    def process_weights_after_loading(self, layer: Any) -> None:
        device = layer.weight.device
        parts = layer.wexpand_parts
        for kind in _KINDS:
            delattr(layer, kind)
        del layer.wexpand_parts, layer.weight_loader
        columns = shards.columns_of(layer)
        pool, router = self._assemble(layer, parts.members(), columns)
        pool = pool.to(device=device, dtype=layer.wexpand_dtype)
        names = []
        for number, tensor in enumerate(kernels.get(layer.wexpand_kernel).prepare(pool)):
            names.append(f"layout_{number}")
            layer.register_buffer(names[-1], tensor, persistent=False)
        layer.wexpand_layout = tuple(names)
        layer.wexpand_reduces = router is not None and columns is not None
        if router is None:
            layer.router_weight = layer.router_bias = None
        else:
            weight = router.weight if columns is None else router.weight[:, slice(*columns)]
            for kind, tensor in (("router_weight", weight), ("router_bias", router.bias)):
                # copies: one view of a file that is mapped keeps all of it in memory
                own = tensor.to(device, copy=True, memory_format=torch.contiguous_format)
                layer.register_buffer(kind, own, persistent=False)

    def _assemble(
        self, layer: Any, members: list[Member], columns: tuple[int, int] | None
    ) -> tuple[RowPool, Router | None]:
        """This rank's row pool and the router; fills the layer's bias."""
        router_of: Member | None = None
        pools, biases, matrices = [], [], shards.shards_of(layer)
        for member in members:
            mine = [matrices[i] for i in member.covers]
            size = (sum(shard.size for shard in mine), layer.input_size)
            found = (member.pool.out_features, member.pool.in_features)
            if size != found:
                raise WexpandError(
                    f"{member.name}: {list(found)} (out, in) by the checkpoint, but vLLM's "
                    f"{self.prefix} wants {list(size)}"
                )
            if member.router is not None:
                router_of = router_of or member
                assert router_of.router is not None
                for first, own in zip(router_of.router, member.router, strict=True):
                    if not torch.equal(first, own):
                        raise WexpandError(
                            f"{router_of.name} and {member.name} have different routers, but vLLM "
                            f"runs them as one layer, {self.prefix}, which has room for one"
                        )
            rows = shards.rows_of(mine)
            pools.append(member.pool.take(rows, columns))
            bias = member.bias
            if bias is None:
                bias = torch.zeros(member.pool.out_features, dtype=layer.wexpand_dtype)
            biases.append((bias if rows is None else bias[rows]).to(layer.wexpand_dtype))
        if layer.bias is not None:
            # older vLLMs make it with requires_grad, and our op has no gradient
            layer.bias.requires_grad_(False).copy_(torch.cat(biases))
        elif any(member.bias is not None for member in members):
            raise WexpandError(f"{self.prefix}: the checkpoint has a bias, vLLM's layer has none")
        pool = pools[0] if len(pools) == 1 else RowPool.concat(pools)
        return pool, router_of and router_of.router

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        experts = None
        if layer.wexpand_reduces:
            from vllm.distributed import tensor_model_parallel_all_reduce

            logits = ops.router_logits(rows, layer.router_weight, layer.wexpand_kernel)
            logits = tensor_model_parallel_all_reduce(logits)
            experts = (logits + layer.router_bias).argmax(dim=1)
        y = ops.routed_linear(
            rows,
            [getattr(layer, name) for name in layer.wexpand_layout],
            layer.router_weight,
            layer.router_bias,
            experts,
            bias,
            layer.wexpand_out,
            layer.wexpand_kernel,
        )
        return y.view(*x.shape[:-1], layer.wexpand_out)

    def dequantize_weight(self, layer: Any) -> Tensor:
        raise WexpandError(
            f"{self.prefix}: expanded weights cannot be quantized when they are loaded; start "
            "without --quantization"
        )


def _key_compile_cache(key: str) -> None:
    """Make `key` part of the name under which vLLM keeps this model's compiled graph.

    The graph holds the kernel's name and its layout, which vLLM's own hash does not know.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is not None and isinstance(config.additional_config, dict):
        config.additional_config["wexpand"] = key
