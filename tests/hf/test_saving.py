"""Saving: whole or not at all, and read back before it is called done."""

import copy
import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from hf_models import load, logits

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format import writer
from wexpand_plugin.format.model_dir import CHECKSUMS, ModelDir
from wexpand_plugin.hf import saving
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.hf.saving import wrap_save_pretrained


def test_a_model_that_no_reader_would_take_is_not_saved(tmp_path):
    """As when another library has unrolled experts that the model's class holds as one tensor."""
    model = tiny.expand(tiny.dense())
    wrap_save_pretrained(model, {})
    mlp = model.model.layers[1].mlp
    mlp.unrolled = copy.deepcopy(mlp.up_proj)
    assert isinstance(mlp.unrolled, RoutedLinear)
    with pytest.raises(WexpandError, match="out: not saved, .*layers.1.mlp.unrolled should be a"):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    del mlp.unrolled
    model.save_pretrained(tmp_path / "out")


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    model = tiny.expanded(tmp_path / "a")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "seal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_interrupted_while_moving_has_no_config(tmp_path, monkeypatch):
    """Over an older model: once files start to change, there is no config.json until the end."""
    model = tiny.expanded(tmp_path / "a")
    real = os.replace

    def replace(source, target):
        if Path(target) == tmp_path / "a" / "model.safetensors":
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(writer.os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "config.json").exists()
    assert not [p for p in (tmp_path / "a").iterdir() if p.is_dir()]


def test_saving_over_an_older_model_replaces_its_shards(tmp_path):
    model = tiny.expanded(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="20kB")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "notes.txt",
        CHECKSUMS,
    ]  # fmt: skip
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))


def test_refuses_to_save_where_it_would_mix(tmp_path):
    model = tiny.expanded(tmp_path / "a")
    with pytest.raises(WexpandError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "b", push_to_hub=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(WexpandError, match="adapter.safetensors"):
        model.save_pretrained(tmp_path / "c")
    (tmp_path / "d").write_text("")
    with pytest.raises(WexpandError, match="is a file"):
        model.save_pretrained(tmp_path / "d")


def test_wrapping(tmp_path):
    """Once is enough, other wrappers keep working, copies save themselves."""
    model = tiny.expanded(tmp_path / "a")
    function = model.save_pretrained.__func__
    saving.wrap_save_pretrained(model, {"made": "later"})
    assert model.save_pretrained.__func__ is function

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.fill_(3)
    other.save_pretrained(tmp_path / "b")
    assert load(tmp_path / "b").model.norm.weight.unique().tolist() == [3]
    assert ModelDir(tmp_path / "b").config.made_by == {"made": "later"}

    plain = tiny.dense()
    saving.wrap_save_pretrained(plain, {})
    plain.save_pretrained(tmp_path / "c")
    assert "quantization_config" not in json.loads((tmp_path / "c" / "config.json").read_text())


def test_another_wrapper_outside(tmp_path):
    """llm-compressor wraps what it finds, copies its attributes, and rewrites config.json."""
    from functools import wraps

    model = tiny.expanded(tmp_path / "a")
    inner = model.save_pretrained

    @wraps(inner.__func__)
    def outer(directory, save_compressed=True, **kwargs):
        inner.__func__.__get__(model, type(model))(directory, **kwargs)
        values = json.loads((Path(directory) / "config.json").read_text())
        values.pop("quantization_config")
        (Path(directory) / "config.json").write_text(json.dumps(values))
        (Path(directory) / "recipe.yaml").write_text("")

    outer._overridden = True
    model.save_pretrained = outer
    saving.wrap_save_pretrained(model, {"made": "again"})
    assert model.save_pretrained._overridden
    model.save_pretrained(tmp_path / "b", save_compressed=True)
    assert (tmp_path / "b" / "recipe.yaml").exists()
    assert ModelDir(tmp_path / "b").config.made_by == {"made": "again"}
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))
