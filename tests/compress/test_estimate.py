"""The memory estimate: what it counts, by hand."""

import pytest
from torch import nn

from wexpand_plugin.compress.estimate import working_bytes
from wexpand_plugin.method.settings import Settings

LINEARS = {
    "a.mlp.gate": nn.Linear(8, 10, bias=False),
    "a.mlp.up": nn.Linear(8, 10, bias=False),
    "a.mlp.down": nn.Linear(20, 8, bias=False),
}
BYTES = 4 * (80 + 80 + 160)


@pytest.mark.parametrize(
    "values,expected",
    [
        # down: 5 Hessians of 20 x 20, 4 versions of 160 weights; gate and up together need less
        ({}, 5 * 400 * 4 + 4 * 640),
        (dict(size_budget=1.0, budget_scope="layer"), 5 * 400 * 4 + 8 * 640),
        (dict(size_budget=1.5), 5 * 400 * 4 + 8 * 640 + 2 * 1.5 * BYTES),
        # the sample, and four things of each cluster, all of 20 columns
        (dict(num_clusters=6), 5 * 400 * 4 + 4 * 640 + 20 * 4 * (2 * 8192 + 4 * 6)),
        (dict(num_clusters=512), 5 * 400 * 4 + 4 * 640 + 20 * 4 * (2 * 16384 + 4 * 512)),
        # means and held-out sums of two groups, and the outputs for them of three linears
        (
            dict(num_clusters=6, size_budget=1.5),
            5 * 400 * 4
            + 8 * 640
            + 20 * 4 * (2 * 8192 + 24)
            + 2 * 1.5 * BYTES
            + 2 * 4 * 6 * (28 + 28),
        ),
    ],
)
def test_widest_group_and_what_is_kept(values, expected):
    settings = Settings(0.5, num_experts=4, max_bytes=100, **values)
    assert working_bytes(LINEARS, settings) == expected + 100


def test_candidates_that_wait_on_the_disk():
    """While blocks are solved as much as if nothing waited; then 7 nodes x 28 outputs in all."""
    settings = Settings(0.5, num_experts=4, size_budget=1.5, max_bytes=100)
    assert working_bytes(LINEARS, settings, True) == 5 * 400 * 4 + 8 * 640 + 100
    wide = {"a": nn.Linear(1, 10000)}
    assert working_bytes(wide, settings, True) == 7 * 10000 * (4 * 4 + 8 + 1)
