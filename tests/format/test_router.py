"""The stored router: as narrow as it can be without loss."""

import torch

from wexpand_plugin.format.router import narrowest


def test_narrowest_is_exact():
    assert narrowest(torch.empty(3, 4, device="meta")).dtype == torch.float32
    exact = torch.tensor([[0.5, -0.25], [65504.0, 2**-24]])
    assert narrowest(exact).dtype == torch.float16
    assert torch.equal(narrowest(exact).float(), exact)
    for other in (torch.tensor([0.1]), torch.tensor([1e6]), torch.tensor([1e-9])):
        assert narrowest(other).dtype == torch.float32
        assert torch.equal(narrowest(other), other)
