"""What is computed of a large model hangs together."""

import pytest

from evals.documents.results import results
from evals.large import RANKS, RECIPES, compressing, plan, serving

BLOCK = 855_638_016  # weights of the linears of a block of Llama-3-70B


def test_shapes_are_the_models():
    assert sum(linear.weight.numel() for linear in plan("int4").linears.values()) == BLOCK
    assert len(plan("sparse_expansion_budget").linears) == 3
    assert plan("dial").tried > 10 and plan("int4").tried == 0


def test_bytes_are_those_of_the_codec():
    ends = 2 * 128256 * 8192
    found = serving("int4")
    assert found["stored_bytes"] == 80 * BLOCK * (4 + 16 / 128) / 8 + 2 * ends
    assert found["read_bytes"] == found["stored_bytes"] - ends


def test_results_are_what_is_computed_now():
    rows = results("large")["rows"]
    for name in RECIPES:
        for count in RANKS:
            again = compressing(name, count)
            assert rows[name]["compress"][str(count)] == pytest.approx(again), (
                "run python -m evals.large, then make docs"
            )
        assert rows[name]["serve"] == pytest.approx(serving(name))


def test_more_gpus_take_less():
    for name in RECIPES:
        one, eight = compressing(name, 1), compressing(name, 8)
        assert one["hours"] / 8 < eight["hours"] < one["hours"]
        assert eight["gpu_bytes"] <= one["gpu_bytes"]
