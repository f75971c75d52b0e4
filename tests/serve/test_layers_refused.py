"""What vLLM's linear layers refuse to be filled with, each by the name of what is wrong."""

import functools
from types import SimpleNamespace

import pytest
import torch
from builders import GATE_UP, QKV, Checkpoint, Linear, as_rank, random_pool, random_router
from expanded_layers import (
    ATTENTION,
    EXPERTS,
    MLP,
    WIDTH,
    clustered,
    gate_up,
    gate_up_layer,
    qkv,
    qkv_layer,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.serve import config


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    torch.manual_seed(0)
    as_rank(monkeypatch, 0, 1)


def engine(monkeypatch, model_type="llama", lora_config=None, load_format="auto") -> None:
    """Let layers made from now on find themselves in an engine with these settings."""
    hf_config = SimpleNamespace(model_type=model_type)
    found = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config), lora_config=lora_config,
        load_config=SimpleNamespace(load_format=load_format), additional_config={},
    )  # fmt: skip
    monkeypatch.setattr(config, "get_current_vllm_config_or_none", lambda: found)


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
