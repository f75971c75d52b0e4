"""vLLM's fused layers of a small block, and the checkpoints that fill them."""

import torch
from builders import GATE_UP, QKV, Checkpoint, Linear, random_pool, random_router
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

from wexpand_plugin.format.clusters import ClusterBias

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
WIDTH, EXPERTS = 20, 3  # 20 does not divide by 8


def qkv(
    bias=True, sizes=(16, 8, 8), router=None, dtype=torch.float32, values=None, experts=EXPERTS
) -> Checkpoint:
    if router is None and experts > 1:
        router = random_router(experts, WIDTH)
    return Checkpoint(
        [
            Linear(
                f"{ATTENTION}.{name}",
                random_pool(experts, size, WIDTH, dtype, values),
                router,
                torch.randn(size, dtype=dtype) if bias else None,
            )
            for name, size in zip(QKV, sizes, strict=True)
        ]
    )


def qkv_layer(checkpoint, heads=4, kv_heads=2, bias=True, **settings):
    return QKVParallelLinear(
        WIDTH, 4, heads, kv_heads, bias=bias, quant_config=checkpoint.quant_config(),
        prefix=f"{ATTENTION}.qkv_proj", **settings,
    )  # fmt: skip


def gate_up_layer(checkpoint, size=12, **settings):
    return MergedColumnParallelLinear(
        WIDTH, [size, size], bias=False, quant_config=checkpoint.quant_config(),
        prefix=f"{MLP}.gate_up_proj", **settings,
    )  # fmt: skip


def clustered(checkpoint: Checkpoint, without: str = "k_proj") -> Checkpoint:
    """With a bias for each cluster of each linear but `without`."""
    for linear in checkpoint.linears:
        if not linear.name.endswith(without):
            biases = torch.randn(linear.stored.clusters, linear.pool.out_features)
            linear.cluster_bias = ClusterBias.pack(biases)
    return Checkpoint(checkpoint.linears)


def gate_up(**changes) -> Checkpoint:
    router = random_router(EXPERTS, WIDTH)
    linears = {name: Linear(f"{MLP}.{name}", random_pool(EXPERTS, 12, WIDTH), router)
               for name in GATE_UP}  # fmt: skip
    for name, linear in changes.items():
        linears[name] = linear
    return Checkpoint(list(linears.values()))


def expected(checkpoint: Checkpoint, x):
    return torch.cat([linear.forward(x) for linear in checkpoint.linears], dim=1)


def assert_close(y, truth, tolerance=2e-6):
    assert y.shape == truth.shape
    assert (y.double() - truth).abs().max() < tolerance
