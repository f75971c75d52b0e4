"""Kept values in few bits, from a recipe to a checkpoint that reads back the same."""

import pytest
import torch
import yaml
from test_modifier import logits, run, tiny
from transformers import AutoModelForCausalLM

from wexpand_plugin import SparseExpansionModifier, recipe
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.tools.verify import verify


@pytest.mark.parametrize(
    ("keys", "masked"),
    [
        (dict(values="int4", sparsity=0.0, num_experts=1), False),
        (dict(values="int8", sparsity=0.6), True),
        (dict(values="int3", sparsity=0.0, num_experts=1), False),
        (dict(values="int2", sparsity=0.3), True),
        (dict(values="int4", mask_structure="2:4", sparsity=0.5, num_experts=1), True),
        pytest.param(dict(values="int4", size_budget=0.6), True, id="budget"),
        pytest.param(dict(values="int8", size_budget=0.8, budget_scope="layer"), True, id="layer",
                     marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_compresses_saves_and_reloads_equal(tmp_path, keys, masked, dtype):
    path = tiny("Llama", tmp_path / "dense", dtype)
    model = run(path, tmp_path / "out", **{"value_group": 16} | keys)
    assert verify(tmp_path / "out") == []
    saved = ModelDir(tmp_path / "out").config
    for entry in saved.linears.values():
        assert (entry.values, entry.value_group) == (keys["values"], 16)
        assert entry.dtype == str(dtype).removeprefix("torch.")
        assert (entry.nnz < entry.versions * entry.in_features) == masked
    if budget := keys.get("size_budget"):
        stored = sum(m.stored_bytes() for m in model.modules() if hasattr(m, "row_map"))
        dense = sum(entry.dense_bytes for entry in saved.linears.values())
        assert budget / 2 < stored / dense <= budget
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits(loaded), logits(model), rtol=close, atol=close)


def test_int4_in_full_is_close_to_dense(tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    dense = logits(AutoModelForCausalLM.from_pretrained(path))
    change = {}
    for values in ("int4", "int8"):
        model = run(path, values=values, value_group=32, sparsity=0.0, num_experts=1)
        change[values] = float((logits(model) - dense).norm() / dense.norm())
    assert change["int8"] < 0.05 and change["int4"] < 0.5 and change["int8"] < change["int4"] / 5


@pytest.mark.parametrize("name", ["int4", "int3", "sparse_int4"])
def test_recipes_say_what_they_are_named_for(name):
    stage = yaml.safe_load(open(recipe(name)))
    ((_, modifiers),) = next(iter(stage.values())).items()
    modifier = SparseExpansionModifier(**modifiers["SparseExpansionModifier"])
    assert modifier.values == name.removeprefix("sparse_") and modifier.num_experts == 1
    assert modifier.sparsity == (0.5 if name.startswith("sparse") else 0.0)
