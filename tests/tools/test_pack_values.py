"""pack with values: what is kept is rounded, and what that costs is said."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.tools.pack import pack
from wexpand_plugin.tools.verify import verify


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("values", ["int8", "int5", "int4", "int2"])
def test_rounding_says_what_it_costs(tmp_path, values, sparsity):
    shape = dict(hidden_size=64, intermediate_size=172)
    tiny.prune(tiny.dense(**shape), sparsity).save_pretrained(tmp_path / "dense")
    done = pack(tmp_path / "dense", tmp_path / "packed", values=values, value_group=32, quiet=True)
    assert verify(tmp_path / "packed") == [] and done.errors.keys() == done.packed.keys()
    model = ModelDir(tmp_path / "packed")
    before = load_file(tmp_path / "dense" / "model.safetensors")
    for name, entry in model.config.linears.items():
        assert (entry.values, entry.value_group, entry.dtype) == (values, 32, "float32")
        assert (entry.nnz < entry.versions * entry.in_features) == (sparsity > 0)
        weight, pool = before[f"{name}.weight"], model.linear(name).pool
        error = float((pool.rows() - weight).norm() / weight.norm())
        assert done.errors[name] == pytest.approx(error, rel=1e-4)
        assert error < {"int8": 0.01, "int5": 0.1, "int4": 0.2, "int2": 0.5}[values]
        # no worse than scales that reach the largest weight
        plain = RowPool.pack(weight, keep=torch.ones_like(weight).bool(), codec=entry.codec)
        assert error < 1.001 * float((plain.rows() - weight).norm() / weight.norm())
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(tiny.tokens())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(values="int7"), "values: 'int7' should be int8 or int6 or int5 or int4"),
        (dict(values="bfloat16"), "values: 'bfloat16' should be int8 or int6"),
        (dict(values="int4", value_group=12), "value_group: 12 should be a multiple of 8"),
        (dict(values="int4", value_group=0), "value_group: 0 should be"),
    ],
)
def test_impossible_values_are_refused_before_work(tmp_path, how, message):
    with pytest.raises(WexpandError, match=message):
        pack(tmp_path / "nowhere", tmp_path / "packed", quiet=True, **how)


def test_one_scale_a_row_however_wide_the_group(tmp_path):
    tiny.prune(tiny.dense()).save_pretrained(tmp_path / "dense")
    for name, group in (("row", 56), ("wide", 1 << 20)):
        pack(tmp_path / "dense", tmp_path / name, values="int4", value_group=group, quiet=True)
        assert verify(tmp_path / name) == []
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name)(tiny.tokens()).logits
        for name in ("row", "wide")
    )
    assert torch.equal(one, other)
    with pytest.raises(WexpandError, match="value_group: 10000000 should be at most"):
        pack(tmp_path / "dense", tmp_path / "no", values="int4", value_group=10**7, quiet=True)


def test_weights_that_no_scale_of_16_bits_reaches(tmp_path):
    tiny.prune(tiny.dense()).save_pretrained(tmp_path / "dense")
    file, name = tmp_path / "dense" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(file)
    tensors[f"{name}.weight"][3, 4] = 1e7
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WexpandError, match=f"{name}.weight_scale: holds NaN, infinite"):
        pack(tmp_path / "dense", tmp_path / "packed", values="int4", quiet=True)
    assert not (tmp_path / "packed").exists()
