"""transformers reads and runs checkpoints of ours."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from hf_models import load, logits, quantise, same_tensors
from transformers import AutoModel

from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.format.problems import problems
from wexpand_plugin.format.values import codec
from wexpand_plugin.hf import register, saving
from wexpand_plugin.hf.linear import RoutedLinear


@pytest.mark.parametrize("match", ["mlp", ""])
@pytest.mark.parametrize("kind", tiny.CLASSES)
def test_round_trip(tmp_path, kind, match):
    model = tiny.expanded(tmp_path / "a", kind, match=match)
    loaded = load(tmp_path / "a")
    routed = [m for m in loaded.modules() if isinstance(m, RoutedLinear)]
    assert len(routed) >= 4 and all(m.tokens == [10, 11, 12] for m in routed)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b", max_shard_size="30kB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    again = load(tmp_path / "b")
    assert same_tensors(loaded, again)
    a, b = (ModelDir(tmp_path / name) for name in "ab")
    assert a.config == b.config
    assert not list(problems(a)) and not list(problems(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("experts", "clusters", "parents"), [(1, 1, 0), (1, 40, 7), (2, 8, 0), (3, 3, 0)]
)
def test_clusters_survive(tmp_path, experts, clusters, parents, dtype):
    """Biases to the bit, whatever dtype the model is made, loaded and saved in."""
    settings = dict(experts=experts, clusters=clusters, parents=parents, match="")
    model = tiny.expanded(tmp_path / "a", "qwen2", dtype, **settings)
    found = ModelDir(tmp_path / "a")
    assert not list(problems(found))
    name = "model.layers.0.mlp.down_proj"
    entry, right = found.config.linears[name], model.get_submodule(name).stored
    assert (entry.experts, entry.clusters, entry.parents) == (experts, clusters, parents)
    assert entry.cluster_bias and not found.config.linears[name.replace("down", "up")].cluster_bias
    assert found.config.group_of(name).tokens == list(range(10, 10 + clusters))
    for other in (torch.float32, torch.bfloat16):
        loaded = load(tmp_path / "a", dtype=other)
        stored = loaded.get_submodule(name).stored
        assert (stored.clusters, stored.pool.experts) == (clusters, experts)
        assert (stored.router.parents if stored.router else 0) == parents
        assert torch.equal(stored.cluster_bias.values, right.cluster_bias.values)
        assert torch.equal(stored.cluster_bias.scale, right.cluster_bias.scale)
        if other is dtype:
            assert torch.equal(logits(loaded), logits(model))
        loaded.to(torch.float16).save_pretrained(tmp_path / f"{other}")
        again = ModelDir(tmp_path / f"{other}").linear(name)
        assert torch.equal(again.cluster_bias.scale, right.cluster_bias.scale)


def test_clusters_compute_what_they_say():
    """Token by token, in float64, with the router's choice by hand."""
    model = tiny.expand(tiny.dense("qwen2"), experts=2, clusters=9, parents=3, match="q_proj")
    linear = model.model.layers[0].self_attn.q_proj
    x = torch.randn(60, linear.in_features, generator=torch.Generator().manual_seed(1))
    seen, (pool, router, bias, biases, named) = set(), linear.stored
    for row, y in zip(x, linear(x), strict=True):
        logits = router.weight.double() @ row.double() + router.bias.double()
        parent = int(logits[:3].argmax())
        cluster = 3 * parent + int(logits[3:].view(3, 3)[parent].argmax())
        seen.add(cluster)
        right = pool.expert(int(named[cluster])).double() @ row.double()
        right += bias.double() + biases.decoded(torch.float64)[cluster]
        torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    assert len(seen) > 6 and named.tolist() == [0, 1] * 4 + [0]
    right = linear(x)
    linear.materialise()
    assert torch.equal(linear(x), right)
    linear.materialise(biases=torch.zeros(9, linear.out_features))
    assert not torch.allclose(linear(x), right)
    linear.materialise(biases=biases.decoded())
    assert torch.equal(linear(x), right)
    linear.dematerialise()
    assert torch.equal(linear(x), right)


@pytest.mark.parametrize("experts", [1, 3])
def test_agrees_with_the_dense_model(tmp_path, experts):
    """Equal experts, not pruned: routing must not matter."""
    model = tiny.dense("qwen2")
    right = logits(model)
    tiny.expand(model, experts, sparsity=0.0, match="")
    saving.wrap_save_pretrained(model, {})
    model.save_pretrained(tmp_path / "a")
    torch.testing.assert_close(logits(load(tmp_path / "a")), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_keep_the_router(tmp_path, dtype):
    model = tiny.expanded(tmp_path / "a")
    loaded = load(tmp_path / "a", dtype=dtype)
    linear = loaded.model.layers[0].mlp.down_proj
    assert linear.weight.dtype == dtype and logits(loaded).dtype == dtype
    router = model.model.layers[0].mlp.down_proj.router_weight
    assert linear.router_weight.dtype == torch.float32  # computed with, whatever is stored
    assert torch.equal(linear.router_weight, router.float())
    loaded.save_pretrained(tmp_path / "b")
    assert same_tensors(loaded, load(tmp_path / "b"))
    headers = ModelDir(tmp_path / "b").headers
    routers = {header.dtype for name, header in headers.items() if name.endswith("router_weight")}
    assert routers == {torch.float16}


@pytest.mark.parametrize("how", [codec("int8", 8), codec("int4", 16), codec("int3")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_integers_and_their_scales_survive(tmp_path, kind, dtype, how):
    """Values and scales to the bit, whatever dtype the model is made, loaded and saved in."""
    model = tiny.expand(tiny.dense(kind, dtype), match="")
    quantise(model, how)
    saving.wrap_save_pretrained(model, {})
    model.save_pretrained(tmp_path / "a")
    found = ModelDir(tmp_path / "a")
    assert not list(problems(found))
    name = "model.layers.0.mlp.down_proj"
    right = model.get_submodule(name).pool
    for load_dtype in (torch.float32, torch.bfloat16):
        loaded = load(tmp_path / "a", dtype=load_dtype)
        module = loaded.get_submodule(name)
        assert module.weight_scale.dtype == torch.float32, "exact, whatever the model is"
        assert module.pool.codec == how and torch.equal(module.pool.values, right.values)
        assert torch.equal(module.pool.scale, right.scale)
        assert torch.equal(module.pool.rows(), right.rows())
        y = module(torch.randn(5, module.in_features, dtype=load_dtype))
        assert y.dtype == load_dtype
        if load_dtype == dtype:
            assert torch.equal(logits(loaded), logits(model))
        loaded.save_pretrained(tmp_path / "b")
        again = ModelDir(tmp_path / "b")
        assert again.config.groups == found.config.groups
        assert again.config.linears[name].dtype == str(dtype).removeprefix("torch.")
        ours = [t for n in found.config.linears for t in found.config.tensors_of(n)]
        for (one, a), (other, b) in zip(found.tensors(ours), again.tensors(ours), strict=True):
            if not one.endswith(".bias"):
                assert one == other and a.dtype == b.dtype and torch.equal(a, b)
        assert again.headers[f"{name}.weight_scale"].dtype == torch.float16


def test_full_rows_and_a_single_expert(tmp_path):
    """No mask, no row map, no router: only what there is has a tensor."""
    model = tiny.expand(tiny.dense(), experts=1, sparsity=0.0)
    quantise(model, codec("int8", 8))
    saving.wrap_save_pretrained(model, {})
    model.save_pretrained(tmp_path / "a")
    kinds = {n.rpartition(".")[2] for n in ModelDir(tmp_path / "a").headers if "mlp" in n}
    assert kinds == {"weight", "weight_scale"}
    assert torch.equal(logits(load(tmp_path / "a")), logits(model))


def test_groups_survive_and_share_a_router(tmp_path):
    model = tiny.expanded(tmp_path / "a", "qwen2", match="")
    right = [
        [f"model.layers.{layer}.{name}" for name in names]
        for layer in range(2)
        for names in (
            [f"self_attn.{k}_proj" for k in "qkvo"], ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        )
    ]  # fmt: skip
    loaded = load(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a", tmp_path / "b"):
        config = ModelDir(path).config
        assert [list(group.linears) for group in config.groups] == right
        assert {tuple(group.tokens) for group in config.groups} == {(10, 11, 12)}
    for names in right:
        modules = [m.get_submodule(name) for m in (model, loaded) for name in names]
        assert len({module.group for module in modules[len(names) :]}) == 1
        first = modules[0].router
        for module in modules:
            assert torch.equal(module.router.weight.float(), first.weight.float())
            assert torch.equal(module.router.bias, first.bias)


def test_linears_without_a_group_stand_alone(tmp_path):
    model = tiny.expand(tiny.dense())
    for module in model.modules():
        if isinstance(module, RoutedLinear):
            module.group = ""
    saving.wrap_save_pretrained(model, {})
    model.save_pretrained(tmp_path / "a")
    assert [len(group.linears) for group in ModelDir(tmp_path / "a").config.groups] == [1] * 6


def test_materialised_experts_compute_the_same():
    module = tiny.expand(tiny.dense()).model.layers[0].mlp.down_proj
    x = torch.randn(20, module.in_features)
    right = module(x)
    module.materialise()
    assert torch.equal(module(x), right)
    module.materialise(torch.zeros(3, module.out_features, module.in_features))
    assert not module(x).any()
    module.dematerialise()
    assert torch.equal(module(x), right)


def test_a_float32_router_that_float16_cannot_hold_stays_as_it_is(tmp_path):
    model = tiny.expanded(tmp_path / "a")
    router = model.model.layers[0].mlp.down_proj.router_weight
    router.data = torch.randn(router.shape)
    model.save_pretrained(tmp_path / "a")
    loaded = load(tmp_path / "a").model.layers[0].mlp.down_proj
    assert torch.equal(loaded.router_weight, router)


def test_a_cast_model_keeps_its_routers_and_scales(tmp_path):
    tiny.expanded(tmp_path / "a", values="int4", clusters=6)
    load(tmp_path / "a").to(torch.bfloat16).save_pretrained(tmp_path / "b")
    loaded = load(tmp_path / "b")
    assert loaded.dtype == torch.bfloat16
    a, b = (ModelDir(tmp_path / name) for name in "ab")
    kinds = ("router_weight", "router_bias", "scale")
    names = [name for name in a.headers if name.endswith(kinds)]
    assert len(names) > 12 and all(torch.equal(a.read(name), b.read(name)) for name in names)
    assert loaded.model.layers[0].mlp.up_proj.router_bias.dtype == torch.float32


def test_generate_and_flags(tmp_path):
    model = tiny.expanded(tmp_path / "a")
    loaded = load(tmp_path / "a")
    prompt = tiny.tokens(1, 5)
    right = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=8, do_sample=False), right)
    assert loaded.hf_quantizer.is_serializable() and not loaded.hf_quantizer.is_trainable
    assert not any(
        p.requires_grad
        for m in loaded.modules() if isinstance(m, RoutedLinear)
        for p in m.parameters()
    )  # fmt: skip


def test_base_model_and_device_map(tmp_path):
    model = tiny.expanded(tmp_path / "a")
    base = AutoModel.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        states = base(tiny.tokens()).last_hidden_state
        assert torch.equal(states, model.model(tiny.tokens()).last_hidden_state)
    pytest.importorskip("accelerate")
    assert torch.equal(logits(load(tmp_path / "a", device_map="cpu")), logits(model))


def test_registering_again_does_nothing():
    register()
    register()


def python(code, *arguments):
    """Run `code` in a process that has imported nothing yet."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_without_the_plugin_transformers_refuses(tmp_path):
    """A size error, and never a model with random weights."""
    tiny.expanded(tmp_path / "a")
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "try: AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except RuntimeError as error: print('refused', error); sys.exit(7)\n"
        "assert 'wexpand_plugin' not in sys.modules"
    )
    done = python(code, tmp_path / "a")
    assert done.returncode == 7, done.stderr
    assert "size" in done.stdout.lower() and "gate_proj.weight" in done.stdout + done.stderr


@pytest.mark.slow
def test_importing_the_plugin_before_transformers(tmp_path):
    """The other order is that of this file."""
    tiny.expanded(tmp_path / "a")
    code = (
        "import sys; import wexpand_plugin; from transformers import AutoModelForCausalLM\n"
        "print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj)"
    )
    done = python(code, tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RoutedLinear(in_features=40, out_features=52, experts=3")
