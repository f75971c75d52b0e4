"""SparseExpansionModifier in real `oneshot` runs on tiny models of several architectures."""

import dataclasses
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from llmcompressor import oneshot
from tiny import VOCAB, tokenizer

from wexpand_plugin.compress.modifier import SparseExpansionModifier
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.method.clusters import Router
from wexpand_plugin.method.settings import Settings


def tiny(kind: str, path: Path, dtype=torch.float32) -> Path:
    """A saved random model of 2 blocks; 52 does not divide by 8."""
    sizes = dict(
        hidden_size=32, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=VOCAB, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=kind == "Mistral",
    )  # fmt: skip
    if kind not in ("GPTNeoX", "OPT"):
        sizes["num_key_value_heads"] = 2
    if kind == "OPT":
        sizes |= dict(ffn_dim=52, word_embed_proj_dim=32)
    if kind == "Phi3":
        sizes["pad_token_id"] = 0  # its own default is beyond this vocabulary
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    config.dtype = dtype
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # the initialiser's 0.02 and zero biases would leave next to nothing to route on
            if "layers" in name and "norm" not in name:
                parameter.normal_(std=0.5 if name.endswith("bias") else 0.2)
    model.save_pretrained(path)
    return path


def calibration(samples: int = 24, length: int = 48) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, VOCAB, (samples, length), generator=generator).tolist()
    return datasets.Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * length] * samples}
    )


def run(path: Path, output: Path | None = None, data=None, pipeline="independent", **values):
    values = {"sparsity": 0.6, "num_experts": 4, "targets": ["Linear"], "ignore": ["lm_head"],
              "router_restarts": 1} | values  # fmt: skip
    data = data or calibration()
    return oneshot(
        model=str(path), dataset=data, recipe=[SparseExpansionModifier(**values)],
        num_calibration_samples=len(data), max_seq_length=64, pipeline=pipeline,
        output_dir=None if output is None else str(output),
        tokenizer=None, processor=tokenizer(),
    )  # fmt: skip


def logits(model, seed: int = 5) -> torch.Tensor:
    ids = torch.randint(2, VOCAB, (3, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "kind",
    ["Llama", "GPTNeoX"]
    + [
        pytest.param(k, marks=pytest.mark.slow)
        for k in ("Qwen2", "Mistral", "Qwen3", "OPT", "Gemma2", "Gemma3Text", "Olmo2", "Phi3")
    ],
)
def test_compresses_saves_and_reloads_equal(kind, tmp_path):
    model = run(tiny(kind, tmp_path / "dense"), tmp_path / "out")
    routed = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    # qkv and gate_up are one linear each in Phi-3
    assert len(routed) == {"GPTNeoX": 8, "OPT": 12, "Phi3": 8}.get(kind, 14)
    for module in routed.values():
        assert module.experts == 4 and sum(module.tokens) == 24 * 48
    expected = logits(model)
    config = ModelDir(tmp_path / "out").config
    assert set(config.linears) == set(routed)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded), expected)


def test_linears_that_read_the_same_tensor_share_a_router(tmp_path):
    model = run(tiny("Llama", tmp_path / "dense"))
    layer = model.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    for linear in (attention.k_proj, attention.v_proj):
        assert torch.equal(linear.router_weight, attention.q_proj.router_weight)
    assert torch.equal(mlp.gate_proj.router_weight, mlp.up_proj.router_weight)
    routers = [attention.q_proj, attention.o_proj, mlp.gate_proj]
    for i, one in enumerate(routers):
        for other in routers[i + 1 :]:
            assert not torch.equal(one.router_weight, other.router_weight)


@pytest.mark.parametrize("structure,sparsity", [("row", 0.6), ("unstructured", 0.6), ("2:4", 0.5)])
def test_every_expert_has_the_sparsity_asked_for(structure, sparsity, tmp_path):
    model = run(
        tiny("Llama", tmp_path / "dense"), mask_structure=structure, sparsity=sparsity,
        targets=["re:.*mlp.*"],
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, RoutedLinear):
            for expert in range(4):
                weight = module.pool.expert(expert)
                assert (weight == 0).float().mean().item() == pytest.approx(sparsity, abs=0.02)
                if structure == "2:4":
                    assert ((weight.view(-1, 4) == 0).sum(dim=1) == 2).all()


def test_one_expert_is_llmcompressors_sparsegpt(tmp_path):
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    path = tiny("Llama", tmp_path / "dense")
    ours = run(path, num_experts=1, mask_structure="0:0", sparsity=0.5, targets=["re:.*mlp.*"])
    theirs = oneshot(
        model=str(path), dataset=calibration(), processor=tokenizer(), max_seq_length=64,
        num_calibration_samples=24,
        recipe=[SparseGPTModifier(sparsity=0.5, targets=["re:.*layers.*mlp.*_proj$"])],
    )  # fmt: skip
    # the second block sees inputs that differ by rounding, which may move a mask bit
    for name in ("gate_proj", "up_proj", "down_proj"):
        module = ours.get_submodule(f"model.layers.0.mlp.{name}")
        weight = theirs.get_submodule(f"model.layers.0.mlp.{name}").weight
        assert module.experts == 1 and module.router_weight is None
        assert 0.5 <= (weight == 0).float().mean() < 0.52
        assert torch.equal(module.pool.expert(0) == 0, weight == 0)
        torch.testing.assert_close(module.pool.expert(0), weight.data, atol=1e-5, rtol=0)


def test_down_proj_is_calibrated_on_the_sparse_gate_and_up(tmp_path):
    """Its recorded tokens per expert must be those of the inputs it has in use."""
    model = run(tiny("Llama", tmp_path / "dense"), targets=["re:.*layers.0.mlp.*"])
    down = model.model.layers[0].mlp.down_proj
    seen = []
    down.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 52)))
    data = calibration()
    for row in data["input_ids"]:
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
    router = Router(down.router_weight, down.router_bias)
    counts = torch.bincount(router.route(torch.cat(seen)), minlength=4)
    # a handful of tokens may sit on a boundary and move with the batch's rounding
    assert (counts - torch.tensor(down.tokens)).abs().sum() <= 4


@pytest.mark.parametrize(
    "scope,share",
    [
        ("layer", True),
        ("model", True),
        pytest.param("layer", False, marks=pytest.mark.slow),
    ],
)
def test_size_budget_is_met(scope, share, tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    model = run(
        path, tmp_path / "out", sparsity=0.8, size_budget=2.0, budget_scope=scope,
        share_versions=share, targets=["re:.*mlp.*"], num_experts=3,
    )  # fmt: skip
    saved = ModelDir(tmp_path / "out")
    total = dense = 0
    for name in saved.config.linears:
        pool, router, *_ = saved.linear(name)
        assert router.weight.dtype == torch.float16
        stored = sum(pool.stored_bytes().values()) + router.nbytes
        assert stored == model.get_submodule(name).stored_bytes()
        if scope == "layer":
            assert stored <= 2.0 * 4 * pool.in_features * pool.out_features
        total, dense = total + stored, dense + 4 * pool.in_features * pool.out_features
    assert total <= 2.0 * dense


@pytest.mark.slow
def test_with_model_scope_calibration_does_not_depend_on_the_budget(tmp_path):
    """Later linears see the full expansion of earlier ones, whatever will be left of those."""
    path = tiny("Llama", tmp_path / "dense")
    routers = {}
    for scope, budget in (("model", 0.8), ("model", 3.0), ("layer", 0.8), ("layer", 3.0)):
        torch.manual_seed(0)  # of the order of the calibration rows
        model = run(path, sparsity=0.8, size_budget=budget, budget_scope=scope)
        last = [m for m in model.modules() if isinstance(m, RoutedLinear)][-1]
        routers[scope, budget] = last.router_weight
    assert torch.equal(routers["model", 0.8], routers["model", 3.0])
    assert not torch.equal(routers["layer", 0.8], routers["layer", 3.0])


def test_the_error_that_is_logged_is_that_of_what_is_stored(tmp_path, said):
    """With a model-wide budget too, although calibration goes on with the full expansion."""
    path = tiny("Llama", tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(path).model.layers[0].mlp.gate_proj
    model = run(path, sparsity=0.8, size_budget=0.6, targets=["re:.*mlp.*"])
    lines = [line for line in said if line.startswith("model.layers.0.mlp: gate_proj + up_proj")]
    calibrating, stored = lines
    assert "(full expansion, for calibration)" in calibrating
    module = model.model.layers[0].mlp.gate_proj
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        for row in calibration()["input_ids"]:
            model(input_ids=torch.tensor([row]))
        rows = torch.cat(seen)
        error = float((module(rows) - dense(rows)).norm() / dense(rows).norm())
    logged = float(re.search(r"stored with relative error ([\d.]+)", stored)[1])
    assert logged == pytest.approx(error, rel=0.03)
    share = module.stored_bytes() / module.dense_bytes()
    assert f"({share:.2f} of dense)" in stored


def test_rules_choose_different_neurons(tmp_path):
    path, maps = tiny("Llama", tmp_path / "dense"), {}
    for rule in ("gain", "wasserstein", "gain_wasserstein", "kurtosis", "random"):
        model = run(path, sparsity=0.8, size_budget=1.2, allocate_by=rule, num_experts=3,
                    targets=["re:.*layers.0.mlp.gate.*"])  # fmt: skip
        maps[rule] = model.model.layers[0].mlp.gate_proj.pool
    for rule in ("wasserstein", "random"):
        assert maps[rule].mask.shape != maps["gain"].mask.shape or not torch.equal(
            maps[rule].mask, maps["gain"].mask
        )


def test_the_smallest_budget_is_plain_sparsegpt(tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    targets = ["re:.*layers.0.mlp.gate_proj"]
    plain = run(path, num_experts=1, targets=targets).model.layers[0].mlp.gate_proj
    with pytest.raises(WexpandError) as refused:
        run(path, size_budget=0.01, num_experts=2, targets=targets)
    least = float(re.search(r"below ([\d.]+)", str(refused.value)).group(1))
    small = run(path, size_budget=least + 0.002, num_experts=2, targets=targets)
    pool = small.model.layers[0].mlp.gate_proj.pool
    for expert in range(2):
        assert torch.equal(pool.expert(expert) == 0, plain.pool.expert(0) == 0)
        torch.testing.assert_close(pool.expert(expert), plain.pool.expert(0), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_deterministic(tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(run(path, size_budget=2.0, targets=["re:.*mlp.*"]).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in runs), strict=True))


def test_bfloat16_model_keeps_its_router(tmp_path):
    path = tiny("Llama", tmp_path / "dense", torch.bfloat16)
    model = run(path, tmp_path / "out", targets=["re:.*mlp.*"])
    module = model.model.layers[0].mlp.gate_proj
    assert module.weight.dtype == torch.bfloat16 and module.router_weight.dtype == torch.float16
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_other_pipelines(pipeline, tmp_path):
    model = run(tiny("Llama", tmp_path / "dense"), pipeline=pipeline, targets=["re:.*mlp.*"])
    assert sum(isinstance(m, RoutedLinear) for m in model.modules()) == 6


def test_yaml_recipe_with_unquoted_mask_structure(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "a_stage:\n  b_modifiers:\n    SparseExpansionModifier:\n      sparsity: 0.5\n"
        "      mask_structure: 2:4\n      num_experts: 2\n      targets: ['re:.*mlp.*']\n"
    )
    model = oneshot(
        model=str(tiny("Llama", tmp_path / "dense")), dataset=calibration(), recipe=str(recipe),
        processor=tokenizer(), max_seq_length=64, num_calibration_samples=24,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    assert model.model.layers[0].mlp.up_proj.experts == 2
    there = {file.name for file in (tmp_path / "out").iterdir()}
    assert there >= {"recipe.yaml", "tokenizer.json", "generation_config.json"}
    assert "mask_structure: '2:4'" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    made_by = config["made_by"]
    assert made_by["mask_structure"] == "2:4" and made_by["targets"] == ["re:.*mlp.*"]
    # enough to repeat the run
    again = SparseExpansionModifier(
        **{key: made_by[key] for key in SparseExpansionModifier.model_fields if key in made_by}
    )
    assert (again.sparsity, again.num_experts, again.seed) == (0.5, 2, 0)
    assert {"block_size", "dampening_frac", "shrinkage", "router_dims", "max_bytes"} <= set(made_by)
    assert made_by["model"] == str(tmp_path / "dense")
    assert made_by["data"]["batches"] == 24 and made_by["data"]["tokens_counted"] == 24 * 48
    assert set(made_by["versions"]) > {"wexpand", "llmcompressor", "transformers", "torch"}


@pytest.mark.slow
def test_stories260k(stories260k, tmp_path):
    model = run(stories260k, tmp_path / "out", targets=["re:.*mlp.*"], sparsity=0.5)
    assert model.model.layers[0].mlp.down_proj.in_features == 172
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize(
    "values,message",
    [
        (dict(sparsity=1.5), "sparsity: 1.5 should be above 0"),
        (dict(num_experts=257), "num_experts: 257 should be at most 256"),
        (dict(allocate_by="luck"), "allocate_by: 'luck' should be one of gain, wasserstein"),
        (dict(mask_structure="4:2"), "mask_structure"),
        (dict(sparsty=0.5), "sparsty"),
    ],
)
def test_impossible_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseExpansionModifier(**({"sparsity": 0.5} | values))


def test_every_value_of_the_method_is_a_key_with_the_same_default():
    keys = SparseExpansionModifier.model_fields
    inside = {"stored_bytes", "keep", "shortlist", "structure"}
    for field in dataclasses.fields(Settings):
        assert (field.name in keys) != (field.name in inside)
        if field.name in keys and field.name != "sparsity":
            assert keys[field.name].default == field.default


def test_targets_that_match_nothing(tmp_path):
    with pytest.raises(WexpandError, match=r"targets: \['re:.*nothing'\].* match no torch.nn.Lin"):
        run(tiny("Llama", tmp_path / "dense"), targets=["re:.*nothing"])


def test_too_little_calibration(tmp_path):
    with pytest.raises(WexpandError, match="calibration: 96 tokens are too few for num_experts 4"):
        run(tiny("Llama", tmp_path / "dense"), data=calibration(2))


def test_nan_in_calibration_names_the_linears(tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    model.save_pretrained(path)
    with pytest.raises(WexpandError, match="layers.0.self_attn: q_proj.*NaN"):
        run(path)


def test_a_model_is_not_expanded_twice(tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    model = run(path, tmp_path / "out")
    with pytest.raises(ValueError, match="wexpand"):
        run(tmp_path / "out")
    with pytest.raises(WexpandError, match="already expanded"):
        oneshot(
            model=model, dataset=calibration(), processor=tokenizer(), max_seq_length=64,
            recipe=[SparseExpansionModifier(sparsity=0.5)], num_calibration_samples=24,
        )  # fmt: skip
