"""Tuning through the whole model: closer to the dense model's predictions, at the same bytes."""

import pytest
import tiny as models
import torch
from llmcompressor import oneshot
from test_modifier import calibration, logits, run, tiny
from test_tuning import routed
from transformers import AutoModelForCausalLM

from wexpand_plugin.compress import whole
from wexpand_plugin.compress.modifier import SparseExpansionModifier
from wexpand_plugin.compress.scoring import NeuronScoringModifier
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.method.settings import Settings
from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.verify import verify

SLOW = pytest.mark.slow


def divergence(model, dense: torch.Tensor) -> float:
    found, expected = logits(model).log_softmax(-1), dense.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize(
    "kind, keys",
    [
        ("Llama", dict(num_experts=1, tune_epochs=2)),
        pytest.param(
            "GPTNeoX", dict(num_experts=1, values="int4", value_group=16, sparsity=0.5),
            marks=SLOW,
        ),
        pytest.param("Qwen2", dict(num_experts=3, size_budget=1.2), marks=SLOW),
        pytest.param("OPT", dict(num_experts=1, num_clusters=4), marks=SLOW),
        pytest.param(
            "Mistral", dict(num_experts=1, mask_structure="2:4", sparsity=0.5), marks=SLOW
        ),
    ],
)
def test_predicts_more_like_the_dense_model_at_the_same_bytes(tmp_path, kind, keys):
    path = tiny(kind, tmp_path / "dense")
    dense = logits(AutoModelForCausalLM.from_pretrained(path))
    found, sizes = {}, {}
    for epochs in (0, 8):
        torch.manual_seed(0)
        out = tmp_path / f"out{epochs}"
        model = run(path, out, tune_model_epochs=epochs, tune_model_lr=0.01, **keys)
        found[epochs] = divergence(model, dense)
        sizes[epochs] = sum(m.stored_bytes() for m in routed(model))
        assert verify(out) == []
        loaded = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert found[8] < 0.97 * found[0], (found[8], found[0])
    assert sizes[8] == pytest.approx(sizes[0], rel=0.05)
    before, after = inspect(tmp_path / "out8").made_by["tuned_model"]
    assert after < before


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_the_head_gives_what_the_dense_model_predicts(kind):
    """From the dense model's states after a block, whatever became of the blocks before it."""
    model = models.dense(kind)
    blocks = list(model.get_submodule("model.layers" if kind == "llama" else "gpt_neox.layers"))
    head, batch, states = model.get_output_embeddings(), {"input_ids": models.tokens()}, []
    watch = blocks[0].register_forward_hook(
        lambda _module, _args, y: states.append(y[0] if isinstance(y, tuple) else y)
    )
    with torch.no_grad():
        expected = model(**batch).logits
        watch.remove()
        for parameter in blocks[0].parameters():
            parameter.mul_(1.5)
        own = model(**batch).logits
        read = whole._read(model, head, blocks[0], batch, states[0])
        with whole._beside(head, read):
            found, dense = whole.run(model, batch).chunk(2)
        assert not torch.allclose(own, expected, rtol=1e-2)
        torch.testing.assert_close(dense, expected)
        torch.testing.assert_close(found, own)
        torch.testing.assert_close(model(**batch).logits, own)


def test_blocks_without_targets_between_others_are_refused(tmp_path):
    with pytest.raises(WexpandError, match="tune_model_epochs: block 1 lies between others"):
        whole.refuse_gaps(models.dense(), [0, 2])
    whole.refuse_gaps(models.dense(), [1, 2])


def test_another_modifier_that_runs_the_data_in_another_order(tmp_path):
    """Each batch is trained on what the dense model made of this very batch."""
    path = tiny("Llama", tmp_path / "dense")
    keys = dict(sparsity=0.5, num_experts=1, tune_model_epochs=2, targets=["re:.*mlp.*"])
    found = []
    for others in ([], [NeuronScoringModifier(targets=["re:.*self_attn.*"])]):
        torch.manual_seed(0)
        oneshot(
            model=str(path), dataset=calibration(), pipeline="independent", max_seq_length=64,
            recipe=[SparseExpansionModifier(**keys), *others], num_calibration_samples=24,
            output_dir=str(tmp_path / f"{len(others)}"), tokenizer=None,
            processor=models.tokenizer(),
        )  # fmt: skip
        about = inspect(tmp_path / f"{len(others)}").made_by
        found.append((about["tuned_model"], about["data"]))
    assert found[0] == found[1]


def test_dropout_is_off_while_the_whole_model_is_tuned(monkeypatch):
    model = models.expand(models.dense(), experts=1, match="up_proj").train()
    model.model.norm.eval()  # what is not in training stays so
    linears = {name: m for name, m in model.named_modules() if isinstance(m, RoutedLinear)}

    def in_training() -> list[str]:
        return [n for n, m in model.named_modules() if m.training and n not in linears]

    def tune_model(*args, **keys):
        seen.append(in_training())
        return tune(*args, **keys)

    before, seen, tune = in_training(), list[list[str]](), whole.tune_model
    monkeypatch.setattr(whole, "tune_model", tune_model)
    batch = {"input_ids": models.tokens()}
    states = [torch.zeros(*models.tokens().shape, model.config.hidden_size)]
    settings = Settings(sparsity=0.5, num_experts=1, tune_model_epochs=1)
    whole.tune_whole(model, list(model.model.layers), linears, [batch], states, settings)
    assert seen == [[]] and in_training() == before != []
