"""pack and unpack whole model directories: every bit, every file, every refusal."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.tools.pack import break_even, pack
from wexpand_plugin.tools.unpack import unpack
from wexpand_plugin.tools.verify import verify


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def bits(t):
        return t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(bits(a[n]) == bits(b[n]) for n in a)


def pruned(path: Path, kind="llama", dtype=torch.float32, sparsity=0.5, shard="50GB", **changes):
    model = tiny.prune(tiny.dense(kind, dtype, **changes), sparsity)
    model.save_pretrained(path, max_shard_size=shard)
    return model


def set_config(path: Path, **values) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", tiny.CLASSES)
def test_identity_of_a_sharded_model(tmp_path, kind, dtype):
    """Tied embeddings, biases, widths that do not divide by 8, -0.0, an empty and a full row."""
    model = tiny.prune(tiny.dense(kind, dtype, tie_word_embeddings=True))
    with torch.no_grad():
        weight = list(tiny.block_linears(model).values())[-1].weight
        weight[0], weight[1], weight[2, :5], weight[3] = 0, 1, -0.0, -0.0
    model.save_pretrained(tmp_path / "dense", max_shard_size="20kB")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "sub").mkdir()
    (tmp_path / "dense" / "sub" / "template.jinja").write_text("x")
    for name in ("modeling_own.py", "sub/state.pkl", "old.ckpt", "old.npz"):
        (tmp_path / "dense" / name).write_text("x")

    done = pack(
        tmp_path / "dense", tmp_path / "packed", keep_negative_zeros=True, quiet=True,
        max_shard_bytes=20_000,
    )  # fmt: skip
    assert len(done.packed) == len(tiny.block_linears(model)) and not done.left
    assert done.negative_zeros == 5 + weight.shape[1]
    assert done.bytes_after < done.bytes_before
    for pattern in ("*.py", "*.pkl", "*.ckpt", "*.npz"):
        assert not list((tmp_path / "packed").rglob(pattern))
    assert any("runs code: modeling_own.py, sub/state.pkl" in note for note in done.notes)
    packed = tensors(tmp_path / "packed")
    assert sum(name.endswith(".weight_mask") for name in packed) == len(done.packed)
    assert not [name for name in packed if name.endswith(("row_map", "router_weight"))]
    assert verify(tmp_path / "packed") == []
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1

    unpack(tmp_path / "packed", tmp_path / "back", quiet=True, max_shard_bytes=20_000)
    assert same_bits(tensors(tmp_path / "dense"), tensors(tmp_path / "back"))
    for name in ("tokenizer.json", "sub/template.jinja", "config.json"):
        before, after = (json_or_text(tmp_path / d / name) for d in ("dense", "back"))
        assert before == after and (tmp_path / "packed" / name).exists()

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    if dtype == torch.float32:
        with torch.no_grad():
            torch.testing.assert_close(
                loaded(tiny.tokens()).logits, back(tiny.tokens()).logits, rtol=1e-4, atol=1e-4
            )


def json_or_text(path: Path):
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_size_follows_the_formula(tmp_path, sparsity):
    """2(1-s) + 1/8 bytes per weight in bfloat16, exactly: there is nothing else to store."""
    model = pruned(
        tmp_path / "dense", dtype=torch.bfloat16, sparsity=sparsity, hidden_size=512,
        intermediate_size=1024, num_hidden_layers=1,
    )  # fmt: skip
    pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    linears = tiny.block_linears(model).values()
    weights = sum(linear.weight.numel() for linear in linears)
    zeros = sum((linear.weight == 0).sum().item() for linear in linears) / weights
    stored = tensors(tmp_path / "packed")
    ours = {n.rpartition(".")[0] for n in stored if n.endswith(".weight_mask")}
    found = sum(t.nbytes for n, t in stored.items() if n.rpartition(".")[0] in ours)
    assert found / weights == pytest.approx(2 * (1 - zeros) + 1 / 8)
    on_disk = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert on_disk == pytest.approx(sum(t.nbytes for t in stored.values()), rel=0.02)


def test_packs_only_where_it_is_smaller(tmp_path):
    model = tiny.dense(dtype=torch.bfloat16)
    even = break_even(torch.bfloat16, tiny.HIDDEN)
    assert even == (tiny.HIDDEN / 8) / (2 * tiny.HIDDEN)
    with torch.no_grad():
        for name, zeros in (("gate_proj", even - 0.02), ("up_proj", even + 0.02)):
            linear = model.get_submodule(f"model.layers.0.mlp.{name}")
            linear.weight.view(-1)[: int(zeros * linear.weight.numel())] = 0
    model.save_pretrained(tmp_path / "dense")
    done = pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    assert list(done.packed) == ["model.layers.0.mlp.up_proj"]
    assert done.left["model.layers.0.mlp.gate_proj"] == pytest.approx(even - 0.02, abs=0.01)
    assert done.bytes_after < done.bytes_before + 2000
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_pruning_by_multiplication_leaves_negative_zeros(tmp_path):
    """Half of the zeros are -0.0: zeros unless told otherwise, and always said."""
    model = tiny.multiply_by_masks(tiny.dense(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "dense")
    small = pack(tmp_path / "dense", tmp_path / "small", quiet=True)
    exact = pack(tmp_path / "dense", tmp_path / "exact", quiet=True, keep_negative_zeros=True)
    (note,), (exact_note,) = small.notes, exact.notes
    assert "-0.0" in note and note.endswith("taken for zeros")
    assert "-0.0" in exact_note and exact_note.endswith("stored, so that every bit survives")
    weights = [linear.weight for linear in tiny.block_linears(model).values()]
    negative = sum(int(((w == 0) & torch.signbit(w)).sum()) for w in weights)
    assert exact.negative_zeros == small.negative_zeros == negative > 0
    for name, zeros in small.packed.items():
        weight = model.get_submodule(name).weight
        assert (
            zeros
            == pytest.approx(float((weight == 0).float().mean()))
            == pytest.approx(0.8, abs=0.05)
        )
        assert exact.packed[name] == pytest.approx(0.4, abs=0.07)
    assert small.bytes_after < 0.8 * exact.bytes_after
    unpack(tmp_path / "exact", tmp_path / "exact_back", quiet=True)
    assert same_bits(tensors(tmp_path / "dense"), tensors(tmp_path / "exact_back"))
    unpack(tmp_path / "small", tmp_path / "small_back", quiet=True)
    back, linears = tensors(tmp_path / "small_back"), tiny.block_linears(model)
    for name, tensor in tensors(tmp_path / "dense").items():
        assert torch.equal(tensor, back[name])
        if name.removesuffix(".weight") in linears:
            assert not bool(((back[name] == 0) & torch.signbit(back[name])).any())
    right = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        expected = right(tiny.tokens()).logits
        for name in ("small", "exact"):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert torch.equal(loaded(tiny.tokens()).logits, expected)


def test_negative_zeros_can_make_a_model_too_dense_to_pack(tmp_path):
    """4% zeros, half of them negative; above 3.125% a float32 linear gets smaller."""
    model = tiny.dense(hidden_size=64, intermediate_size=64)
    with torch.no_grad():
        for linear in tiny.block_linears(model).values():
            flat = linear.weight.view(-1)
            flat[::25] = 0
            flat[::50] = -0.0
    model.save_pretrained(tmp_path / "dense")
    assert len(pack(tmp_path / "dense", tmp_path / "small", quiet=True).packed) == 14
    with pytest.raises(WexpandError, match=r"has 2\.0%; -0.0 counts as a weight\)"):
        pack(tmp_path / "dense", tmp_path / "exact", quiet=True, keep_negative_zeros=True)


def test_no_linear_is_sparse(tmp_path):
    tiny.dense().save_pretrained(tmp_path / "dense")
    with pytest.raises(WexpandError, match=r"no linear has more than 3\.4% zeros.*has 0.0%"):
        pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_head_and_embeddings_stay_dense(tmp_path):
    model = tiny.prune(tiny.dense())
    with torch.no_grad():
        model.lm_head.weight[::2] = 0
        model.model.embed_tokens.weight[::2] = 0
    model.save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    assert tensors(tmp_path / "packed")["lm_head.weight"].shape == (tiny.VOCAB, tiny.HIDDEN)


def test_names_of_older_checkpoints(tmp_path):
    """GPT-NeoX checkpoints of the base model lack the prefix that the causal LM's modules have."""
    pruned(tmp_path / "dense", "gpt_neox")
    file = tmp_path / "dense" / "model.safetensors"
    renamed = {name.removeprefix("gpt_neox."): t for name, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    done = pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    assert "layers.0.mlp.dense_h_to_4h" in done.packed
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert "RoutedLinear" in str(loaded.gpt_neox.layers[0].mlp.dense_h_to_4h)
    loaded.save_pretrained(tmp_path / "again")
    assert ModelDir(tmp_path / "again").config.linears


@pytest.mark.parametrize(
    "leftover",
    [
        {"sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}},
        {"sparsity_config": {}},
        {"compression_config": {"sparsity_config": {"format": "dense"}}},
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "dense",
                "config_groups": {},
                "sparsity_config": {"format": "dense", "global_sparsity": 0.5},
            }
        },
    ],
)
def test_leftovers_are_dropped_and_said(tmp_path, leftover):
    pruned(tmp_path / "dense")
    set_config(tmp_path / "dense", **leftover)
    done = pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    (key,) = leftover
    assert len(done.notes) == 1 and done.notes[0].startswith(f"dropped {key} from config.json")
    values = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert values["quantization_config"]["quant_method"] == "wexpand"
    assert "sparsity_config" not in values and "compression_config" not in values


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\)"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}}, "config_groups"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"a": 1}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
         "transforms inputs"),
        ({"transform_config": {"config_groups": [1]}}, "transforms inputs"),
        ({"quant_method": "wexpand"}, "packed or expanded already"),
    ],
)
def test_quantised_models_are_refused(tmp_path, found, match):
    pruned(tmp_path / "dense")
    set_config(tmp_path / "dense", quantization_config=found)
    with pytest.raises(WexpandError, match=match):
        pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    assert not (tmp_path / "packed").exists()


def test_bad_weights_and_models(tmp_path):
    pruned(tmp_path / "dense")
    file, name = tmp_path / "dense" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    good = load_file(file)

    def attempt(match):
        with pytest.raises(WexpandError, match=match):
            pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]

    save_file(good | {name: good[name].to(torch.float8_e4m3fn)}, file)
    attempt(f"{name}: dtype torch.float8_e4m3fn")
    bad = good[name].clone()
    bad[0, 0] = float("nan")
    save_file(good | {name: bad}, file)
    attempt(f"{name}: holds NaN")
    norm = "model.norm.weight"
    save_file({key: value for key, value in good.items() if key != norm}, file)
    attempt(f"{norm}: missing; LlamaForCausalLM has it")
    save_file(good | {norm: torch.ones(100)}, file)
    attempt(rf"{norm}: shape \[100\] should be \[40\]")
    save_file(good | {norm: good[norm] * float("inf")}, file)
    attempt(f"{norm}: holds NaN")
    save_file(good | {name: good[name].flatten()}, file)
    attempt(rf"{name}: shape \[2080\] should be")
    file.write_bytes(b"\x00" * 40)
    attempt("not a complete safetensors file")
    file.unlink()
    attempt("holds no .safetensors file")
    set_config(tmp_path / "dense", architectures=["NoSuchModel"])
    save_file(good, file)
    attempt("NoSuchModel is no model class")
    set_config(tmp_path / "dense", model_type="no_such_type")
    attempt("transformers cannot build this model")
    (tmp_path / "dense" / "config.json").write_text("{")
    attempt("not JSON")


def test_output_directory(tmp_path):
    pruned(tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    pack(tmp_path / "dense", tmp_path / "empty", quiet=True)
    assert ModelDir(tmp_path / "empty").config.linears
    for action in (pack, unpack):
        with pytest.raises(WexpandError, match="is not empty"):
            action(tmp_path / "dense", tmp_path / "empty", quiet=True)
    with pytest.raises(WexpandError, match="is a file"):
        pack(tmp_path / "dense", tmp_path / "dense" / "config.json", quiet=True)


def test_model_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WexpandError, match="no/such: no such directory, and not found on the hub"):
        pack("no/such", tmp_path / "packed", quiet=True)
    with pytest.raises(WexpandError, match="neither a directory nor the id"):
        pack(tmp_path / "missing", tmp_path / "packed", quiet=True)


def test_experts_of_a_mixture_stay_dense_and_that_is_said(tmp_path):
    """They are fused in the model, whether the file has them one by one or not."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=96, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "self_attn" in name and weight.dim() == 2:
                weight[torch.rand_like(weight) < 0.6] = 0
    model.save_pretrained(tmp_path / "dense")
    done = pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    assert len(done.packed) == 8
    (note,) = (note for note in done.notes if note.startswith("left dense: "))
    experts = 2 * 4 * 3 * 64 * 64 * 4
    share = experts / done.bytes_before
    assert f"{experts / 1e3:.3g} kB, {share:.0%} of the model" in note and ".experts." in note
    assert verify(tmp_path / "packed") == []
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_tensors_that_the_class_does_not_load_are_said(tmp_path):
    pruned(tmp_path / "dense")
    set_config(tmp_path / "dense", num_hidden_layers=1)
    done = pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    (note,) = (note for note in done.notes if note.startswith("left dense"))
    assert note.startswith("left dense: 7 tensors that the model's class does not load")


def test_gates_of_one_output_stay_dense(tmp_path):
    """As vLLM has them, though pruning has put zeros into them."""
    import transformers

    config = transformers.Qwen2MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
        shared_expert_intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = tiny.prune(transformers.AutoModelForCausalLM.from_config(config), 0.7)
    model.save_pretrained(tmp_path / "dense")
    done = pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert gate not in done.packed and "model.layers.0.mlp.shared_expert.up_proj" in done.packed
    assert ModelDir(tmp_path / "packed").headers[f"{gate}.weight"].shape == (1, 64)


def test_linears_of_a_derived_class_are_packed(tmp_path):
    """Falcon's, whose forward is another that computes the same; vLLM needs its qkv dense."""
    import transformers

    config = transformers.FalconConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=96, bias=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = tiny.prune(transformers.AutoModelForCausalLM.from_config(config), 0.7).eval()
    model.save_pretrained(tmp_path / "dense")
    done = pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    assert len(done.packed) == 3 and not [n for n in done.packed if "query_key_value" in n]
    assert [n for n in done.notes if n.startswith("left dense, as vLLM") and "h.0.self" in n]
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        torch.testing.assert_close(back(tiny.tokens()).logits, model(tiny.tokens()).logits)
