"""Tensor parallel: every rank's layer is made in this process, and gives its share."""

import pytest
import torch
from builders import QKV, Checkpoint, Linear, as_rank, random_pool, random_router, run
from expanded_layers import EXPERTS, MLP, WIDTH, assert_close, clustered, qkv, qkv_layer
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "ranks, heads, kv_heads", [(2, 4, 2), (2, 4, 1), (4, 4, 2)], ids=["split", "one", "replicated"]
)
@pytest.mark.parametrize("clusters", [0, 40])
def test_qkv_of_every_rank(monkeypatch, ranks, heads, kv_heads, clusters):
    sizes = (4 * heads, 4 * kv_heads, 4 * kv_heads)
    checkpoint = qkv(sizes=sizes)
    if clusters:
        checkpoint = clustered(qkv(sizes=sizes, router=random_router(clusters, WIDTH, 7)))
    x = torch.randn(9, WIDTH)
    q, k, v = (linear.forward(x) for linear in checkpoint.linears)
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        layer = qkv_layer(checkpoint, heads, kv_heads)
        checkpoint.fill(layer, QKV, seed=rank)
        share = heads // ranks * 4
        kv_share = max(kv_heads // ranks, 1) * 4
        first = rank * kv_heads // ranks * 4
        mine = [q[:, rank * share :][:, :share]]
        mine += [t[:, first : first + kv_share] for t in (k, v)]
        assert_close(run(layer, x), torch.cat(mine, dim=1))


def test_fused_on_disk_of_every_rank(monkeypatch):
    linear = Linear(f"{MLP}.gate_up_proj", random_pool(EXPERTS, 24, WIDTH),
                    random_router(EXPERTS, WIDTH))  # fmt: skip
    checkpoint = Checkpoint([linear])
    config = checkpoint.quant_config()
    config.packed_modules_mapping = {"gate_up_proj": ["gate_up_proj"]}
    x = torch.randn(9, WIDTH)
    gate, up = linear.forward(x).chunk(2, dim=1)
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        layer = MergedColumnParallelLinear(WIDTH, [12, 12], bias=False, quant_config=config,
                                           prefix=linear.name)  # fmt: skip
        checkpoint.fill(layer, {})
        mine = [t[:, 6 * rank : 6 * rank + 6] for t in (gate, up)]
        assert_close(run(layer, x), torch.cat(mine, dim=1))


@pytest.mark.parametrize("values", [None, "int4"])
@pytest.mark.parametrize(
    ("experts", "clusters", "parents"), [(1, 0, 0), (4, 0, 0), (1, 1, 0), (1, 40, 7), (4, 8, 0)]
)
def test_row_parallel_of_both_ranks(monkeypatch, experts, clusters, parents, values):
    """Columns 0-9 and 10-19: a byte of the mask is cut in two. Routers need every column."""
    routed = max(experts, clusters)
    linear = Linear(f"{MLP}.down_proj", random_pool(experts, 9, WIDTH, values=values),
                    random_router(routed, WIDTH, parents) if routed > 1 else None,
                    torch.randn(9))  # fmt: skip
    checkpoint = Checkpoint([linear])
    if clusters:
        checkpoint = clustered(checkpoint)
    layers = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        layers.append(RowParallelLinear(WIDTH, 9, quant_config=checkpoint.quant_config(),
                                        prefix=linear.name))  # fmt: skip
        checkpoint.fill(layers[-1], {}, seed=rank)
    x = torch.randn(50, WIDTH)
    halves = x[:, :10], x[:, 10:]

    # the all-reduce of the logits, in two passes: what each rank gives, then the sum to each
    given = []
    monkeypatch.setattr(
        "vllm.distributed.tensor_model_parallel_all_reduce", lambda t: given.append(t) or t
    )
    for layer, half in zip(layers, halves, strict=True):
        run(layer, half)
    assert len(given) == (2 if routed > 1 else 0)
    assert all(logits.dtype == torch.float32 for logits in given)
    total = sum(given)
    monkeypatch.setattr("vllm.distributed.tensor_model_parallel_all_reduce", lambda t: total)
    y = run(layers[0], halves[0]) + layers[1].quant_method.apply(layers[1], halves[1], None)
    assert_close(y, linear.forward(x))
