"""Small random expanded linears, and vLLM's layers filled with them as its loader would."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from wexpand_plugin.format.checkpoint import LinearEntry, WexpandConfig, checksum

from wexpand_plugin.format.router import Router
from wexpand_plugin.format.rowpool import RowPool, pack_rows
from wexpand_plugin.method.clusters import rounded
from wexpand_plugin.serve.config import WexpandServeConfig

QKV = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
GATE_UP = {"gate_proj": 0, "up_proj": 1}
PACKED = {"qkv_proj": list(QKV), "gate_up_proj": list(GATE_UP)}


def random_router(experts: int, width: int) -> Router:
    router = Router(torch.randn(experts, width), torch.randn(experts) / 4)
    return rounded(router, torch.zeros(width))


def random_pool(experts: int, out: int, width: int, dtype=torch.float32) -> RowPool:
    """Random masks at about 70% sparsity, rows shared between some experts, one row empty."""
    versions = out + (out // 2 if experts > 1 else 0)
    rows = torch.randn(versions, width, dtype=dtype) / width**0.5
    rows[torch.rand(versions, width) < 0.7] = 0
    rows[0] = 0
    row_map = torch.cat(
        [torch.arange(out)[None], torch.randint(versions, (experts - 1, out))], dim=0
    )
    row_map[-1, torch.randperm(out)[: versions - out]] = torch.arange(out, versions)
    return pack_rows(rows, row_map)


@dataclass
class Linear:
    """One linear of a checkpoint: expanded (a pool) or not (a dense weight)."""

    name: str
    pool: RowPool | None = None
    router: Router | None = None
    bias: Tensor | None = None
    dense: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Kind -> tensor, as the checkpoint holds them."""
        if self.pool is None:
            found = {"weight": self.dense}
        else:
            found = {
                "weight": self.pool.values,
                "weight_mask": self.pool.mask,
                "row_map": self.pool.row_map,
            }
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
        self.config = WexpandConfig(
            linears={
                linear.name: LinearEntry.of(linear.pool, linear.bias is not None)
                for linear in self.linears
                if linear.pool is not None
            },
            checksums={name: checksum(tensor) for name, tensor in self.tensors.items()},
        ).seal()

    def quant_config(self) -> WexpandServeConfig:
        config = WexpandServeConfig.from_config(self.config.model_dump())
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


def run(layer, x: Tensor) -> Tensor:
    """What the layer's forward does before any communication."""
    return layer.quant_method.apply(layer, x, layer.bias)


def as_rank(monkeypatch, rank: int, size: int) -> None:
    """Let the layers made from now on believe that they are rank `rank` of `size`."""
    for module in (vllm_linear, vllm_parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
