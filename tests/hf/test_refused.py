"""What transformers is kept from loading: damaged checkpoints, and flipped bytes if asked."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from hf_models import load, quantise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format import model_dir
from wexpand_plugin.format.model_dir import CHECKSUMS, ModelDir
from wexpand_plugin.format.values import codec
from wexpand_plugin.hf import saving


def test_refuses_names_and_sizes_that_do_not_fit(tmp_path):
    tiny.expanded(tmp_path / "a")
    name = "model.layers.0.mlp.up_proj"
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    values["intermediate_size"] = 60
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WexpandError, match=r"layers.0.mlp.*should be \(40, 60, False\)"):
        load(tmp_path / "a")
    values["intermediate_size"] = tiny.FFN
    values["vocab_size"] = 90
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WexpandError, match=r"weight: shape \[96, 40\] should be \[90, 40\]"):
        load(tmp_path / "a")
    values["vocab_size"] = tiny.VOCAB
    values["num_hidden_layers"] = 1
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WexpandError, match="model.layers.1.mlp.*should be a linear"):
        load(tmp_path / "a")
    values["num_hidden_layers"] = 2
    group = values["quantization_config"]["groups"][0]
    group["tokens"][0] += 1
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WexpandError, match="changed after it was written"):
        load(tmp_path / "a")
    group["linears"][name]["nnz"] -= 1
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WexpandError, match=r"elements \d+ should be"):
        load(tmp_path / "a")


def test_refuses_missing_and_broken_tensors(tmp_path):
    """By structure: what a reader cannot use. Checksums are compared where asked for."""
    tiny.expanded(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    good = load_file(file)

    def attempt(tensors, match):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(WexpandError, match=match):
            load(tmp_path / "a")

    name, norm = "model.layers.1.mlp.up_proj", "model.norm.weight"
    mask = f"{name}.weight_mask"
    attempt({n: t for n, t in good.items() if n != mask}, f"{mask}: missing")
    attempt({n: t for n, t in good.items() if n != norm}, f"{norm}: missing")
    attempt(good | {mask: good[mask][1:]}, f"model.safetensors: {mask}: shape")
    attempt(good | {mask: good[mask].int()}, f"model.safetensors: {mask}: dtype torch.int32")
    attempt(good | {mask: good[mask] & 127}, f"{mask}: rows keep")
    attempt(good | {f"{name}.row_map": good[f"{name}.row_map"] + 1}, f"{name}.row_map: its neurons")
    attempt(good | {f"{name}.weight": good[f"{name}.weight"] / 0}, f"{name}.weight: holds NaN")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(WexpandError, match="model.safetensors: not a complete safetensors file"):
        load(tmp_path / "a")


@pytest.mark.parametrize("kind", ["router_bias", "router_weight", "weight_scale"])
def test_refuses_what_would_misroute_or_misscale(tmp_path, kind):
    model = tiny.expand(tiny.dense())
    quantise(model, codec("int8", 8))
    saving.wrap_save_pretrained(model, {})
    model.save_pretrained(tmp_path / "a")
    file, name = tmp_path / "a" / "model.safetensors", f"model.layers.0.mlp.up_proj.{kind}"
    tensors = load_file(file)
    tensors[name].view(-1)[1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WexpandError, match=f"{name}: holds NaN"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("cluster_expert", 2, "2 is not 0 to 1, an expert of the linear"),
        ("cluster_bias_scale", float("nan"), "holds NaN, infinite or negative scales"),
    ],
)
def test_refuses_clusters_that_cannot_be(tmp_path, kind, value, problem):
    tiny.expanded(tmp_path / "a", experts=2, clusters=6)
    file, name = tmp_path / "a" / "model.safetensors", f"model.layers.0.mlp.gate_proj.{kind}"
    tensors = load_file(file)
    tensors[name][1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WexpandError, match=f"{name}: {problem}"):
        load(tmp_path / "a")


def test_refuses_the_layout_before_the_first_release(tmp_path):
    tiny.expanded(tmp_path / "a")
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    groups = values["quantization_config"].pop("groups")
    values["quantization_config"]["linears"] = groups[0]["linears"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    with pytest.raises(WexpandError, match="lists linears without input groups, a layout from"):
        load(tmp_path / "a")


def flipped(path: Path, name: str) -> Path:
    """Change the lowest bit of a tensor's first byte."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_flipped_byte_is_found_where_it_is_asked_for(tmp_path, monkeypatch, name):
    tiny.expanded(tmp_path / "a")
    monkeypatch.setenv("WEXPAND_VERIFY", "1")
    load(tmp_path / "a")
    flipped(tmp_path / "a", name)
    with pytest.raises(WexpandError, match=f"model.safetensors: {name}: damaged: its checksum"):
        load(tmp_path / "a")
    (tmp_path / "a" / CHECKSUMS).unlink()
    with pytest.raises(WexpandError, match=f"{CHECKSUMS}: there is no such file"):
        load(tmp_path / "a")
    for value in ("0", ""):
        monkeypatch.setenv("WEXPAND_VERIFY", value)
        load(tmp_path / "a")
    monkeypatch.delenv("WEXPAND_VERIFY")
    load(tmp_path / "a")


def test_every_tensor_is_read_once(tmp_path, monkeypatch):
    """By transformers; ours reads headers, and the tensors only where checksums are asked for."""
    tiny.expanded(tmp_path / "a")
    read = []

    class Counted:
        def __init__(self, *args, **kwargs):
            self.inner = safe_open(*args, **kwargs)

        def __enter__(self):
            self.inner.__enter__()
            return self

        def __exit__(self, *args):
            return self.inner.__exit__(*args)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def get_tensor(self, name):
            read.append(name)
            return self.inner.get_tensor(name)

    monkeypatch.setattr(model_dir, "safe_open", Counted)
    load(tmp_path / "a")
    assert read == []
    monkeypatch.setenv("WEXPAND_VERIFY", "1")
    load(tmp_path / "a")
    assert sorted(read) == sorted(ModelDir(tmp_path / "a").headers)
