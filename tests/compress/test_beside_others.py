"""What other modifiers of a recipe do beside ours, and what a run keeps meanwhile."""

import gc
import weakref

import pytest
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from test_modifier import calibration, logits, tiny
from tiny import dense, tokenizer

from wexpand_plugin.compress import modifier
from wexpand_plugin.compress.modifier import SparseExpansionModifier
from wexpand_plugin.compress.packing import PackModifier
from wexpand_plugin.compress.progress import resumable
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.tools.inspect import inspect

ATTENTION, MLP = ["re:.*self_attn.*"], ["re:.*mlp.*"]
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
INT3 = dict(sparsity=0.0, values="int3", value_group=32, block_size=32, num_experts=1)


def ours(**keys) -> SparseExpansionModifier:
    return SparseExpansionModifier(**{"targets": ["Linear"], "ignore": ["lm_head"]} | keys)


def apply(model, recipe, **arguments):
    torch.manual_seed(0)
    return oneshot(
        model=str(model), dataset=calibration(), recipe=recipe, processor=tokenizer(),
        tokenizer=None, max_seq_length=64, num_calibration_samples=24, **arguments,
    )  # fmt: skip


def error(model, path) -> float:
    right = logits(transformers.AutoModelForCausalLM.from_pretrained(path))
    return float((logits(model) - right).norm() / right.norm())


@pytest.fixture
def outlying(tmp_path):
    """A model of whose inputs some are large, so that smoothing them matters."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("Llama", tmp_path / "dense"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::8] *= 20
            layer.post_attention_layernorm.weight[::8] *= 20
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("keys", [INT3, dict(sparsity=0.5, num_experts=2)], ids=["one", "experts"])
def test_blocks_that_are_done_are_let_go_of(tmp_path, monkeypatch, keys):
    """Their dense linears, and the inputs that were recorded, but for the block that comes next."""
    dense(num_hidden_layers=4).save_pretrained(tmp_path)
    alive: list[int] = []
    recorded: list[int] = []
    linears: list[weakref.ref] = []
    end, replays = SparseExpansionModifier.on_sequential_epoch_end, weakref.WeakSet()

    def ended(self, *args, **kwargs):
        if not linears:
            linears.extend(weakref.ref(target.linear) for target in self._targets.values())
            replays.update(self._replays.values())
        end(self, *args, **kwargs)
        gc.collect()
        alive.append(sum(linear() is not None for linear in linears))
        recorded.append(sum(len(replay.cache) for replay in replays))

    monkeypatch.setattr(SparseExpansionModifier, "on_sequential_epoch_end", ended)
    apply(tmp_path, [ours(**keys)])
    assert alive[-1] <= 7 and alive == sorted(alive, reverse=True)
    assert max(recorded) <= 2 * 24


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ([QuantizationModifier(targets=ATTENTION, scheme="FP8_DYNAMIC"), ours(targets=MLP, **INT3)],
         "self_attn.q_proj: another modifier of the recipe quantises it"),
        ([ours(targets=MLP, **INT3), QuantizationModifier(targets=ATTENTION, scheme="W4A16")],
         "self_attn.q_proj: another modifier of the recipe quantises it"),
        ([SparseGPTModifier(sparsity=0.6, targets=["Linear"], ignore=["lm_head"]),
          QuantizationModifier(targets=MLP, scheme="FP8_DYNAMIC"), PackModifier()],
         "mlp.gate_proj: another modifier of the recipe quantises it"),
        ([QuantizationModifier(kv_cache_scheme=FP8_CACHE), ours(targets=MLP, **INT3)],
         "self_attn: another modifier of the recipe quantises it"),
        ([QuIPModifier(rotations=["v"], transform_type="random-hadamard"),
          ours(targets=MLP, **INT3)],
         "transforms inputs or outputs while the model runs"),
    ],
    ids=["before", "after", "pack", "cache", "transform"],
)  # fmt: skip
def test_what_a_checkpoint_could_not_hold_is_refused(tmp_path, recipe, problem):
    recipe = [modifier.model_copy(deep=True) for modifier in recipe]
    with pytest.raises(WexpandError, match=problem):
        apply(tiny("Llama", tmp_path), recipe)


def test_transforms_that_weights_take_up_are_fine(tmp_path):
    path = tiny("Llama", tmp_path)
    turned = SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")
    alone = error(apply(path, [turned.model_copy(deep=True)]), path)
    both = apply(path, [turned, ours(**INT3 | {"values": "int8"})])
    assert error(both, path) < alone + 0.05


@pytest.mark.parametrize("keys", [INT3, INT3 | {"num_clusters": 4}], ids=["one", "clusters"])
def test_inputs_that_are_smoothed_in_the_same_pass(outlying, keys):
    """At the end of a pass that both are calibrated in, the other's changes come first."""
    found = {
        pipeline: error(apply(outlying, [SmoothQuantModifier(smoothing_strength=0.5), ours(**keys)],
                              pipeline=pipeline), outlying)
        for pipeline in ("independent", "sequential")
    }  # fmt: skip
    assert found["sequential"] < 1.03 * found["independent"], found


@pytest.mark.parametrize(
    "keys", [INT3, dict(sparsity=0.5, num_experts=2)], ids=["one", "experts"]
)
def test_two_of_ours_in_one_pass(tmp_path, keys):
    path = tiny("Llama", tmp_path / "dense")
    keys = keys | {"tune_epochs": 1}
    both = [ours(targets=ATTENTION, **keys), ours(targets=MLP, **keys)]
    model = apply(path, both, pipeline="sequential", output_dir=str(tmp_path / "out"))
    assert error(model, path) < 1
    about = inspect(tmp_path / "out").made_by
    assert about["targets"] == MLP and [old["targets"] for old in about["before"]] == [ATTENTION]
    assert len(about["before"][0]["tuned"]) == 2


def test_blocks_that_are_parts_of_layers(tmp_path):
    """What one gives is not what the next one reads: its own inputs stand for the dense ones."""
    path, parts = tiny("Llama", tmp_path), ["LlamaMLP"]
    found = [
        error(apply(path, [ours(**INT3 | {"targets": MLP, "tune_epochs": n})],
                    sequential_targets=parts), path)
        for n in (0, 4)
    ]  # fmt: skip
    assert found[1] < found[0], found
    with pytest.raises(WexpandError, match="block 1 does not read what block 0 gives"):
        apply(path, [ours(**INT3 | {"targets": MLP, "tune_model_epochs": 1})],
              sequential_targets=parts)  # fmt: skip


def test_all_blocks_that_are_calibrated_at_once(tmp_path):
    """The next block has then read what the dense one gave."""
    path = tiny("Llama", tmp_path)
    found = [
        error(apply(path, [ours(**INT3, tune_model_epochs=n)], pipeline="basic"), path)
        for n in (0, 4)
    ]
    assert found[1] < found[0], found


class Fails(Modifier):
    """As a later modifier may."""

    requires_calibration_data: bool = True

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_start(self, state, event, **kwargs):
        raise ValueError("no")


def test_a_model_whose_run_failed_is_not_trained_later(tmp_path, monkeypatch):
    path = tiny("Llama", tmp_path)
    monkeypatch.setattr(modifier, "tune_whole", lambda *args: pytest.fail("trains it"))
    with pytest.raises(ValueError, match="no"):
        apply(path, [ours(**INT3, tune_model_epochs=1), Fails()])
    apply(path, [ours(**INT3)])


def test_a_run_goes_on_with_the_same_recipe_only(outlying, tmp_path, monkeypatch):
    """Which other modifiers had a part in, too."""

    def run(strength: float, resume: bool):
        with resumable(tmp_path / "out", resume=resume):
            apply(outlying, [SmoothQuantModifier(smoothing_strength=strength), ours(**INT3)])

    finish = SparseExpansionModifier._finish

    def dies(self, *args):
        finish(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SparseExpansionModifier, "_finish", dies)
        run(0.2, False)
    with pytest.raises(WexpandError, match=r"recipe.0.SmoothQ\S+strength was 0.2 and is 0.9"):
        run(0.9, True)
