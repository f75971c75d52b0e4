"""The low-rank control of evals.low_rank is the best there is, against scipy."""

import numpy as np
import scipy.linalg
import torch

from evals.low_rank import correction, rank_of


def test_the_correction_is_the_best_of_its_rank():
    torch.manual_seed(0)
    error, x = torch.randn(12, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    second_moment = x.t() @ x / len(x)
    root = scipy.linalg.sqrtm(second_moment.numpy())
    singular = np.linalg.svd(error.numpy() @ root, compute_uv=False)
    for rank in (0, 1, 3, 8):
        left = error - correction(error, second_moment, rank)
        found = float(((x @ left.t()) ** 2).sum()) / len(x)
        np.testing.assert_allclose(found, (singular[rank:] ** 2).sum(), rtol=1e-6, atol=1e-9)
    assert np.linalg.matrix_rank(correction(error, second_moment, 3).numpy()) == 3


def test_its_factors_take_the_bytes():
    for shape, share in (((256, 688), 0.1), ((100, 100), 0.5)):
        rank = rank_of(share, torch.Size(shape))
        assert abs(rank * sum(shape) / (shape[0] * shape[1]) - share) < 0.01
