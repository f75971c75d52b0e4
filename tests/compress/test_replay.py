"""Replays of several batches at once, and without the parts of a block that are done."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from wexpand_plugin.compress.calibration import Known
from wexpand_plugin.compress.remembered import Remembered
from wexpand_plugin.compress.replay import BlockReplay
from wexpand_plugin.compress.together import Apart, Arguments, give_the_same, joined


class Block(nn.Module):
    """Reads as many positions as there are tokens, and a mask for each batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
        self.runs: list[int] = []

    def forward(self, hidden: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self.runs.append(len(hidden))
        hidden = hidden + self.first(hidden * mask.unsqueeze(2)) * positions.unsqueeze(1)
        return hidden + self.second(hidden)


def batch(seed: int, tokens: int = 6) -> Arguments:
    torch.manual_seed(seed)
    mask = (torch.arange(tokens) < tokens - seed % 3).float().unsqueeze(0)
    hidden = torch.randn(1, tokens, 8)
    return Arguments((hidden,), {"mask": mask, "positions": torch.arange(tokens).float()})


def recorded(batches: list[Arguments]) -> BlockReplay:
    block = Block()
    replay = BlockReplay(block, lambda module, hook, *_, **kw: module.register_forward_pre_hook(
        hook, **kw), lambda: Known(None, 0))  # fmt: skip
    for args, kwargs in batches:
        block(*args, **kwargs)
    block.runs.clear()
    block._forward_pre_hooks.clear()
    return replay


@torch.no_grad()
def test_short_batches_are_replayed_together_and_give_what_they_give_alone():
    batches = [batch(seed) for seed in range(5)] + [batch(9, tokens=4)]
    replay = recorded(batches)
    alone = list(replay.inputs(replay.block.second[0]))
    assert replay.block.runs == [1] * 6
    replay.block.runs.clear()
    replay.run_together()
    assert replay.block.runs == [2, 1, 1], "seen to be the same, not assumed"
    replay.block.runs.clear()
    together = list(replay.inputs(replay.block.second[0], range(5)))
    assert replay.block.runs == [5]
    assert [len(rows) for rows in together] == [6] * 5
    torch.testing.assert_close(together, alone[:5])
    # batches of another shape run alone
    torch.testing.assert_close(list(replay.inputs(replay.block.second[0])), alone)


@torch.no_grad()
def test_propagation_is_given_what_batches_give_together():
    batches = [batch(seed) for seed in range(5)]
    replay = recorded(batches)
    expected = [replay.block(*args, **kwargs) for args, kwargs in batches]
    replay.run_together()
    replay.propagate()
    replay.block.runs.clear()
    found = [replay.block(*args, **kwargs) for args, kwargs in batches]
    assert replay.block.runs == [5]
    torch.testing.assert_close(found, expected)
    other, known = batch(77)
    torch.testing.assert_close(
        replay.block(*other, **known), Block.forward(replay.block, *other, **known)
    )
    replay.end()
    assert "forward" not in vars(replay.block)


@torch.no_grad()
def test_a_part_that_is_done_runs_once_more():
    replay = recorded([batch(seed) for seed in range(4)])
    block, calls = replay.block, list[int]()
    block.first[0].register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    named = {"first": block.first[0], "second": block.second[0]}
    assert len(replay.groups(named)) == 2
    calls.clear()
    replay.remember(1 << 20)
    list(replay.inputs(block.first[0]))
    assert len(calls) == 4, "not yet done"
    block.first[0].weight.mul_(2)  # what is found for it
    expected = list(replay.inputs(block.second[0]))
    found = list(replay.inputs(block.second[0]))
    assert len(calls) == 8
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
    replay.end()
    again = list(replay.inputs(block.second[0]))
    assert len(calls) == 12
    assert all(torch.equal(*both) for both in zip(again, expected, strict=True))


@torch.no_grad()
def test_a_run_that_reaches_nothing_leaves_nothing():
    """It ran to the end, through what is yet to be replaced."""
    replay = recorded([batch(0)])
    block = replay.block
    replay.groups({"first": block.first[0]})
    replay.remember(1 << 20)
    assert [len(rows) for rows in replay.inputs(nn.Linear(8, 8))] == [0]
    block.first[0].weight.mul_(2)
    (found,) = replay.inputs(block.second[0])
    replay.end()
    (expected,) = replay.inputs(block.second[0])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("max_bytes,runs", [(3 * 4 * 8, 3), (3 * 4 * 8 - 1, 6)])
def test_no_more_is_kept_than_may_be(max_bytes, runs):
    calls, running = list[int](), list[int]()
    part = nn.Identity()
    part.forward = lambda x: calls.append(1) or (x, None)
    kept = Remembered(part, lambda: running, 3, max_bytes)
    for number in (0, 1, 2, 0, 1, 2):
        running[:] = [number]
        assert part(torch.full((1, 8), float(number)))[0].eq(number).all()
        kept.keep()
    assert len(calls) == runs


def test_what_cannot_be_joined():
    one, other = batch(1), batch(2)
    assert joined([one, other]).kwargs["positions"] is one.kwargs["positions"]
    for name, value in (("positions", torch.zeros(6)), ("mask", None)):
        with pytest.raises(Apart):
            joined([one, other._replace(kwargs={**other.kwargs, name: value})])

    def mixes(arguments: Arguments) -> Tensor:
        return arguments.args[0] - arguments.args[0].mean(dim=0)

    assert not give_the_same(mixes, one, other)
    assert give_the_same(lambda arguments: arguments.args[0] * 2, one, other)
    assert not give_the_same(partial(lambda _: (1, 2)), one, other)
