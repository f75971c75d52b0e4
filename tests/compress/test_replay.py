"""Replays of several batches at once, and without the parts of a block that are done."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from wexpand_plugin.compress.calibration import Known
from wexpand_plugin.compress.remembered import End, Remembered, find_ends
from wexpand_plugin.compress.replay import BlockReplay
from wexpand_plugin.compress.rows import packed
from wexpand_plugin.compress.together import Apart, Arguments, give_the_same, joined
from wexpand_plugin.format.values import codec_of
from wexpand_plugin.method.versions import RowVersions, SolvedRows


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


def recorded(batches: list[Arguments], block: nn.Module | None = None) -> BlockReplay:
    block = block or Block()
    replay = BlockReplay(block, lambda module, hook, *_, **kw: module.register_forward_pre_hook(
        hook, **kw), lambda: Known(None, len(replay.known) * 7 % 5))  # fmt: skip
    for args, kwargs in batches:
        block(*args, **kwargs)
    getattr(block, "runs", []).clear()
    block._forward_pre_hooks.clear()
    return replay


@torch.no_grad()
def test_short_batches_are_replayed_together_and_give_what_they_give_alone():
    batches = [batch(seed) for seed in range(5)] + [batch(9, tokens=4)]
    replay = recorded(batches)
    alone = list(replay.inputs(replay.block.second[0]))
    assert replay.block.runs == [1] * 6
    replay.block.runs.clear()
    replay.run_together(0)
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
    replay.run_together(0)
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


class Attention(nn.Module):
    """Hands on what its last linear gives, with nothing beside it, as attention does."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)
        self.runs = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.runs += 1
        return self.o(self.q(x).relu()), None


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(hidden)[0]
        return hidden + self.mlp(hidden)


@torch.no_grad()
def test_a_part_is_done_when_its_last_linear_is_reached():
    """Each linear of it runs once for each batch while the block is replayed, and for none more
    when it is propagated, but for the very last; and nothing changes, to the last bit."""
    torch.manual_seed(0)
    batches = [Arguments((torch.randn(1, 6, 8),), {}) for _ in range(5)]
    replay = recorded(batches, TwoParts())
    block = replay.block
    attention, mlp = block.attention, block.mlp
    linears = {"q": attention.q, "o": attention.o, "up": mlp[0], "down": mlp[1]}
    replay.run_together(0)
    assert len(replay.groups(linears)) == 4
    replay.remember(1 << 20)
    rows = {name: 0 for name in linears}
    for name, linear in linears.items():
        linear.register_forward_hook(
            lambda _, args, __, name=name: rows.update({name: rows[name] + args[0].numel()})
        )
    attention.runs = 0
    order = (0, 3, 1, 4, 2)  # as the method reads them: by identity
    for linear in linears.values():
        list(replay.inputs(linear, order))
        linear.weight.mul_(2)  # what is found for it
    assert attention.runs == 2, "it ended at q, then at o"
    assert rows == {"q": 240, "o": 240, "up": 240, "down": 0}
    replay.propagate()
    found = [block(*args) for args, _ in batches]
    assert rows == {"q": 240, "o": 240, "up": 240, "down": 360}
    replay.end()
    whole = block(torch.cat([batches[number].args[0] for number in order]))
    for place, number in enumerate(order):
        assert torch.equal(found[number], whole[place : place + 1])


@pytest.mark.parametrize(
    "wrap,end",
    [
        (lambda x: x, End("1", 0)),
        (lambda x: (x, None), End("1", 2)),
        (lambda x: (x,), End("1", 1)),
        (lambda x: x * 1, None),
        (lambda x: (x, x), None),
        (lambda x: (None, x), None),
        (lambda x: (), None),
    ],
)
def test_what_a_part_hands_on(wrap, end):
    part = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    part.register_forward_hook(lambda _, __, output: wrap(output))
    with find_ends([part]) as found:
        part(torch.zeros(1, 4))
    assert found.get(part) == end
    assert len(part[1]._forward_hooks) == 0


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_full_experts_are_at_hand_as_unpacking_would_give_them(stored):
    """In the model's dtype, what is too small for it included (`expansion._replace_groups`)."""
    torch.manual_seed(0)
    weights = torch.randn(3, 5, 16) * (torch.rand(3, 5, 16) < 0.4)
    weights[0, 0, :4] = 1e-44
    versions = RowVersions.full(SolvedRows(weights), 0.0)
    experts = versions.experts()
    pool = packed(versions, codec_of(stored), experts)
    for expert in range(3):
        assert torch.equal(experts.weights[expert].to(stored), pool.expert(expert))


def test_a_linear_that_is_called_twice_is_no_end():
    linear = nn.Linear(4, 4)
    part = nn.Sequential(linear, linear)
    with find_ends([part]) as found:
        part(torch.zeros(1, 4))
    assert not found


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
