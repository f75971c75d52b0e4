"""While the recipe calibrates, blocks run with fused attention; otherwise as the model was."""

import pytest
import tiny
import torch
from llmcompressor.utils.helpers import calibration_forward_context

from wexpand_plugin.compress.attention import FusedAttention


def record(monkeypatch) -> list[str]:
    """The attention of each call of a block's, as it runs."""
    from transformers.models.llama import modeling_llama

    seen: list[str] = []
    own = modeling_llama.LlamaAttention.forward

    def forward(self, *args, **kwargs):
        seen.append(self.config._attn_implementation)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    return seen


@pytest.mark.parametrize("loaded, runs", [("sdpa", "sdpa"), ("eager", "eager")])
def test_blocks_run_as_loaded_while_calibration_forces_eager(loaded, runs, monkeypatch):
    model = tiny.dense()
    model.config._attn_implementation = loaded
    blocks, ids = list(model.model.layers), tiny.tokens()
    attention, seen = FusedAttention(blocks), record(monkeypatch)
    with calibration_forward_context(model):
        eager = model.model(ids).last_hidden_state
        attention.hook()
        fused = model.model(ids).last_hidden_state
        assert model.config._attn_implementation == "eager"
        attention.remove()
        model.model(ids)
    assert model.config._attn_implementation == loaded
    count = len(blocks)
    assert seen == ["eager"] * count + [runs] * count + ["eager"] * count
    torch.testing.assert_close(fused, eager)


def test_a_block_that_fails_leaves_the_configuration_as_it_was():
    model = tiny.dense()
    block = model.model.layers[0]
    attention = FusedAttention([block])
    attention.hook()
    with calibration_forward_context(model):
        with pytest.raises(TypeError):
            block()
        assert model.config._attn_implementation == "eager"
