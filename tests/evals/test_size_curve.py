"""evals.size_curve: rows that can run, files that llama.cpp reads, and what the picture says."""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from evals.llama_types import _interleaved, _tensors
from evals.real_model import recipe
from evals.size_curve import LLAMA, MODIFIERS
from evals.size_curve_picture import SERIES, best_of_others, plot, prediction, report, series_of
from wexpand_plugin.compress.recipes import check_recipe


def test_every_row_belongs_to_a_series():
    for name in [*(name for name in MODIFIERS if "tuned in" not in name), *LLAMA]:
        if name != "llama.cpp F32":
            part, series = series_of(name)
            assert part in ("all", "mlp") and series in SERIES
    assert series_of("mlp: ours 3.25 tuned") == ("mlp", "ours, tuned")
    assert series_of("mlp: ours 3.25 tuned in 4, 131072 tokens") is None
    assert series_of("dense") is None


@pytest.mark.parametrize("what", ["ours 3.25 tuned", "GPTQ 3", "AWQ 2", "SparseGPT 2:4"])
def test_recipes_are_accepted(what, tmp_path):
    modifiers, _ = MODIFIERS[f"mlp: {what}"]
    (tmp_path / "recipe.yaml").write_text(recipe(modifiers))
    check_recipe(tmp_path / "recipe.yaml")
    assert yaml.safe_load(recipe(modifiers))["compress_stage"]["compress_modifiers"] == modifiers


def test_bits_count_scales_and_zero_points():
    assert MODIFIERS["all: GPTQ 3"][1] == 3.25
    assert MODIFIERS["all: AWQ 3"][1] == 3 + 0.25 + 3 / 64


def test_bfloat16_tensors_are_read_exactly(tmp_path):
    weight = torch.randn(6, 5).to(torch.bfloat16)
    save_file({"one": weight, "two": weight.float().t().contiguous()}, tmp_path / "m.safetensors")
    found = dict(_tensors(tmp_path / "m.safetensors"))
    np.testing.assert_array_equal(found["one"], weight.float().numpy())
    np.testing.assert_array_equal(found["two"], weight.float().t().numpy())


def test_rotary_halves_become_pairs():
    """Row i of the first half lies beside row i of the second, head by head."""
    rows = np.arange(8, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    assert _interleaved(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


ROWS = {
    "dense": {"loss": 3.0},
    "mlp: GPTQ 3": {"loss": 3.4, "bits_stored": 3.25, "bits_read": 3.25},
    "mlp: GPTQ 4": {"loss": 3.1, "bits_stored": 4.25, "bits_read": 4.25},
    "mlp: llama.cpp Q2_K": {"loss": 3.3, "bits_stored": 3.2, "bits_read": 3.2},
    **{
        f"mlp: ours {bits}": {
            "loss": 3 + added, "bits_stored": bits, "bits_read": bits, "predicted": 2 * added,
        }
        for bits, added in ((2, 0.9), (3.24, 0.2), (4.25, 0.05))
    },
}  # fmt: skip


def test_the_best_of_the_others_takes_no_more_bits():
    assert best_of_others(ROWS, "mlp", 3.24) == ("mlp: llama.cpp Q2_K", pytest.approx(0.3))
    assert best_of_others(ROWS, "mlp", 4.22)[0] == "mlp: GPTQ 4"  # a hundredth is the same size
    assert best_of_others(ROWS, "mlp", 2) is None
    assert best_of_others(ROWS, "all", 16) is None


def test_prediction_by_ranks_and_factor():
    assert prediction(ROWS, "mlp") == (pytest.approx(1), pytest.approx(2))
    assert prediction(ROWS, "all") is None


def test_picture_and_report(tmp_path):
    plot(ROWS, "model", tmp_path / "curve.svg")
    assert "bits per weight, read by a token" in (tmp_path / "curve.svg").read_text()
    assert any("best other +0.3000 (llama.cpp Q2_K)" in line for line in report(ROWS))
