"""Small random expanded linears, and vLLM's layers filled with them as its loader would."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear

from wexpand_plugin.format.clusters import ClusterBias
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


def random_router(clusters: int, width: int, parents: int = 0) -> StoredRouter:
    rows = parents + clusters
    router = StoredRouter(torch.randn(rows, width), torch.randn(rows) / 4)
    weight, bias, *_ = rounded(router, torch.zeros(width))
    return StoredRouter(weight, bias, parents)


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
    cluster_bias: ClusterBias | None = None
    cluster_expert: Tensor | None = None

    def __post_init__(self):
        experts = 1 if self.pool is None else self.pool.experts
        clusters = 1 if self.router is None else self.router.clusters
        if 1 < experts < clusters and self.cluster_expert is None:
            self.cluster_expert = torch.arange(clusters).remainder(experts).byte()

    @property
    def stored(self) -> StoredLinear:
        assert self.pool is not None
        return StoredLinear(
            self.pool, self.router, self.bias, self.cluster_bias, self.cluster_expert
        )

    def tensors(self) -> dict[str, Tensor]:
        """Kind -> tensor, as the checkpoint holds them."""
        if self.pool is not None:
            return self.stored.tensors()
        return {"weight": self.dense} | ({} if self.bias is None else {"bias": self.bias})

    def forward(self, x: Tensor) -> Tensor:
        """The dense maths in float64, token by token."""
        y = torch.stack([self._token(row) for row in x])
        return y if self.bias is None else y + self.bias.double()

    def _token(self, row: Tensor) -> Tensor:
        if self.pool is None:
            return self.dense.double() @ row.double()
        cluster = 0
        if self.router is not None:
            weight, bias, parents = self.router
            logits = weight.float() @ row.float() + bias
            first, end, clusters = 0, len(logits) - parents, len(logits) - parents
            if parents:
                parent = int(logits[:parents].argmax())
                first, end = (place * clusters // parents for place in (parent, parent + 1))
            cluster = first + int(logits[parents + first : parents + end].argmax())
        expert = cluster if self.cluster_expert is None else int(self.cluster_expert[cluster])
        y = self.pool.expert(expert if self.pool.experts > 1 else 0).double() @ row.double()
        if self.cluster_bias is not None:
            biases = self.cluster_bias.decoded(torch.float64)
            y += biases[cluster if len(biases) > 1 else 0]
        return y


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
            entry = linear.stored.entry(torch.float32)
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
