"""vLLM's linear layers filled with expanded linears: loading, the forward, tensor parallel."""

import builders
import pytest
import torch
from builders import GATE_UP, QKV, Checkpoint, Linear, as_rank, random_pool, random_router, run
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.router import ROUTER_DTYPES, Router

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
WIDTH, EXPERTS = 20, 3  # 20 does not divide by 8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def qkv(bias=True, sizes=(16, 8, 8), router=None, dtype=torch.float32) -> Checkpoint:
    router = router or random_router(EXPERTS, WIDTH)
    return Checkpoint(
        [
            Linear(
                f"{ATTENTION}.{name}",
                random_pool(EXPERTS, size, WIDTH, dtype),
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
    router = sum(t.nbytes for t in checkpoint.linears[0].router)
    starts = 8 * (sum(linear.pool.versions for linear in checkpoint.linears) + 1)
    assert stored + router <= held <= stored + router + starts
    assert not hasattr(layer, "wexpand_parts") and not hasattr(layer, "row_map")


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
    weight, bias = random_router(EXPERTS, WIDTH)
    checkpoint = qkv(router=Router(weight.to(stored), bias))
    layer = qkv_layer(checkpoint, disable_tp=True, params_dtype=dtype)
    checkpoint.fill(layer, QKV)
    assert layer.layout_0.dtype == dtype and layer.bias.dtype == dtype
    assert layer.router_weight.dtype == stored and layer.router_bias.dtype == torch.float32
    x = torch.randn(9, WIDTH, dtype=dtype)
    y = run(layer, x)
    assert y.dtype == dtype
    assert_close(y, expected(checkpoint, x), 3e-2)


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
def test_qkv_of_every_rank(monkeypatch, ranks, heads, kv_heads):
    checkpoint = qkv(sizes=(4 * heads, 4 * kv_heads, 4 * kv_heads))
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


@pytest.mark.parametrize("experts", [1, 4])
def test_row_parallel_of_both_ranks(monkeypatch, experts):
    """Columns 0-9 and 10-19: a byte of the mask is cut in two. Routers need every column."""
    linear = Linear(f"{MLP}.down_proj", random_pool(experts, 9, WIDTH),
                    random_router(experts, WIDTH) if experts > 1 else None,
                    torch.randn(9))  # fmt: skip
    checkpoint = Checkpoint([linear])
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
    assert len(given) == (2 if experts > 1 else 0)
    assert all(logits.dtype == torch.float32 for logits in given)
    total = sum(given)
    monkeypatch.setattr("vllm.distributed.tensor_model_parallel_all_reduce", lambda t: total)
    y = run(layers[0], halves[0]) + layers[1].quant_method.apply(layers[1], halves[1], None)
    assert_close(y, linear.forward(x))


# what is refused


def damage(checkpoint: Checkpoint, tensor: str, change) -> None:
    value = checkpoint.tensors[tensor].clone()
    checkpoint.tensors[tensor] = change(value)


def flip(value):
    value.view(torch.uint8).view(-1)[-1] ^= 1
    return value


@pytest.mark.parametrize("member", ["q_proj", "v_proj"])
@pytest.mark.parametrize(
    "kind", ["weight", "weight_mask", "row_map", "router_weight", "router_bias", "bias"]
)
@pytest.mark.parametrize("change", [flip, lambda value: value[:-1], None], ids=["bit", "cut", "no"])
def test_damaged_tensor_is_refused_by_name(member, kind, change):
    checkpoint = qkv()
    name = f"{ATTENTION}.{member}.{kind}"
    if change is None:
        del checkpoint.tensors[name]
    else:
        damage(checkpoint, name, change)
    layer = qkv_layer(checkpoint, disable_tp=True)
    with pytest.raises(WexpandError) as refused:
        checkpoint.fill(layer, QKV)
    assert str(refused.value).startswith(name)


def test_swapped_tensors_are_refused():
    checkpoint = gate_up()
    names = [f"{MLP}.{name}.row_map" for name in GATE_UP]
    a, b = (checkpoint.tensors[name] for name in names)
    checkpoint.tensors |= dict(zip(names, (b, a), strict=True))
    layer = gate_up_layer(checkpoint, disable_tp=True)
    with pytest.raises(WexpandError, match="gate_proj.row_map: damaged"):
        checkpoint.fill(layer, GATE_UP)


def test_damaged_dense_member_is_refused():
    dense = Linear(f"{MLP}.up_proj", dense=torch.randn(12, WIDTH))
    checkpoint = gate_up(up_proj=dense)
    damage(checkpoint, f"{MLP}.up_proj.weight", flip)
    layer = gate_up_layer(checkpoint, disable_tp=True)
    with pytest.raises(WexpandError, match="up_proj.weight: damaged"):
        checkpoint.fill(layer, GATE_UP)


def test_rows_reordered_by_a_models_loader_are_refused():
    """A model that reorders a fused matrix while loading finds the dimension, and is noticed."""
    checkpoint = qkv()
    layer = qkv_layer(checkpoint, disable_tp=True)
    assert layer.row_map.output_dim == 1
    damage(checkpoint, f"{ATTENTION}.q_proj.row_map", lambda value: value.flip(1))
    with pytest.raises(WexpandError, match="q_proj.row_map: damaged"):
        checkpoint.fill(layer, QKV)


def test_different_routers_in_one_layer_are_refused():
    other = Linear(f"{MLP}.up_proj", random_pool(EXPERTS, 12, WIDTH), random_router(EXPERTS, WIDTH))
    checkpoint = gate_up(up_proj=other)
    layer = gate_up_layer(checkpoint, disable_tp=True)
    with pytest.raises(WexpandError, match="gate_proj and .*up_proj have different routers"):
        checkpoint.fill(layer, GATE_UP)


def test_other_size_than_the_models_is_refused():
    checkpoint = gate_up()
    layer = gate_up_layer(checkpoint, size=16, disable_tp=True)
    with pytest.raises(WexpandError, match=r"gate_proj: \[12, 20\] .* wants \[16, 20\]"):
        checkpoint.fill(layer, GATE_UP)


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

    checkpoint = gate_up()
    layer = Peculiar(WIDTH, [12, 12], bias=False, quant_config=checkpoint.quant_config(),
                     prefix=f"{MLP}.gate_up_proj", disable_tp=True)  # fmt: skip
    with pytest.raises(WexpandError, match="Peculiar"):
        checkpoint.fill(layer, GATE_UP)


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
    checkpoint = qkv()
    layer = qkv_layer(checkpoint, disable_tp=True)
    checkpoint.fill(layer, QKV)
    layout = [getattr(layer, name) for name in layer.wexpand_layout]
    arguments = (torch.randn(4, WIDTH), layout, layer.router_weight, layer.router_bias, None,
                 layer.bias, 32, layer.wexpand_kernel)  # fmt: skip
    torch.library.opcheck(torch.ops.wexpand.routed_linear.default, arguments)
    logits = (arguments[0], layer.router_weight, layer.wexpand_kernel)
    torch.library.opcheck(torch.ops.wexpand.router_logits.default, logits)


def test_builders_share_and_prune_rows():
    """The random pools have what makes loading hard: shared rows, an empty row, odd widths."""
    pool = builders.random_pool(EXPERTS, 16, WIDTH).validate()
    assert pool.versions < pool.experts * pool.out_features
    assert not pool.mask[0].any()
