"""Who reads which tensor: groups, records, and which tokens count."""

from functools import partial

import pytest
import torch
from torch import nn

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.inputs import (
    InputGroup,
    Readers,
    find_groups,
    record_inputs,
    same_tensor,
    token_rows,
)


class Block(nn.Module):
    """gate and up read one tensor, down another, extra a copy of the first; rare by the input."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.gate, self.extra, self.rare = (nn.Linear(6, 6) for _ in range(5))
        self.ran = 0

    def forward(self, x):
        y = self.gate(x) * self.up(x.detach()) + self.extra(x.clone())
        if float(x.sum()) > 0:
            y = y + self.rare(x[..., :])
        self.ran += 1
        return self.down(y)


BLOCK = Block()
LINEARS = {f"block.{name}": module for name, module in BLOCK.named_children()}
NEGATIVE, POSITIVE = -torch.rand(2, 3, 6), torch.rand(2, 3, 6)


def forwards(*inputs):
    return [partial(BLOCK, x) for x in inputs]


def named(groups):
    return [tuple(name.removeprefix("block.") for name in group.names) for group in groups]


def test_linears_that_read_one_tensor_are_a_group():
    found = find_groups(LINEARS, forwards(POSITIVE))
    # x[..., :] is another tensor object on the same memory
    assert named(found) == [("gate", "up", "rare"), ("extra",), ("down",)]
    assert found[0].linears == (BLOCK.gate, BLOCK.up, BLOCK.rare)
    assert found[0].label == "block: gate + up + rare"
    assert InputGroup(("a.x", "b.y"), (BLOCK.up, BLOCK.down)).label == "a.x + b.y"


def test_a_linear_that_is_reached_later_is_found_later():
    assert named(find_groups(LINEARS, forwards(NEGATIVE, POSITIVE))) == [
        ("gate", "up"), ("extra",), ("down",), ("rare",)
    ]  # fmt: skip
    assert "rare" not in str(named(find_groups(LINEARS, forwards(NEGATIVE))))
    BLOCK.ran = 0
    find_groups(LINEARS, forwards(POSITIVE, POSITIVE, POSITIVE))
    assert BLOCK.ran == 1, "all were seen in the first forward"


def test_a_linear_called_twice_is_refused():
    linear = nn.Linear(6, 6)
    with pytest.raises(WexpandError, match="a.b: called more than once in a forward"):
        find_groups({"a.b": linear}, [lambda: linear(linear(POSITIVE))])
    assert not linear._forward_pre_hooks


def test_records_are_what_a_linear_reads_and_stop_at_the_last():
    BLOCK.ran = 0
    found = list(record_inputs([BLOCK.gate, BLOCK.extra], forwards(NEGATIVE, POSITIVE)))
    assert BLOCK.ran == 0, "both were reached before the end"
    for seen, x in zip(found, (NEGATIVE, POSITIVE), strict=True):
        assert torch.equal(seen[BLOCK.gate], x) and torch.equal(seen[BLOCK.extra], x)
    assert [set(s) for s in record_inputs([BLOCK.rare], forwards(NEGATIVE, POSITIVE))] == [
        set(), {BLOCK.rare}
    ]  # fmt: skip
    stream = record_inputs([BLOCK.gate], forwards(NEGATIVE, POSITIVE))
    next(stream)
    assert not BLOCK.gate._forward_pre_hooks, "between forwards the model is left alone"


def test_same_tensor_is_the_same_memory():
    x = torch.rand(4, 6)
    assert same_tensor(x, x.view(4, 6)) and not same_tensor(x, x.clone())
    assert not same_tensor(x, x.view(2, 2, 6)) and not same_tensor(x, x.t())
    assert not same_tensor(x, x.view(torch.int32))


def test_the_first_reader_stays_the_first():
    readers, x, y = Readers(), torch.rand(2, 6), torch.rand(2, 6)
    a, b, c = BLOCK.gate, BLOCK.up, BLOCK.down
    assert readers.first(a, x) is a and readers.first(b, x) is a and readers.first(c, y) is c
    assert readers.first(c, x) is c, "a sample that has begun goes on"
    assert readers.first(b, y) is b


def test_only_tokens_that_count():
    x = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(token_rows(x, None), x.view(6, 4))
    counts = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    assert token_rows(x, counts)[:, 0].tolist() == [0, 4, 16, 20]
    assert torch.equal(token_rows(x.view(6, 4), counts), token_rows(x, counts))
    # where all tokens count, a linear may see some of them only
    assert torch.equal(token_rows(x[:1], torch.ones(2, 3).bool()), x[0])
    with pytest.raises(WexpandError, match="padding cannot be told"):
        token_rows(x[:1], counts)
