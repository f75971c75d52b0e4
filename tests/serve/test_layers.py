"""vLLM's linear layers filled with expanded linears: loading and the forward."""

import builders
import pytest
import torch
from builders import GATE_UP, QKV, Checkpoint, Linear, as_rank, random_pool, random_router, run
from expanded_layers import (
    ATTENTION,
    EXPERTS,
    MLP,
    WIDTH,
    assert_close,
    clustered,
    expected,
    gate_up,
    gate_up_layer,
    qkv,
    qkv_layer,
)
from vllm.model_executor.layers.linear import (
    QKVParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)

from wexpand_plugin.format.checks import check_pool
from wexpand_plugin.format.clusters import ClusterBias
from wexpand_plugin.format.router import ROUTER_DTYPES, StoredRouter
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    torch.manual_seed(0)
    as_rank(monkeypatch, 0, 1)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("order", range(3))
def test_qkv_with_biases_in_any_order(order, kernel, monkeypatch):
    monkeypatch.setenv("WEXPAND_KERNEL", kernel)
    checkpoint = qkv()
    layer = qkv_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, QKV, seed=order)
    x = torch.randn(9, WIDTH)
    assert_close(run(layer, x), expected(checkpoint, x))
    assert run(layer, x[:0]).shape == (0, 32)
    assert run(layer, x.view(3, 3, WIDTH)).shape == (3, 3, 32)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("experts", "clusters", "parents"), [(1, 1, 0), (1, 40, 7), (3, 8, 0), (3, 3, 0), (2, 40, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clusters_and_their_biases(experts, clusters, parents, dtype, kernel, monkeypatch):
    """q and v have biases of clusters, k has none; all have a bias of their own."""
    monkeypatch.setenv("WEXPAND_KERNEL", kernel)
    router = random_router(clusters, WIDTH, parents) if clusters > 1 else None
    checkpoint = clustered(qkv(router=router, experts=experts))
    layer = qkv_layer(checkpoint, disable_tp=True, params_dtype=dtype)
    checkpoint.fill(layer, QKV)
    assert (layer.router_weight is None) == (clusters == 1)
    for tokens in (60, 1, 0):
        x = torch.randn(tokens, WIDTH, dtype=dtype)
        y = run(layer, x)
        assert y.dtype == dtype and y.shape == (tokens, 32)
        if tokens:
            truth = expected(checkpoint, x)
            assert_close(y, truth, 2e-6 if dtype == torch.float32 else 3e-2)


def test_a_router_that_nothing_needs_is_not_held():
    """One expert, and no linear of the layer has cluster biases: others of the group do."""
    checkpoint = clustered(qkv(router=random_router(8, WIDTH), experts=1), without="_proj")
    layer = qkv_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, QKV)
    assert layer.router_weight is None and layer.cluster_bias is None
    x = torch.randn(9, WIDTH)
    assert_close(run(layer, x), expected(checkpoint, x))


def test_clusters_beside_a_linear_of_none_and_a_dense_one():
    """k has one bias for all tokens and no router, v was not expanded."""
    checkpoint = clustered(qkv(router=random_router(8, WIDTH), experts=2))
    q, k, v = checkpoint.linears
    k.pool, k.router, k.cluster_expert = random_pool(1, 8, WIDTH), None, None
    k.cluster_bias = ClusterBias.pack(torch.randn(1, 8))
    v.dense, v.pool = torch.randn(8, WIDTH), None
    checkpoint = Checkpoint([q, k, v])
    layer = qkv_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, QKV)
    x = torch.randn(30, WIDTH)
    assert_close(run(layer, x), expected(checkpoint, x))


def test_gate_up():
    checkpoint = gate_up()
    layer = gate_up_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, GATE_UP)
    x = torch.randn(9, WIDTH)
    assert_close(run(layer, x), expected(checkpoint, x))


def test_only_the_layout_stays_in_memory():
    """What is left is the pool of all three linears, the router once, and the bias."""
    checkpoint = qkv()
    layer = qkv_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, QKV)
    held = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    stored = sum(t.nbytes for name, t in checkpoint.tensors.items() if ".router" not in name)
    router = checkpoint.linears[0].router.nbytes
    pools = [linear.pool for linear in checkpoint.linears]
    each = 24 * sum(pool.versions for pool in pools)  # where a row begins, and whole words
    assert stored + router <= held <= stored + router + each + 512
    assert not hasattr(layer, "row_map") and not hasattr(layer.quant_method, "parameters")


def test_nothing_of_the_file_stays_in_memory(monkeypatch):
    """A tensor as it arrives is a view of a mapped file: one that is kept keeps the whole file."""
    monkeypatch.setenv("WEXPAND_KERNEL", "cpu")
    pool, router = random_pool(3, 7, WIDTH), random_router(3, WIDTH)
    checkpoint = Checkpoint([Linear("lm.gate", pool, router, torch.randn(7))])
    layer = ReplicatedLinear(WIDTH, 7, quant_config=checkpoint.quant_config(), prefix="lm.gate",
                             disable_tp=True)  # fmt: skip
    checkpoint.fill(layer, {})
    file = {t.untyped_storage().data_ptr() for t in checkpoint.tensors.values()}
    for tensor in [*layer.parameters(), *layer.buffers()]:
        assert tensor.untyped_storage().data_ptr() not in file


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("stored", ROUTER_DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_cast_to_the_served_dtype_and_the_router_is_not(
    dtype, stored, kernel, monkeypatch
):
    monkeypatch.setenv("WEXPAND_KERNEL", kernel)
    weight, bias, _ = random_router(EXPERTS, WIDTH)
    checkpoint = qkv(router=StoredRouter(weight.to(stored), bias))
    layer = qkv_layer(checkpoint, disable_tp=True, params_dtype=dtype)
    checkpoint.fill(layer, QKV)
    assert layer.bias.dtype == dtype
    assert layer.router_weight.dtype == stored and layer.router_bias.dtype == torch.float32
    x = torch.randn(9, WIDTH, dtype=dtype)
    y = run(layer, x)
    assert y.dtype == dtype
    assert_close(y, expected(checkpoint, x), 3e-2)


@pytest.mark.parametrize("values", ["int8", "int4", "int3"])
def test_integers_with_scales(values):
    checkpoint = qkv(values=values)
    layer = qkv_layer(checkpoint, disable_tp=True)
    assert layer.weight.dtype == checkpoint.linears[0].pool.codec.storage
    checkpoint.fill(layer, QKV)
    x = torch.randn(9, WIDTH)
    assert_close(run(layer, x), expected(checkpoint, x))


@pytest.mark.parametrize("values", ["int8", "int4", "int3"])
def test_full_rows_beside_rows_with_zeros(values):
    """Linears of one input group may differ in sparsity, and one may have no mask."""
    full = RowPool.pack(torch.randn(12, WIDTH), codec=codec(values, 8)).smallest()
    assert full.mask is None
    pools = {"gate_proj": random_pool(1, 12, WIDTH, values=values), "up_proj": full}
    checkpoint = Checkpoint([Linear(f"{MLP}.{name}", pool) for name, pool in pools.items()])
    layer = gate_up_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, GATE_UP)
    x = torch.randn(9, WIDTH)
    assert_close(run(layer, x), expected(checkpoint, x))


def test_replicated_linear_plain_sparse():
    linear = Linear("lm.gate", random_pool(1, 7, WIDTH), None, torch.randn(7))
    checkpoint = Checkpoint([linear])
    layer = ReplicatedLinear(WIDTH, 7, quant_config=checkpoint.quant_config(), prefix="lm.gate",
                             disable_tp=True)  # fmt: skip
    checkpoint.fill(layer, {})
    x = torch.randn(5, WIDTH)
    assert_close(run(layer, x), linear.forward(x))
    assert layer.router_weight is None


@pytest.mark.parametrize("dense", ["q_proj", "k_proj", "v_proj"])
def test_member_that_was_not_expanded(dense):
    """Dense next to expanded, and plain sparse next to both."""
    checkpoint = qkv()
    for linear in checkpoint.linears:
        if linear.name.endswith(dense):
            linear.dense, linear.pool, linear.router = (
                torch.randn(linear.pool.out_features, WIDTH), None, None,
            )  # fmt: skip
            linear.dense[0, 0] = 0
    other = next(linear for linear in checkpoint.linears if linear.pool is not None)
    other.pool, other.router = random_pool(1, other.pool.out_features, WIDTH), None
    checkpoint = Checkpoint(checkpoint.linears)
    layer = qkv_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, QKV)
    x = torch.randn(9, WIDTH)
    assert_close(run(layer, x), expected(checkpoint, x))


def test_layer_without_expanded_members_is_left_alone(monkeypatch):
    as_rank(monkeypatch, 0, 1)
    checkpoint = qkv()
    layer = gate_up_layer(checkpoint, disable_tp=True)
    assert type(layer.quant_method) is UnquantizedLinearMethod


def test_linear_that_is_fused_on_disk():
    """As in Phi-3: one tensor for q, k and v, and one for gate and up."""
    linear = Linear(f"{ATTENTION}.qkv_proj", random_pool(EXPERTS, 32, WIDTH),
                    random_router(EXPERTS, WIDTH), torch.randn(32))  # fmt: skip
    checkpoint = Checkpoint([linear])
    config = checkpoint.quant_config()
    config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    layer = QKVParallelLinear(WIDTH, 4, 4, 2, bias=True, quant_config=config,
                              prefix=linear.name, disable_tp=True)  # fmt: skip
    checkpoint.fill(layer, {})
    x = torch.randn(9, WIDTH)
    assert_close(run(layer, x), linear.forward(x))


def test_names_follow_vllms_renaming():
    from vllm.model_executor.models.utils import WeightsMapper

    checkpoint = qkv()
    config = checkpoint.quant_config()
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    config.apply_vllm_mapper(mapper)
    layer = QKVParallelLinear(WIDTH, 4, 4, 2, bias=True, quant_config=config, disable_tp=True,
                              prefix=f"language_model.{ATTENTION}.qkv_proj")  # fmt: skip
    checkpoint.fill(layer, QKV)
    x = torch.randn(9, WIDTH)
    assert_close(run(layer, x), expected(checkpoint, x))


def test_compiles_without_graph_breaks():
    checkpoint = qkv()
    layer = qkv_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, QKV)
    compiled = torch.compile(lambda x: run(layer, x) * 2, fullgraph=True, backend="aot_eager",
                             dynamic=True)  # fmt: skip
    for tokens in (2, 7):
        x = torch.randn(tokens, WIDTH)
        assert_close(compiled(x), expected(checkpoint, x) * 2)


@torch.library.custom_op("wexpand_test::double", mutates_args=("q", "k"))
def double(q: torch.Tensor, k: torch.Tensor) -> None:
    """In place on two views, as vLLM's rotary embedding."""
    q.mul_(2)
    k.mul_(2)


def test_compiled_bias_split_and_change_in_place():
    checkpoint = qkv()
    layer = qkv_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, QKV)

    def forward(x):
        q, k, v = run(layer, x).split([16, 8, 8], dim=-1)
        double(q, k)
        return q.view(-1, 4, 4) + 0, k.view(-1, 2, 4) + 0, v.view(-1, 2, 4) + 0

    x = torch.randn(50, WIDTH)
    options = {"enable_auto_functionalized_v2": False}  # as vLLM sets it
    q, k, v = torch.compile(forward, fullgraph=True, dynamic=True, options=options)(x)
    truth = expected(checkpoint, x)
    truth[:, :24] *= 2
    assert_close(torch.cat([t.flatten(1) for t in (q, k, v)], dim=1), truth)


def test_op_passes_torchs_own_checks():
    checkpoint = clustered(qkv(router=random_router(40, WIDTH, 7)))
    layer = qkv_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, QKV)
    layout = [getattr(layer, name) for name in layer.quant_method.layout]
    arguments = (torch.randn(4, WIDTH), layout, layer.router_weight, layer.router_bias, 7, None,
                 layer.cluster_expert, EXPERTS, layer.bias, layer.cluster_bias,
                 layer.cluster_bias_scale, 32, layer.quant_method.kernel.name)  # fmt: skip
    torch.library.opcheck(torch.ops.wexpand.routed_linear.default, arguments)
    logits = (arguments[0], layer.router_weight, layer.quant_method.kernel.name)
    torch.library.opcheck(torch.ops.wexpand.router_logits.default, logits)


def test_builders_share_and_prune_rows():
    """The random pools have what makes loading hard: shared rows, an empty row, odd widths."""
    pool = check_pool(builders.random_pool(EXPERTS, 16, WIDTH))
    assert pool.versions < pool.experts * pool.out_features
    assert not pool.mask[0].any()
