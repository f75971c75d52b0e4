"""Statistics of an input group: every row once, and a uniform sample."""

import pytest
import torch
from test_candidates import statistics

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.statistics import GroupStatistics, RowSample


@pytest.mark.parametrize("hold_out", [False, True])
def test_statistics_count_and_sum_every_row(hold_out):
    found, rows = statistics(hold_out)
    assert int(found.tokens.sum()) == 1200
    torch.testing.assert_close(found.total(), rows.t() @ rows / 1200, atol=1e-4, rtol=1e-4)
    if not hold_out:
        labels = (rows @ found.router.weight.t()).argmax(dim=1)
        for expert in range(3):
            part = rows[labels == expert]
            torch.testing.assert_close(found.sums[expert], part.t() @ part, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(found.mean_inputs()[expert], part.mean(dim=0))


def test_inputs_that_are_not_finite_are_refused():
    found = GroupStatistics(4, None)
    with pytest.raises(WexpandError, match="NaN"):
        found.add(torch.full((8, 4), torch.nan))


def test_row_sample_is_uniform_and_bounded():
    sample = RowSample(50, seed=1)
    for start in range(0, 5000, 100):
        sample.add(torch.arange(start, start + 100).float().unsqueeze(1))
    rows = sample.rows.flatten()
    assert len(rows) == 50 and len(rows.unique()) == 50 and torch.equal(rows, rows.sort().values)
    assert 1500 < rows.mean() < 3500
    short = RowSample(50, seed=1)
    short.add(torch.arange(7.0).unsqueeze(1))
    assert torch.equal(short.rows.flatten(), torch.arange(7.0))
