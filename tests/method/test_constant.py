"""Parts of a block that training does not change are run once for each batch."""

import torch
from torch import nn

from wexpand_plugin.method.constant import constant_parts


class Part(nn.Module):
    """A linear that counts its calls and may answer with a tuple."""

    def __init__(self, seed: int, answers_with_a_tuple: bool = False):
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 6), 0
        self.tuple = answers_with_a_tuple
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(seed))
        self.requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        y = self.linear(x).tanh()
        return (y, None) if self.tuple else y


class Block(nn.Module):
    """before -> trained -> after, and the first of them twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6).requires_grad_(False)
        self.before, self.trained, self.after = Part(0, True), Part(1), Part(2)
        self.trained.linear.weight.requires_grad_(True)

    def forward(self, x):
        x, _ = self.before(self.norm(x))
        x, _ = self.before(x)
        return self.after(self.trained(x))


def test_the_same_outputs_and_gradients_in_fewer_calls():
    block = Block()
    inputs = [torch.randn(3, 6, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    expected = [block(x).detach() for x in inputs]
    block(inputs[1]).sum().backward()
    weight = block.trained.linear.weight
    gradient, weight.grad, block.before.calls = weight.grad, None, 0
    with constant_parts(block, lambda number: block(inputs[number])) as run:
        for number in (0, 1, 2, 3, 1, 0, 2):
            with torch.no_grad():
                found = run(number)
            assert torch.equal(found, expected[number]) and not found.requires_grad
        run(1).sum().backward()
        with torch.no_grad():
            weight.mul_(2)
            assert not torch.equal(run(0), expected[0])  # what is trained is never kept
    torch.testing.assert_close(weight.grad, gradient)
    assert block.before.calls == 2 * len(inputs)
    assert block.trained.calls == block.after.calls
    assert "forward" not in vars(block.before) and "forward" not in vars(block.after)
    block(inputs[0])
    assert block.before.calls == 2 * len(inputs) + 2


def test_a_forward_of_its_own_comes_back():
    block = Block()
    own = block.before.forward = block.before.forward
    with constant_parts(block, lambda number: block(torch.ones(1, 6))):
        assert block.before.forward is not own
    assert block.before.forward is own


def test_no_more_is_kept_than_may_be():
    block, inputs = Block(), [torch.randn(3, 6) for _ in range(4)]
    expected = [block(x).detach() for x in inputs]
    block.before.calls = 0
    one = inputs[0].nbytes  # of two outputs a batch, the first three fit
    with constant_parts(block, lambda number: block(inputs[number]), 3.5 * one) as run:
        for number in (0, 1, 2, 3, 0, 1, 2, 3):
            assert torch.equal(run(number), expected[number])
    assert block.before.calls == 8 + 8 - 3
