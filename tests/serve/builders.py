"""Small random expanded linears, and vLLM's layers filled with them as its loader would."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear

from wexpand_plugin.format.config import CheckpointConfig, GroupEntry, LinearEntry
from wexpand_plugin.format.linear import StoredLinear
from wexpand_plugin.format.router import StoredRouter
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec
from wexpand_plugin.method.clusters import rounded
from wexpand_plugin.serve.config import WexpandConfig

QKV = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
GATE_UP = {"gate_proj": 0, "up_proj": 1}
PACKED = {"qkv_proj": list(QKV), "gate_up_proj": list(GATE_UP)}


def random_router(experts: int, width: int) -> StoredRouter:
    router = StoredRouter(torch.randn(experts, width), torch.randn(experts) / 4)
    return StoredRouter(*rounded(router, torch.zeros(width)))


def random_pool(
    experts: int, out: int, width: int, dtype=torch.float32, values: str | None = None
) -> RowPool:
    """Random masks at about 70% sparsity, rows shared between some experts, one row empty."""
    row_map = torch.zeros(experts, out, dtype=torch.uint8)
    if experts > 1:
        # every second neuron has two versions, and some expert uses the second
        row_map[:, ::2] = torch.randint(2, (experts, len(row_map[0, ::2])), dtype=torch.uint8)
        row_map[-1, ::2] = 1
    versions = int((row_map.amax(dim=0).long() + 1).sum())
    rows = torch.randn(versions, width, dtype=dtype) / width**0.5
    rows[torch.rand(versions, width) < 0.7] = 0
    rows[0] = 0
    return RowPool.pack(rows, row_map, codec=codec(values, 8) if values else None)


@dataclass
class Linear:
    """One linear of a checkpoint: expanded (a pool) or not (a dense weight)."""

    name: str
    pool: RowPool | None = None
    router: StoredRouter | None = None
    bias: Tensor | None = None
    dense: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Kind -> tensor, as the checkpoint holds them."""
        if self.pool is None:
            found = {"weight": self.dense}
        else:
            parts = {
                "weight": self.pool.values,
                "weight_mask": self.pool.mask,
                "weight_scale": self.pool.scale,
                "row_map": self.pool.row_map,
            }
            found = {kind: part for kind, part in parts.items() if part is not None}
        if self.router is not None:
            found |= {"router_weight": self.router.weight, "router_bias": self.router.bias}
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    def forward(self, x: Tensor) -> Tensor:
        """The dense maths in float64, token by token."""
        if self.pool is None:
            y = x.double() @ self.dense.double().t()
        else:
            experts = torch.zeros(len(x), dtype=torch.long)
            if self.router is not None:
                logits = x.float() @ self.router.weight.float().t() + self.router.bias
                experts = logits.argmax(dim=1)
            dense = [self.pool.expert(e).double() for e in range(self.pool.experts)]
            y = torch.stack([dense[e] @ row.double() for e, row in zip(experts, x, strict=True)])
        return y if self.bias is None else y + self.bias.double()


@dataclass
class Checkpoint:
    """The config and the tensors of some linears; tests may damage `tensors` before loading."""

    linears: list[Linear]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        for linear in self.linears:
            self.tensors |= {f"{linear.name}.{k}": v for k, v in linear.tensors().items()}
        self.config = CheckpointConfig(groups=groups_of(self.linears)).seal()

    def quant_config(self) -> WexpandConfig:
        config = WexpandConfig.from_config(self.config.model_dump(mode="json"))
        config.packed_modules_mapping = PACKED
        return config

    def fill(self, layer, shard_ids: dict[str, object], seed: int = 0) -> None:
        """Hand the tensors to `layer`, in scrambled order, and finish it."""
        arrivals = sorted(self.tensors.items())
        random.Random(seed).shuffle(arrivals)
        for name, tensor in arrivals:
            module, kind = name.rsplit(".", 1)
            last = module.rsplit(".", 1)[-1]
            parameter = getattr(layer, kind)
            if last in shard_ids:
                parameter.weight_loader(parameter, tensor, shard_ids[last])
            else:
                parameter.weight_loader(parameter, tensor)
        layer.quant_method.process_weights_after_loading(layer)


def groups_of(linears: list[Linear]) -> list[GroupEntry]:
    """Linears with the same router are one input group."""
    groups: dict[object, dict[str, LinearEntry]] = {}
    for linear in linears:
        if linear.pool is not None:
            entry = StoredLinear(linear.pool, linear.router, linear.bias).entry(torch.float32)
            key = linear.name if linear.router is None else id(linear.router)
            groups.setdefault(key, {})[linear.name] = entry
    return [GroupEntry.of(group) for group in groups.values()]


def run(layer, x: Tensor) -> Tensor:
    """What the layer's forward does before any communication."""
    return layer.quant_method.apply(layer, x, layer.bias)


def as_rank(monkeypatch, rank: int, size: int) -> None:
    """Let the layers made from now on believe that they are rank `rank` of `size`."""
    for module in (vllm_linear, vllm_parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
