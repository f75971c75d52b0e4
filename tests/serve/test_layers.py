"""vLLM's linear layers filled with expanded linears: loading, the forward, tensor parallel."""

import functools
from types import SimpleNamespace

import builders
import pytest
import torch
from builders import GATE_UP, QKV, Checkpoint, Linear, as_rank, random_pool, random_router, run
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.checks import check_pool
from wexpand_plugin.format.clusters import ClusterBias
from wexpand_plugin.format.router import ROUTER_DTYPES, StoredRouter
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec
from wexpand_plugin.serve import config

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
WIDTH, EXPERTS = 20, 3  # 20 does not divide by 8


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    torch.manual_seed(0)
    as_rank(monkeypatch, 0, 1)


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


def engine(monkeypatch, model_type="llama", lora_config=None, load_format="auto") -> None:
    """Let layers made from now on find themselves in an engine with these settings."""
    hf_config = SimpleNamespace(model_type=model_type)
    found = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config), lora_config=lora_config,
        load_config=SimpleNamespace(load_format=load_format), additional_config={},
    )  # fmt: skip
    monkeypatch.setattr(config, "get_current_vllm_config_or_none", lambda: found)


def assert_close(y, truth, tolerance=2e-6):
    assert y.shape == truth.shape
    assert (y.double() - truth).abs().max() < tolerance


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


# tensor parallel: every rank's layer is made in this process


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


# what is refused


def change(checkpoint: Checkpoint, tensor: str, new) -> None:
    """Replace a tensor by new(tensor); None removes it."""
    value = checkpoint.tensors.pop(tensor).clone()
    if new is not None:
        checkpoint.tensors[tensor] = new(value)


CHANGES = {
    "cut": lambda value: value[:-1],
    "typed": lambda value: value.to(torch.int16),
    "missing": None,
}
KINDS = (
    "weight", "weight_mask", "row_map", "router_weight", "router_bias", "bias", "cluster_expert",
    "cluster_bias", "cluster_bias_scale",
)  # fmt: skip


@pytest.mark.parametrize("linear", ["q_proj", "v_proj"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", CHANGES)
def test_damaged_tensor_is_refused_by_name(linear, kind, new):
    checkpoint = clustered(qkv(router=random_router(5, WIDTH)))
    name = f"{ATTENTION}.{linear}.{kind}"
    change(checkpoint, name, CHANGES[new])
    layer = qkv_layer(checkpoint, disable_tp=True)
    with pytest.raises(WexpandError) as refused:
        checkpoint.fill(layer, QKV)
    assert refused.value.tensor == name and str(refused.value).startswith(name)


@pytest.mark.parametrize("new", [*CHANGES, "not finite"])
def test_damaged_dense_linear_beside_expanded_ones_is_refused(new):
    checkpoint = gate_up(up_proj=Linear(f"{MLP}.up_proj", dense=torch.randn(12, WIDTH)))
    name = f"{MLP}.up_proj.weight"
    change(checkpoint, name, CHANGES.get(new, lambda value: value / 0))
    layer = gate_up_layer(checkpoint, disable_tp=True)
    with pytest.raises(WexpandError, match="up_proj"):
        checkpoint.fill(layer, GATE_UP)


@pytest.mark.parametrize("added", [0, 1])
def test_a_bias_that_the_checkpoint_does_not_have(added):
    """Zeros are what some models let vLLM add; others are the weights of something else."""
    checkpoint = qkv(bias=False)
    layer = qkv_layer(checkpoint, disable_tp=True)
    name = f"{ATTENTION}.k_proj.bias"
    checkpoint.tensors[name] = torch.full((8,), float(added))
    if added:
        with pytest.raises(WexpandError, match=f"{name}: config.json promises no such tensor"):
            checkpoint.fill(layer, QKV)
    else:
        checkpoint.fill(layer, QKV)
        assert not layer.bias.any()


def test_a_model_that_rearranges_rows_is_refused():
    """Its loader looks for a parameter's output dimension, or, worse, for a name."""
    layer = gate_up_layer(gate_up(), disable_tp=True)
    with pytest.raises(WexpandError, match="gate_up_proj.weight: this vLLM rearranges"):
        getattr(layer.weight, "output_dim", None)


@pytest.mark.parametrize("kind", ["bloom", "gpt_neox", "falcon"])
def test_a_model_that_rearranges_rows_by_name_is_refused(kind, monkeypatch):
    name = "transformer.h.0.self_attention.query_key_value"
    linear = Linear(name, random_pool(1, 48, WIDTH), bias=torch.randn(48))
    config = Checkpoint([linear]).quant_config()
    engine(monkeypatch, model_type=kind)
    make = functools.partial(QKVParallelLinear, WIDTH, 4, 4, quant_config=config, prefix=name)
    if kind == "falcon":  # looks for the dimension, see above
        make(disable_tp=True)
        return
    with pytest.raises(WexpandError, match=f"rearranges .* {kind}"):
        make(disable_tp=True)
    ColumnParallelLinear(WIDTH, 48, quant_config=config, prefix=name, disable_tp=True)


def test_different_routers_in_one_layer_are_refused_before_weights_are_read():
    other = Linear(f"{MLP}.up_proj", random_pool(EXPERTS, 12, WIDTH), random_router(EXPERTS, WIDTH))
    checkpoint = gate_up(up_proj=other)
    with pytest.raises(WexpandError, match="gate_proj and .*up_proj have different routers"):
        gate_up_layer(checkpoint, disable_tp=True)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", [8, 16])
def test_other_size_than_the_models_is_refused(size, ranks, monkeypatch):
    checkpoint = gate_up()
    as_rank(monkeypatch, 0, ranks)
    layer = gate_up_layer(checkpoint, size=size)
    with pytest.raises(WexpandError, match=rf"gate_proj: \[12, 20\] .* \[{2 * size}, 20\]"):
        checkpoint.fill(layer, GATE_UP)


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_other_number_of_replicated_heads_than_the_models_is_refused(kv_heads, monkeypatch):
    checkpoint = qkv(sizes=(16, 4 * kv_heads, 4 * kv_heads))
    as_rank(monkeypatch, 0, 4)
    layer = qkv_layer(checkpoint, heads=4, kv_heads=2)
    with pytest.raises(WexpandError, match=r"k_proj: .* does not fit"):
        checkpoint.fill(layer, QKV)


def test_options_that_expanded_linears_do_not_go_with_are_refused(monkeypatch):
    checkpoint = gate_up()
    engine(monkeypatch, lora_config="something")
    with pytest.raises(WexpandError, match="LoRA adapters"):
        gate_up_layer(checkpoint, disable_tp=True)
    engine(monkeypatch, load_format="ipc_cache")
    with pytest.raises(WexpandError, match="--load-format ipc_cache"):
        gate_up_layer(checkpoint, disable_tp=True)


def test_layer_without_tensors_is_refused():
    checkpoint = gate_up()
    layer = gate_up_layer(checkpoint, disable_tp=True)
    with pytest.raises(WexpandError, match="no tensor of it was loaded.*dummy"):
        layer.quant_method.process_weights_after_loading(layer)


def test_loading_twice_is_refused():
    checkpoint = gate_up()
    layer = gate_up_layer(checkpoint, disable_tp=True)
    parameter = layer.weight
    checkpoint.fill(layer, GATE_UP)
    with pytest.raises(WexpandError, match="cannot load expanded weights again"):
        parameter.weight_loader(parameter, torch.zeros(3), 0)


def test_layout_of_a_models_own_is_refused():
    class Peculiar(MergedColumnParallelLinear):
        def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
            raise AssertionError

    config = gate_up().quant_config()
    with pytest.raises(WexpandError, match="lays Peculiar out in a way of its own"):
        Peculiar(WIDTH, [12, 12], bias=False, quant_config=config, prefix=f"{MLP}.gate_up_proj",
                 disable_tp=True)  # fmt: skip


@pytest.mark.parametrize("linear", ["lm_head", "model.layers.0.mlp.experts.3.w1"])
def test_layers_that_are_no_linears_are_refused(linear):
    checkpoint = Checkpoint([Linear(linear, random_pool(1, 8, WIDTH))])
    config = checkpoint.quant_config()
    config.packed_modules_mapping = {}
    prefix = linear.removesuffix(".3.w1")
    with pytest.raises(WexpandError, match=f"{linear}: vLLM runs it as Embedding"):
        config.get_quant_method(torch.nn.Embedding(2, 2), prefix)
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


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
