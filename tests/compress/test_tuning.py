"""Block tuning inside a run: smaller error of the model's outputs, at the same bytes."""

import pytest
import torch
from test_modifier import logits, run, tiny
from transformers import AutoModelForCausalLM

from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.verify import verify

SLOW = pytest.mark.slow


def routed(model) -> list[RoutedLinear]:
    return [module for module in model.modules() if isinstance(module, RoutedLinear)]


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        (dict(num_experts=1), 0.95),
        (dict(num_experts=1, values="int4", value_group=16, sparsity=0.5), 0.95),
        (dict(num_experts=3, size_budget=1.2, budget_scope="layer"), 0.95),
        # little is lost that scales could win back
        pytest.param(dict(num_experts=1, values="int4", sparsity=0.0), 1.05, marks=SLOW),
        pytest.param(dict(num_experts=1, mask_structure="2:4", sparsity=0.5), 0.97, marks=SLOW),
        pytest.param(dict(num_experts=3), 0.95, marks=SLOW),
    ],
    ids=str,
)
def test_comes_closer_to_the_dense_model_at_the_same_bytes(tmp_path, keys, factor):
    path = tiny("Qwen2", tmp_path / "dense")
    dense = logits(AutoModelForCausalLM.from_pretrained(path))
    keys = {"sparsity": 0.6, "targets": ["re:.*mlp.*", "re:.*q_proj"]} | keys
    errors, sizes = {}, {}
    for epochs in (0, 6):
        torch.manual_seed(0)
        out = tmp_path / f"out{epochs}"
        model = run(path, out, tune_epochs=epochs, **keys)
        errors[epochs] = float((logits(model) - dense).norm() / dense.norm())
        sizes[epochs] = sum(m.stored_bytes() for m in routed(model))
        assert verify(out) == []
        loaded = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    recorded = inspect(tmp_path / "out6").made_by["tuned"]
    assert len(recorded) == model.config.num_hidden_layers
    assert all(after <= before for before, after in recorded.values())
    assert "tuned" not in inspect(tmp_path / "out0").made_by
    assert errors[6] < factor * errors[0]
    assert sizes[6] == pytest.approx(sizes[0], rel=0.05)


def test_masks_stay(tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    masks = []
    for epochs in (0, 2):
        torch.manual_seed(0)
        model = run(path, tune_epochs=epochs, num_experts=1, targets=["re:.*layers.0.mlp.up_proj"])
        masks.append([m.weight_mask for m in routed(model)])
    assert len(masks[0]) == 1 and torch.equal(masks[0][0], masks[1][0])


def test_a_run_that_explodes_keeps_what_was_solved(tmp_path, caplog):
    path = tiny("Llama", tmp_path / "dense")
    plain, wild = [], []
    for found, epochs in ((plain, 0), (wild, 3)):
        torch.manual_seed(0)
        model = run(path, tune_epochs=epochs, tune_lr=1e30, num_experts=1, targets=["re:.*mlp.*"])
        found.extend(m.pool.rows() for m in routed(model))
    for a, b in zip(plain, wild, strict=True):
        torch.testing.assert_close(a, b)
