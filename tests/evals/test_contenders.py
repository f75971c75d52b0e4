"""The models that the serving benchmark compares are what their names say."""

import pytest
import torch
from safetensors.torch import load_file

from evals.bench.contenders import contender
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.pack import pack
from wexpand_plugin.tools.synth import Shape
from wexpand_plugin.tools.verify import verify

SHAPE = Shape(hidden=128, ffn=256, layers=1, heads=2, vocab=300)
LINEAR = "model.layers.0.mlp.gate_proj"


def make(name, folder):
    return contender(name, folder, SHAPE, "bfloat16", None)


@pytest.mark.parametrize(
    ("name", "sparsity", "values"),
    [
        ("int4", 0, "int4"),
        ("80% bfloat16", 0.8, "bfloat16"),
        ("50% int4, 16 experts, size 0.5", 0.5, "int4"),
    ],
)
def test_ours(tmp_path, name, sparsity, values):
    found = make(name, tmp_path)
    assert verify(found.path) == []
    entry = ModelDir(found.path).config.linears[LINEAR]
    assert entry.values == values
    seen = inspect(found.path)
    assert seen.sparsity == pytest.approx(sparsity, abs=0.01)
    if "experts" in name:
        assert 0.45 < seen.linear_bytes / seen.dense_bytes <= 0.5


def test_vllms_own(tmp_path):
    """Each is the dense model within half a step; what reads W4A16 reads it bit for bit."""
    dense = load_file(make("dense", tmp_path).path / "model.safetensors")
    weight = dense[f"{LINEAR}.weight"].float()
    for name, largest in (("W8A8", 127), ("W4A16", 7)):
        path = make(name, tmp_path).path
        stored = load_file(path / "model.safetensors")
        assert torch.equal(stored["lm_head.weight"], dense["lm_head.weight"])
        if name == "W4A16":
            pack(path, tmp_path / "packed", quiet=True)
            found = ModelDir(tmp_path / "packed").linear(LINEAR).pool.expert(0)
        else:
            found = stored[f"{LINEAR}.weight"] * stored[f"{LINEAR}.weight_scale"].float()
        step = weight.abs().amax() / largest
        assert 0.1 * step < (found - weight).abs().max() < 0.6 * step


def test_without_llama_there_are_no_rows_of_llama(tmp_path):
    assert make("Q4_0", tmp_path) is None


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="contender: 'Q5' is not like one of dense, 50% int4"):
        make("Q5", tmp_path)
