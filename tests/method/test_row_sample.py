"""Samples that hang on what batches are, not on their order."""

import torch
from scipy.stats import kstest

from wexpand_plugin.method.row_sample import RowSample, mixed

BATCHES = {number * 7919: torch.arange(100.0 * number, 100.0 * number + 100).unsqueeze(1)
           for number in range(50)}  # fmt: skip


def sampled(batches, size=50, seed=1) -> torch.Tensor:
    sample = RowSample(size, seed)
    for number in batches:
        sample.add(BATCHES[number], number)
    return sample.rows.flatten()


def test_is_uniform_and_bounded():
    rows = sampled(BATCHES)
    assert len(rows) == 50 and len(rows.unique()) == 50
    large = sampled(BATCHES, size=1000)
    assert kstest(large.numpy() / 5000, "uniform").pvalue > 0.01
    assert set(sampled(list(BATCHES)[:1]).tolist()) <= set(range(100))
    assert sorted(sampled(list(BATCHES)[:1], size=300).tolist()) == list(range(100))


def test_is_the_same_in_any_order():
    for size in (50, 1000, 9000):
        assert torch.equal(sampled(BATCHES, size), sampled(reversed(BATCHES), size))
    assert not torch.equal(sampled(BATCHES), sampled(BATCHES, seed=2))
    asked = RowSample(50, 1)  # looked at in between
    for number in BATCHES:
        asked.add(BATCHES[number], number)
        assert len(asked.rows) == 50
    assert torch.equal(asked.rows.flatten(), sampled(BATCHES))


def test_another_seed_is_another_order_of_batches():
    orders = [sorted(range(64), key=lambda batch: mixed(seed, batch)) for seed in range(3)]
    assert orders[0] == list(range(64)) and orders[1] != orders[2] != orders[0]
