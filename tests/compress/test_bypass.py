"""Calibration runs that are left out, and when they are not."""

import pytest
import torch
import transformers
from test_modifier import calibration, run, tiny

from wexpand_plugin.compress.bypass import Bypass

MLP = transformers.models.llama.modeling_llama.LlamaMLP


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """Gets a number for each run of an MLP."""
    found, own = list[int](), MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: found.append(len(x)) or own(self, x))
    return found


def compress(path, **values):
    torch.manual_seed(0)
    keys = dict(num_experts=2, targets=["re:.*mlp.*"], data=calibration(8))
    return run(path, **keys | values).state_dict()


def test_leaving_runs_out_changes_nothing(tmp_path, monkeypatch, count):
    path = tiny("Llama", tmp_path / "dense")
    found = compress(path)
    fewer = len(count)
    monkeypatch.setattr(Bypass, "expanded", lambda *_: None)
    expected = compress(path)
    assert len(count) - fewer == fewer + 8 - 1, "the second block's, but for its first batch"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_blocks_that_are_calibrated_together_run(tmp_path, count):
    from llmcompressor import oneshot
    from tiny import tokenizer

    from wexpand_plugin.compress.modifier import SparseExpansionModifier

    path, data = tiny("Llama", tmp_path / "dense"), calibration(8)
    calls = []
    for propagate, together in ((True, 2), (False, 1)):
        torch.manual_seed(0)
        count.clear()
        recipe = SparseExpansionModifier(
            sparsity=0.6, num_experts=2, targets=["re:.*mlp.*"], router_restarts=1
        )
        oneshot(
            model=str(path), dataset=data, recipe=[recipe], num_calibration_samples=8,
            max_seq_length=64, processor=tokenizer(), propagate_error=propagate,
            sequential_targets_per_subgraph=together,
        )  # fmt: skip
        calls.append(len(count))
    # without propagation 2 x 8 runs fewer, and no other
    assert calls[0] - calls[1] == 16
