"""PackModifier: pruning by llm-compressor and packing in one recipe."""

import pytest
import tiny
import torch
import transformers
from llmcompressor import oneshot
from test_modifier import calibration, logits

from wexpand_plugin.compress.packing import PackModifier
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.hf.linear import RoutedLinear

RECIPE = """
p_stage:
  p_modifiers:
    {name}:
      sparsity: 0.5
      mask_structure: "{structure}"
      targets: ['re:.*layers.*_proj$']
    PackModifier:
      targets: ['Linear']
"""


@pytest.mark.parametrize(
    "name,structure", [("SparseGPTModifier", "2:4"), ("WandaPruningModifier", "0:0")]
)
def test_prune_and_pack_in_one_recipe(name, structure, tmp_path):
    tiny.dense("llama").save_pretrained(tmp_path / "dense")
    model = oneshot(
        model=str(tmp_path / "dense"), dataset=calibration(), processor=tiny.tokenizer(),
        recipe=RECIPE.format(name=name, structure=structure), max_seq_length=64,
        num_calibration_samples=24, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    routed = [m for m in model.modules() if isinstance(m, RoutedLinear)]
    assert len(routed) == 14 == len(ModelDir(tmp_path / "out").config.linears)
    for module in routed:
        assert module.experts == 1
        assert (module.pool.expert(0) == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_the_recipe_packs_all_linears_of_the_blocks(kind, recipes, tmp_path):
    model = tiny.dense(kind)
    names = set(tiny.block_linears(model))
    model.save_pretrained(tmp_path / "dense")
    oneshot(
        model=str(tmp_path / "dense"), dataset=calibration(), processor=tiny.tokenizer(),
        recipe=str(recipes / "sparsegpt_packed.yaml"), max_seq_length=64,
        num_calibration_samples=24, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    assert ModelDir(tmp_path / "out").config.linears.keys() == names


def test_nothing_to_pack_is_said(tmp_path):
    tiny.dense("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(WexpandError, match="none of 14 linears is sparse enough"):
        oneshot(
            model=str(tmp_path / "dense"), dataset=calibration(), processor=tiny.tokenizer(),
            recipe=[PackModifier()], max_seq_length=64, num_calibration_samples=24,
        )  # fmt: skip
