"""W4A16 and W8A16 models of compressed-tensors are packed bit for bit, others refused."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.tools.pack import pack
from wexpand_plugin.tools.verify import verify


def quantised(path, **changes):
    """A tiny model, quantised by llm-compressor without calibration data."""
    pytest.importorskip("llmcompressor")
    from llmcompressor import oneshot

    weights = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=8)
    scheme = {"targets": ["Linear"], "weights": weights | changes}
    tiny.dense("qwen2", torch.bfloat16, intermediate_size=56).save_pretrained(path.with_name("d"))
    recipe = {"s_stage": {"s_modifiers": {"QuantizationModifier": {
        "ignore": ["lm_head"], "config_groups": {"group_0": scheme}}}}}  # fmt: skip
    file = path.with_name("recipe.yaml")
    file.write_text(json.dumps(recipe))
    oneshot(model=str(path.with_name("d")), recipe=str(file), output_dir=str(path))
    return path


@pytest.mark.parametrize(
    "changes",
    [{}, {"group_size": 40, "strategy": "group", "num_bits": 8}, {"strategy": "channel"}],
    ids=["int4 groups", "int8 groups", "int4 channels"],
)
def test_the_same_weights_bit_for_bit(tmp_path, changes):
    if changes.get("strategy") == "channel":
        changes = changes | {"group_size": None}
    if changes.get("group_size") == 40:
        changes = changes | {"group_size": 8}
    source = quantised(tmp_path / "q", **changes)
    done = pack(source, tmp_path / "packed", quiet=True)
    assert len(done.packed) == 14 and not done.errors
    assert verify(tmp_path / "packed") == []
    ours = ModelDir(tmp_path / "packed")
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    for name, entry in ours.config.linears.items():
        assert entry.values == ("int8" if changes.get("num_bits") == 8 else "int4")
        assert entry.nnz == entry.versions * entry.in_features
        scale = ModelDir(source).read(f"{name}.weight_scale")
        assert torch.equal(ours.read(f"{name}.weight_scale").to(scale.dtype), scale)
    ids = tiny.tokens()
    difference = (theirs(ids).logits - loaded(ids).logits).abs().max()
    assert difference < 2e-2  # theirs are rounded to bfloat16 on the way


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symmetric": False}, "asymmetric"),
        ({"num_bits": 3}, "weights of 3 bits"),
        ({"actorder": "group"}, "columns are reordered"),
        ({"type": "float", "num_bits": 8}, "type 'float'"),
    ],
)
def test_what_cannot_be_packed_exactly_is_refused(tmp_path, change, message):
    source = quantised(tmp_path / "q")
    values = json.loads((source / "config.json").read_text())
    groups = values["quantization_config"]["config_groups"]
    groups["group_0"]["weights"] |= change
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(WexpandError, match=message):
        pack(source, tmp_path / "packed", quiet=True)
    assert not (tmp_path / "packed").exists()


def test_integers_are_not_rounded_again(tmp_path):
    with pytest.raises(WexpandError, match="integers already"):
        pack(quantised(tmp_path / "q"), tmp_path / "packed", values="int4", quiet=True)


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("weight_scale", lambda t: -t, "weight_scale: holds NaN, infinite or negative scales"),
        ("weight_scale", lambda t: t[:3], r"weight_scale: \[3, 5\] are not so many scales"),
        ("weight_scale", lambda t: t[:, :0], "are not so many scales for each of 56 rows"),
        ("weight_scale", lambda t: t[:, :3], "groups of their 40 columns are equally wide"),
        ("weight_shape", lambda t: t[:1], r"weight_shape: \[56\] should be \[56, 40\]"),
        ("weight_shape", lambda t: t - 1, r"weight_shape: \[55, 39\] should be \[56, 40\]"),
        ("weight_packed", lambda t: t[0], "weight_packed: .* holds no"),
        ("weight_packed", lambda t: t.float(), "weight_packed: .* holds no"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(tmp_path, part, damage, message):
    from safetensors.torch import load_file, save_file

    source = quantised(tmp_path / "q")
    file, name = source / "model.safetensors", f"model.layers.1.mlp.up_proj.{part}"
    tensors = load_file(file)
    tensors[name] = damage(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WexpandError, match=message):
        pack(source, tmp_path / "packed", quiet=True)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
         "transforms inputs"),
        ({"config_groups": [1]}, "config_groups: should be an object"),
        ({"config_groups": {"a": {"weights": "int4", "format": "pack-quantized"}}},
         "weights 'int4' should be an object"),
    ],
)  # fmt: skip
def test_configs_that_say_something_else(tmp_path, change, message):
    source = quantised(tmp_path / "q")
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] |= change
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(WexpandError, match=message):
        pack(source, tmp_path / "packed", quiet=True)
