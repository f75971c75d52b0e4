"""The experiment's shortcut: solved once and allocated often, it finds what the recipe finds."""

import json

import pytest
import tiny
import torch

from evals.allocation import add, summary
from evals.expansion import expand_network, input_groups, reallocate, sizes
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.method.settings import Settings

SETTINGS = dict(num_experts=3, router_restarts=1)


def network():
    return tiny.dense(hidden_size=32, intermediate_size=48).bfloat16().float()


def rows(count: int = 24) -> torch.Tensor:
    return tiny.tokens(count, 32, seed=1)


def test_gate_and_up_are_one_group():
    groups = [group.names for group in input_groups(network())]
    names = [[n.rpartition(".")[2] for n in group] for group in groups]
    assert names == [["gate_proj", "up_proj"], ["down_proj"]] * 2


@pytest.mark.parametrize("path", ["budget", "full"])
def test_reallocation_fills_the_budget_and_no_more(path):
    expanded = expand_network(
        network(), rows(), Settings(0.7, size_budget=1.0, **SETTINGS), ["gain", "wasserstein"], path
    )
    assert [linear.name.rpartition(".")[2] for linear in expanded][:3] == [
        "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    for rule in ("gain", "wasserstein"):
        found = sizes(expanded, reallocate(expanded, 0.9, rule))
        assert 0.88 < found.stored <= 0.9 and found.read_weights < found.read < found.stored
    with pytest.raises(WexpandError, match="size_budget"):
        reallocate(expanded, 0.4, "gain")


def test_it_is_the_recipe(tmp_path):
    """SparseExpansionModifier finds the same masks where both see the dense model."""
    import datasets
    from llmcompressor import oneshot

    from wexpand_plugin.compress.modifier import SparseExpansionModifier

    model, ids = network(), rows()
    model.save_pretrained(tmp_path)
    data = datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )
    recipe = SparseExpansionModifier(
        sparsity=0.7, num_experts=1, targets=[r"re:.*\.mlp\..*"], mask_structure="row"
    )
    done = oneshot(
        model=str(tmp_path), dataset=data, recipe=[recipe], shuffle_calibration_samples=False,
        max_seq_length=32, num_calibration_samples=len(ids), tokenizer=None,
        processor=tiny.tokenizer(),
    )  # fmt: skip
    expected = {n: m for n, m in done.named_modules() if isinstance(m, RoutedLinear)}
    settings = Settings(0.7, **SETTINGS | {"num_experts": 1})
    for linear in expand_network(network(), ids, settings):
        if "layers.0" in linear.name and "down" not in linear.name:
            assert torch.equal(linear.pool.mask, expected[linear.name].weight_mask)


def test_cells_are_kept_once_and_summed_up(tmp_path):
    file = tmp_path / "cells.json"
    base = {"sparsity": 0.8, "seed": 0}
    cells = [
        {"cell": {**base, "num_experts": 1}, "loss": 3.0},
        {"cell": {**base, "num_experts": 16}, "loss": 2.0},
        {
            "cell": {**base, "num_experts": 16, "size_budget": 1.0, "allocate_by": "gain"},
            "loss": 2.25,
        },
    ]
    for cell in cells:
        cell |= {"stored": 1.0, "read": 0.3, "read_weights": 0.2}
    add(file, {"command": "x"}, cells[:2])
    found = add(file, {"command": "x"}, cells)
    assert found == cells and json.loads(file.read_text())["cells"] == cells
    line = next(line for line in summary(found).splitlines() if "gain" in line)
    assert "2.250 +- 0.000" in line and "0.750 +- 0.000" in line
