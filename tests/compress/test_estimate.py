"""What is told before any work: memory by hand, time by what it grows with, bytes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wexpand_plugin.compress.duration import COLD, Speed, seconds
from wexpand_plugin.compress.estimate import expected, kept_bytes, working_bytes
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.method.settings import Settings

LINEARS = {
    "a.mlp.gate": nn.Linear(8, 10, bias=False),
    "a.mlp.up": nn.Linear(8, 10, bias=False),
    "a.mlp.down": nn.Linear(20, 8, bias=False),
}
TOKENS = 1000
# of 1000 tokens: three times 20 columns, and twice 8 hidden states
DOWN = 5 * 400 * 4 + 3 * TOKENS * 20 * 4 + 2 * TOKENS * 8 * 4
DOWN += 4 * 20 * (8 + 3 * 20)  # one Hessian at a time
BYTES = 4 * (80 + 80 + 160)


@pytest.mark.parametrize(
    "values,expected",
    [
        # down: 5 Hessians of 20 x 20, 4 versions of 160 weights; gate and up together need less
        ({}, DOWN + 4 * 640),
        (dict(size_budget=1.0, budget_scope="layer"), DOWN + 8 * 640),
        (dict(size_budget=1.5), DOWN + 8 * 640 + 2 * 1.5 * BYTES),
        # four things of each cluster, of 20 columns
        (dict(num_clusters=6), DOWN + 4 * 640 + 20 * 4 * 4 * 6),
        (dict(num_clusters=512), DOWN + 4 * 640 + 20 * 4 * 4 * 512),
        # means and held-out sums of two groups, and the outputs for them of three linears
        (
            dict(num_clusters=6, size_budget=1.5),
            DOWN + 8 * 640 + 20 * 4 * 24 + 2 * 1.5 * BYTES + 2 * 4 * 6 * (28 + 28),
        ),
    ],
)
def test_widest_group_and_what_is_kept(values, expected):
    settings = Settings(0.5, num_experts=4, max_bytes=100, **values)
    assert working_bytes(LINEARS, settings, TOKENS) == expected


def test_what_is_kept_of_a_block():
    """What a part has given [tokens, 8], and what down reads: up to three times as much, or more
    where there is room."""
    wide = LINEARS | {"b.mlp.down": nn.Linear(25, 8, bias=False)}
    experts = Settings(0.5, num_experts=4, max_bytes=100)
    assert kept_bytes(LINEARS, experts, TOKENS) == 4 * TOKENS * (8 + 20)
    assert kept_bytes(wide, experts, TOKENS) == 4 * TOKENS * 8
    assert kept_bytes(wide, Settings(0.5, num_experts=4), TOKENS) == 4 * TOKENS * (8 + 25)
    assert kept_bytes(LINEARS, Settings(0.5, num_experts=1), TOKENS) == 0


def test_candidates_that_wait_on_the_disk():
    """While blocks are solved as much as if nothing waited; then 7 nodes x 28 outputs in all."""
    settings = Settings(0.5, num_experts=4, size_budget=1.5, max_bytes=100)
    assert working_bytes(LINEARS, settings, TOKENS, True) == DOWN + 8 * 640
    wide = {"a": nn.Linear(1, 10000)}
    assert working_bytes(wide, settings, 0, True) == 7 * 10000 * (4 * 4 + 8 + 1)


def test_time_grows_with_what_is_done():
    block = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    groups = [(96, 64), (64, 96)]

    def taken(tokens: int = 4096, **values) -> float:
        return seconds(groups, tokens, Settings(0.5, **values), speed)

    speed = Speed.measured(block, 64, Settings(0.5, num_experts=4))
    one, four = taken(num_experts=1), taken(num_experts=4)
    assert 0 < one < four < taken(num_experts=4, size_budget=1.0)
    assert one < taken(8192, num_experts=1) < 2.01 * one
    epochs = taken(num_experts=1, tune_epochs=2) - one
    assert epochs == pytest.approx(COLD * 9 * 4096 * speed.token)


@pytest.mark.parametrize(
    "values,passes",
    [
        ({}, 1.0),
        # up again to pass down, whose inputs are more than three times as wide as hidden states
        (dict(max_bytes=1), (96 + 64 + 208 + (208 + 208)) / 576),
        (dict(tune_epochs=1), (96 + 64 + 208) / 576 + 1),
        (dict(num_experts=1, num_clusters=4), (96 + 64 + 208) / 576 + 1),
    ],
)
def test_what_is_done_runs_once(values, passes):
    groups, parts = [(12, 8), (8, 8), (26, 8), (8, 26)], ["attention"] * 2 + ["mlp"] * 2
    settings = Settings(0.5, **{"num_experts": 4} | values)
    speed = Speed(token=0, routed=1, product=0, weight=0, column=0)
    assert seconds(groups, 10, settings, speed, parts=parts) == pytest.approx(COLD * 10 * passes)


def test_what_shuffles_the_calibration_data_is_left_alone():
    block = nn.Sequential(nn.Linear(64, 96))
    before = torch.get_rng_state()
    Speed.measured(block, 64, Settings(0.5, num_experts=4))
    assert torch.equal(before, torch.get_rng_state())


def test_bytes_are_those_of_what_is_stored():
    """Full expansion, where nothing but shapes decides."""
    model = nn.Module()
    model.config, model.block = SimpleNamespace(dtype=torch.float32), nn.Linear(64, 10, bias=False)
    linears = {"block": model.block}
    found = expected(model, {model.block: linears}, 4096, 8, Settings(0.75, num_experts=1), None)
    keep = torch.zeros(10, 64, dtype=torch.bool)
    keep[:, :16] = True
    pool = RowPool.pack(torch.randn(10, 64) * keep, keep=keep)
    assert found.stored == sum(pool.stored_bytes().values())
    assert "s, " in str(found) and "MiB of expanded linears" in str(found)


def test_what_is_trained_takes_five_floats_a_weight():
    model = nn.Module()
    model.config = SimpleNamespace(dtype=torch.float32)
    model.blocks = nn.ModuleList(nn.Linear(64, rows, bias=False) for rows in (4000, 6000))
    blocks = {block: {f"blocks.{n}": block} for n, block in enumerate(model.blocks)}

    def memory(**values) -> int:
        settings = Settings(0.5, num_experts=1, max_bytes=1, **values)
        return expected(model, blocks, 100, 1, settings, None).memory

    assert memory() < memory(tune_epochs=1) == 20 * 64 * 6000
    assert memory(tune_epochs=1, tune_model_epochs=1) == 20 * 64 * 10000
