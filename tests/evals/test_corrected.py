"""A mask with a low-rank correction, as experts are compared with it, tuned."""

import pytest
import torch

from evals.corrected import Corrected
from wexpand_plugin.method.tunable import TunableLinear
from wexpand_plugin.method.versions import SolvedRows

OUT, WIDTH = 12, 8


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(OUT, WIDTH, generator=generator)
    x = torch.randn(200, WIDTH, generator=generator) * torch.logspace(-2, 1, WIDTH)
    sparse = (dense * (dense.abs() > 0.7)).bfloat16().float()
    return dense, sparse, x


def corrected(parts, rank):
    dense, sparse, x = parts
    numbers = torch.arange(OUT).unsqueeze(0)
    linear = TunableLinear(SolvedRows(sparse), sparse != 0, numbers, None, None, None)
    return Corrected(linear, dense - sparse, x.t() @ x, rank)


def test_of_full_rank_it_is_the_dense_linear(parts):
    dense, _, x = parts
    found = corrected(parts, WIDTH)
    torch.testing.assert_close(found(x), x @ dense.t(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.solved().weights, dense, rtol=1e-2, atol=1e-2)


def test_of_rank_none_it_is_the_mask(parts):
    assert torch.equal(corrected(parts, 0).solved().weights, parts[1])


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_other_of_its_rank_is_better_for_these_inputs(parts, rank):
    dense, sparse, x = parts
    found = corrected(parts, rank)
    lost = (found(x) - x @ dense.t()).double().square().sum()
    # the outputs that are missing, by the singular values that no matrix of this rank can give
    least = torch.linalg.svdvals(x.double() @ (dense - sparse).double().t())[rank:].square().sum()
    torch.testing.assert_close(lost, least, rtol=1e-3, atol=1e-4)


def test_both_factors_are_trained(parts):
    found = corrected(parts, 2)
    found(parts[2]).square().sum().backward()
    assert {name for name, p in found.named_parameters() if p.grad.any()} == {
        "left", "right", "linear.values",
    }  # fmt: skip
