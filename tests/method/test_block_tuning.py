"""Training row versions, on one linear whose best answer is known."""

import pytest
import torch
from torch import Tensor

from wexpand_plugin.method.clusters import Router
from wexpand_plugin.method.grids import Grid
from wexpand_plugin.method.training import train
from wexpand_plugin.method.tunable import TunableLinear
from wexpand_plugin.method.tuning import tune_block
from wexpand_plugin.method.versions import SolvedRows


def linear(rows: Tensor, grid=None, scales=None, router=None, version_map=None, bias=None):
    if version_map is None:
        version_map = torch.arange(len(rows)).unsqueeze(0)
    return TunableLinear(SolvedRows(rows, scales), rows != 0, version_map, grid, router, bias)


def batches(width: int = 12, count: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return [torch.randn(1, 64, width, generator=generator) @ mix for _ in range(count)]


def test_reaches_the_least_squares_answer():
    """With a fixed mask the best values of each row are a regression on the kept columns, each
    token's error relative to the size of its target."""
    generator = torch.Generator().manual_seed(1)
    dense, inputs = torch.randn(4, 12, generator=generator), batches()
    keep = torch.rand(4, 12, generator=generator) < 0.5
    module = linear(dense * keep)
    targets = [x @ dense.t() for x in inputs]
    found = tune_block(
        lambda n: module(inputs[n]), targets, [module], epochs=60, lr=0.03, quiet=True
    )
    x, y = torch.cat(inputs).flatten(0, 1), torch.cat(targets).flatten(0, 1)
    x, y = (part / y.norm(dim=1, keepdim=True) for part in (x, y))
    best = 0.0
    for row in range(4):
        answer = torch.linalg.lstsq(x[:, keep[row]], y[:, row : row + 1]).solution
        best += float((x[:, keep[row]] @ answer - y[:, row : row + 1]).square().sum())
    error = float((x @ module.solved().weights.t() - y).square().sum())
    assert best <= error * 1.0001 and error < 1.05 * best
    assert found.after < found.before and not found.diverged
    assert torch.equal(module.solved().weights != 0, keep)


def test_shared_versions_get_the_gradient_of_all_their_experts():
    inputs = batches()
    router = Router(torch.randn(3, 12, generator=torch.Generator().manual_seed(2)), torch.zeros(3))
    rows = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    version_map = torch.tensor([[0, 2], [0, 3], [1, 3]])  # of two neurons
    module = linear(rows, router=router, version_map=version_map, bias=torch.ones(2))
    y = module(inputs[0])
    labels = router.route(inputs[0][0])
    for token in range(64):
        expected = rows[version_map[labels[token]]] @ inputs[0][0, token] + 1
        torch.testing.assert_close(y[0, token], expected)
    y.sum().backward()
    for version, (experts, _) in enumerate([([0, 1], 0), ([2], 0), ([0], 1), ([1, 2], 1)]):
        own = torch.isin(labels, torch.tensor(experts))
        torch.testing.assert_close(
            module.values.grad[version], inputs[0][0, own].sum(dim=0) * module.size
        )


@pytest.mark.parametrize("experts", [1, 2])
def test_a_cluster_bias_gets_the_gradient_of_its_tokens(experts):
    x = batches()[0]
    generator = torch.Generator().manual_seed(2)
    router = Router(torch.randn(5, 12, generator=generator), torch.zeros(5))
    rows = torch.randn(2 * experts, 12, generator=generator)
    version_map = torch.arange(2 * experts).view(experts, 2)
    bias = torch.randn(5, 2, generator=generator)
    cluster_expert = torch.tensor([0, 1, 0, 1, 1], dtype=torch.uint8) if experts == 2 else None
    module = TunableLinear(
        SolvedRows(rows), rows != 0, version_map, None, router, torch.ones(2), bias, cluster_expert
    )
    y, labels = module(x)[0], router.route(x[0])
    for token, cluster in enumerate(labels.tolist()):
        expert = 0 if cluster_expert is None else int(cluster_expert[cluster])
        expected = rows[version_map[expert]] @ x[0, token] + 1 + bias[cluster]
        torch.testing.assert_close(y[token], expected)
    y[:, 0].sum().backward()
    counts = torch.bincount(labels, minlength=5).float()
    grad = torch.stack((counts, 0 * counts), dim=1) * module.size
    torch.testing.assert_close(module.cluster_bias.grad, grad)
    torch.testing.assert_close(module.solved_cluster_bias(), bias)


def test_one_cluster_needs_no_router():
    x, rows = batches()[0], torch.randn(2, 12)
    own, bias = torch.arange(2).unsqueeze(0), torch.ones(1, 2)
    module = TunableLinear(SolvedRows(rows), rows != 0, own, None, None, None, bias)
    torch.testing.assert_close(module(x), x @ rows.t() + 1)


@pytest.mark.parametrize(("bits", "lr"), [(4, 3e-3), (8, 3e-4), (3, 1.5e-3), (2, 2.5e-3)])
def test_values_stay_on_their_grid(bits, lr):
    grid, inputs = Grid(bits, 8), batches()
    dense = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    parts = dense.t().unsqueeze(0).split(8, dim=1)
    scales = torch.cat([grid.scales(part, torch.ones(1, 1, 1)) for part in parts]).t()
    columns = scales.repeat_interleave(8, 1)[:, :12]
    module = linear(grid.round(dense, columns), grid, scales.half())
    targets = [x @ dense.t() for x in inputs]
    found = tune_block(lambda n: module(inputs[n]), targets, [module], epochs=30, lr=lr, quiet=True)
    solved = module.solved()
    q = solved.weights / solved.scales.float().repeat_interleave(8, 1)[:, :12]
    assert (q - q.round()).abs().max() < 1e-3 and q.abs().max() <= grid.largest + 1
    assert found.after <= found.before and found.after < 0.95 * found.before


def test_what_does_not_count_is_not_learned_from():
    inputs = batches(count=8)
    dense = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    targets = [x @ dense.t() for x in inputs]
    counts = [torch.arange(64).unsqueeze(0) < 40 for _ in inputs]
    for target in targets:
        target[:, 40:] = 1e6
    module = linear(dense)
    found = tune_block(
        lambda n: module(inputs[n]), targets, [module], epochs=2, lr=1e-2, counts=counts,
        quiet=True,
    )  # fmt: skip
    assert found.before < 1e-9
    torch.testing.assert_close(module.solved().weights, dense)


def test_an_explosion_leaves_the_best_values():
    inputs = batches(count=8)
    dense = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    start = dense * (torch.rand(4, 12, generator=torch.Generator().manual_seed(4)) < 0.5)
    module = linear(start)
    targets = [x @ dense.t() for x in inputs]
    found = tune_block(
        lambda n: module(inputs[n]), targets, [module], epochs=3, lr=1e20, quiet=True
    )
    assert found.diverged and found.after == found.before
    torch.testing.assert_close(module.solved().weights, start)


def test_steps_that_are_too_large_are_taken_back_and_made_smaller():
    inputs = batches(count=32)
    dense = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    module = linear(dense + 0.1 * torch.randn(4, 12, generator=torch.Generator().manual_seed(4)))
    found = tune_block(
        lambda n: module(inputs[n]), [x @ dense.t() for x in inputs], [module], epochs=8, lr=1.0,
        quiet=True,
    )  # fmt: skip
    assert not found.diverged and found.after < 0.1 * found.before


def test_a_token_that_comes_out_huge_is_not_all_that_counts():
    """One token of 2,048 whose output is 30 times what it should be, whatever is learnt: the others
    are learnt nearly as if it were not there. By squares their error is higher by a fifth."""
    generator = torch.Generator().manual_seed(4)
    dense, inputs = torch.randn(4, 12, generator=generator), batches()
    keep = torch.rand(4, 12, generator=generator) < 0.7
    targets = [x @ dense.t() for x in inputs]

    def tuned(spoiled: int | None) -> Tensor:
        module = linear(dense * keep)

        def run(number: int) -> Tensor:
            y = module(inputs[number])
            if number == spoiled:
                return torch.cat([y[:, :1] * 30, y[:, 1:]], dim=1)
            return y

        tune_block(run, targets, [module], epochs=20, lr=0.03, quiet=True)
        return module.solved().weights

    good, spoiled = tuned(None), tuned(5)

    def error(weights: Tensor) -> float:
        x, y = torch.cat(inputs), torch.cat(targets)
        return float(((x @ weights.t() - y).norm(dim=-1) / y.norm(dim=-1)).square().mean())

    assert error(spoiled) < 1.05 * error(good)


@pytest.mark.parametrize("seed", range(4))
def test_batches_of_which_nothing_counts_are_not_held_out(seed):
    """Nothing could be measured on them, and nothing would ever look better than the beginning."""
    weight = torch.zeros(3, requires_grad=True)
    goal = torch.tensor([1.0, -1.0, 2.0])
    counts = [4 if number % 5 == 0 else 0 for number in range(20)]
    result = train(
        lambda number: counts[number] * (weight - goal).square().sum(), counts, [weight],
        epochs=20, lr=0.2, seed=seed, quiet=True,
    )  # fmt: skip
    assert result.before > 0 and result.after < 0.1 * result.before
