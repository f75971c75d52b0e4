"""verify finds every corruption tried; what it passes, loads."""

import json
import random
import shutil
import sys

import pytest
import tiny
import torch
from corruptions import (
    CORRUPTIONS,
    LOADERS_REFUSE,
    REFUSED,
    corrupted,
    edit_config,
    flip_map,
    flip_mask,
    shards,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import CHECKSUMS, INDEX, ModelDir
from wexpand_plugin.tools.pack import pack
from wexpand_plugin.tools.verify import verify


def test_without_transformers_a_skipped_check_is_said(sound, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert verify(sound) == []
    assert f"{sound}: not checked: whether it fits its model class" in caplog.text


def test_sound(sound, tmp_path):
    assert verify(sound) == []
    tiny.prune(tiny.dense("llama", tie_word_embeddings=True)).save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    assert verify(tmp_path / "packed") == []


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda function: function.__name__)
def test_verify_finds_corruptions(sound, tmp_path, corrupt):
    """9 seeds of each of 23 kinds: 207 corruptions."""
    for seed in range(9):
        path = corrupted(sound, tmp_path / str(seed), corrupt, seed)
        problems = verify(path)
        assert problems, f"{corrupt.__name__}, seed {seed}, was not found"
        assert all(problem and "\n" not in problem for problem in problems)
        shutil.rmtree(path)


@pytest.mark.parametrize("corrupt", LOADERS_REFUSE, ids=lambda function: function.__name__)
def test_loading_refuses_broken_structure(sound, tmp_path, corrupt):
    for seed in range(4):
        path = corrupted(sound, tmp_path / str(seed), corrupt, seed)
        with pytest.raises(REFUSED):
            AutoModelForCausalLM.from_pretrained(path)
        shutil.rmtree(path)


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda function: function.__name__)
def test_loading_never_breaks_otherwise(sound, tmp_path, corrupt):
    """It refuses with a sentence, or gives a model whose outputs are numbers."""
    path = corrupted(sound, tmp_path / "a", corrupt, 100)
    try:
        model = AutoModelForCausalLM.from_pretrained(path)
    except REFUSED:
        return
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    with torch.no_grad():
        assert model(tiny.tokens(1, 5)).logits.shape == (1, 5, tiny.VOCAB)


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda function: function.__name__)
def test_loading_with_verify_finds_what_verify_finds(sound, tmp_path, corrupt, monkeypatch):
    monkeypatch.setenv("WEXPAND_VERIFY", "1")
    path = corrupted(sound, tmp_path / "a", corrupt, 200)
    with pytest.raises(REFUSED):
        AutoModelForCausalLM.from_pretrained(path)


def meaning(content: bytes):
    """What a file says: JSON but for white space, of an index where tensors lie; or a safetensors
    file, but for white space in its header."""
    try:
        if content[:1] == b"{":
            values = json.loads(content)
            return values["weight_map"] if "weight_map" in values else values
        size = int.from_bytes(content[:8], "little")
        return size, json.loads(content[8 : 8 + size]), bytes(content[8 + size :])
    except ValueError:
        return object()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_byte_of_any_file(sound, tmp_path_factory, data):
    """Whatever byte of a file changes: found, and never another exception."""
    path = tmp_path_factory.mktemp("byte") / "model"
    shutil.copytree(sound, path)
    named = [path / "config.json", path / CHECKSUMS, path / INDEX]
    file = data.draw(st.sampled_from([*named, *shards(path)]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    harmless = meaning(content) == meaning(file.read_bytes())
    file.write_bytes(content)
    if not verify(path):
        assert harmless
        AutoModelForCausalLM.from_pretrained(path)  # what verifies, loads
    shutil.rmtree(path)


def test_loading_refuses_more_layers_than_there_are(sound, tmp_path):
    """transformers alone would only warn, and start them with random weights."""
    path = corrupted(sound, tmp_path / "a", lambda path, rng: None, 0)

    def more(values):
        values |= {"num_hidden_layers": 3}
        values.pop("layer_types", None)

    edit_config(path, more)
    with pytest.raises(WexpandError, match="layers.2.*missing"):
        AutoModelForCausalLM.from_pretrained(path)


def test_verify_names_each_problem(sound, tmp_path):
    """In files and tensors; each one's damage, and what that breaks."""
    path = tmp_path / "a"
    shutil.copytree(sound, path)
    names = [flip_mask(path, random.Random(1)), flip_map(path, random.Random(2))]
    files = {name: header.file for name, header in ModelDir(path).headers.items()}
    problems = verify(path)
    for name in names:
        assert any(p.startswith(f"{files[name]}: {name}: damaged: ") for p in problems)
    assert len(problems) <= 4 and all("damaged" in p or "rows keep" in p or "row versions" in p
                                      for p in problems)  # fmt: skip


def test_verify_of_other_directories(tmp_path):
    tiny.dense().save_pretrained(tmp_path / "dense")
    assert "not a model that wexpand wrote" in verify(tmp_path / "dense")[0]
    assert "there is no such file" in verify(tmp_path / "missing")[0]
