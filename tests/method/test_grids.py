"""Scales and rounding against searching and rounding one by one."""

import pytest
import torch

from wexpand_plugin.method.grids import CLIPS, Grid


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_scales_lose_least_of_those_tried(bits):
    generator = torch.Generator().manual_seed(bits)
    columns = torch.randn(2, 16, 5, generator=generator)
    importance = torch.rand(2, 16, 1, generator=generator) + 0.1
    grid = Grid(bits, 16)
    columns[:, 3] = 0  # pruned: what a grid without a zero makes of it does not count
    found = grid.scales(columns, importance)
    assert found.shape == (2, 5) and torch.equal(found.half().float(), found)
    high = 2**bits - 1 if bits < 4 else 2 ** (bits - 1) - 1
    every = torch.arange(-high, high + 1, 2) if bits < 4 else torch.arange(-high - 1, high + 1)
    for e in range(2):
        for row in range(5):
            w, weight = columns[e, :, row].double(), importance[e, :, 0].double()
            errors = {}
            for clip in torch.linspace(1.0, 0.5, CLIPS).tolist():
                scale = float((columns[e, :, row].abs().max() / high * clip).half())
                change = (every.double() * scale - w[:, None]).square().amin(dim=1)
                errors[scale] = float((change * weight)[w != 0].sum())
            assert errors[float(found[e, row])] <= min(errors.values()) * (1 + 1e-5)


def test_zeros_stay_zeros_and_the_range_is_kept():
    grid = Grid(4, 8)
    columns = torch.zeros(1, 8, 2)
    columns[0, 0, 1], columns[0, 1, 1] = 7.0, -9.0
    scale = grid.scales(columns, torch.ones(1, 1, 1))
    assert scale[0, 0] == 0
    rounded = grid.round(columns, scale.unsqueeze(1))
    assert not rounded[..., 0].any() and rounded.isfinite().all()
    q = rounded[0, :, 1] / scale[0, 1]
    assert q.min() >= -8 and q.max() <= 7
