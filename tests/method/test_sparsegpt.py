"""The batched solver against llm-compressor's own, and the properties of its masks."""

import pytest
import torch

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.grids import Grid
from wexpand_plugin.method.masks import MaskStructure
from wexpand_plugin.method.solvers import sparsegpt
from wexpand_plugin.method.solvers.sparsegpt import chunk_bytes, chunk_size, error_factor


def solve(*args, **options) -> torch.Tensor:
    """The weights alone, as floats need no more."""
    return sparsegpt.solve(*args, **options).weights


def hessians(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Means of x x^T of correlated inputs with uneven scales, as layers have."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        mix = torch.randn(width, width, generator=generator) / width**0.5
        x = torch.randn(4 * width, width, generator=generator) @ mix
        x *= 3 * torch.rand(width, generator=generator)
        found.append(x.t() @ x / len(x))
    return torch.stack(found)


def weights(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02


def upstream(weight, hessian, sparsity, structure, dampening=0.01):
    """The installed llm-compressor's answer for one linear and one Hessian."""
    sgpt = pytest.importorskip("llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify")
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    with torch.no_grad():
        _, sparse = sgpt.sparsify_weight(
            module=linear,
            hessians_dict={linear: hessian.clone()},
            sparsity=sparsity,
            prune_n=structure.n,
            prune_m=structure.m,
            block_size=128,
            dampening_frac=dampening,
            preserve_sparsity_mask=False,
        )
    return sparse


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("rows,width,experts", [(96, 64, 3), (320, 256, 2), (200, 172, 2)])
def test_equals_llmcompressor(structure, rows, width, experts):
    structure = MaskStructure.parse(structure)
    sparsity = 0.5 if structure.m else 0.8
    weight, hessian = weights(rows, width), hessians(experts, width)
    ours = solve(weight, hessian, sparsity, structure)
    for expert in range(experts):
        theirs = upstream(weight, hessian[expert], sparsity, structure)
        assert torch.equal(ours[expert] == 0, theirs == 0)
        assert (ours[expert] - theirs).abs().max() < 1e-5


def test_stacked_linears_are_solved_as_if_alone():
    hessian, parts = hessians(2, 128), [weights(64, 128, 2), 5 * weights(32, 128, 3)]
    structure = MaskStructure.parse("unstructured")
    together = solve(torch.cat(parts), hessian, 0.7, structure, linears=[64, 32])
    for part, found in zip(parts, together.split([64, 32], dim=1), strict=True):
        torch.testing.assert_close(found, solve(part, hessian, 0.7, structure), atol=1e-6, rtol=0)


def test_experts_may_be_solved_in_chunks():
    weight, hessian, structure = weights(40, 96), hessians(5, 96), MaskStructure.parse("row")
    whole = solve(weight, hessian, 0.6, structure)
    pieces = torch.cat([solve(weight, part, 0.6, structure) for part in hessian.split(2)])
    torch.testing.assert_close(whole, pieces, atol=1e-6, rtol=0)
    assert chunk_size(40, 96, 1) == 1
    assert chunk_size(40, 96, 3 * chunk_bytes(40, 96)) == 3


def test_pruned_weights_are_positive_zeros():
    weight = torch.full((4, 16), -1e-7, dtype=torch.float16)  # what underflows is -0.0 first
    weight[:, ::2] = -1.0
    sparse = solve(weight, hessians(1, 16), 0.5, MaskStructure.parse("row"))
    assert not torch.signbit(sparse[sparse == 0]).any()


def test_factor_is_lower_triangular_and_of_the_damped_hessian():
    hessian = hessians(2, 48).double()
    factor = error_factor(hessian, 0.01)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    damped = hessian + 0.01 * mean * torch.eye(48, dtype=torch.float64)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor.transpose(1, 2) @ factor, damped)


@pytest.mark.parametrize("width", [64, 172, 300])
def test_row_structure_keeps_the_same_count_in_every_row(width):
    sparse = solve(weights(50, width), hessians(2, width), 0.8, MaskStructure.parse("row"))
    counts = (sparse != 0).sum(dim=2)
    assert counts.min() == counts.max() == width - round(0.8 * width)


def test_rows_keep_more_of_the_columns_that_nothing_after_them_makes_up_for():
    weight, hessian = weights(200, 512), hessians(1, 512)
    sparse = solve(weight, hessian, 0.5, MaskStructure.parse("row"))[0]
    counts = torch.stack([(part != 0).sum(dim=1) for part in sparse.split(128, dim=1)])
    means = counts.float().mean(dim=1)
    assert bool((means[:-1] < means[1:]).all())
    assert counts.float().std(dim=1).min() > 1  # each row has counts of its own

    def error(found):
        return float((((found - weight) @ hessian[0]) * (found - weight)).sum())

    as_many = solve(weight, hessian, 0.5, MaskStructure.parse("unstructured"))[0]
    assert error(sparse) < error(as_many)  # which has as many in each block of columns


def test_row_structure_takes_one_sparsity_per_row():
    sparsity = torch.tensor([0.0, 0.5, 0.9, 0.0])
    weight = weights(4, 100)
    sparse = solve(weight, hessians(1, 100), sparsity, MaskStructure.parse("row"))[0]
    assert (sparse != 0).sum(dim=1).tolist() == [100, 50, 10, 100]
    assert torch.equal(sparse[[0, 3]], weight[[0, 3]])


@pytest.mark.parametrize("structure,removed,of", [("2:4", 2, 4), ("3:8", 3, 8), ("1:4", 1, 4)])
def test_n_of_m(structure, removed, of):
    parsed = MaskStructure.parse(structure)
    sparse = solve(weights(30, 144), hessians(2, 144), removed / of, parsed)
    zeros = (sparse.view(2, 30, -1, of) == 0).sum(dim=3)
    assert zeros.min() == zeros.max() == removed


def test_solution_is_better_than_masking_alone():
    weight, hessian = weights(64, 128), hessians(1, 128)
    sparse = solve(weight, hessian, 0.5, MaskStructure.parse("row"))[0]

    def error(candidate):
        change = candidate - weight
        return float(((change @ hessian[0]) * change).sum())

    assert error(sparse) < 0.8 * error(torch.where(sparse == 0, 0, weight))


def test_bfloat16_in_and_out():
    weight, hessian = weights(32, 64).bfloat16(), hessians(1, 64)
    sparse = solve(weight, hessian, 0.5, MaskStructure.parse("row"))
    assert sparse.dtype == torch.bfloat16
    exact = solve(weight.float(), hessian, 0.5, MaskStructure.parse("row"))
    assert torch.equal(sparse, exact.bfloat16())


def test_dead_columns_are_pruned_and_harmless():
    hessian = hessians(1, 64)
    hessian[:, 5] = hessian[:, :, 5] = 0
    sparse = solve(weights(16, 64), hessian, 0.5, MaskStructure.parse("row"))
    assert (sparse[0, :, 5] == 0).all() and torch.isfinite(sparse).all()


@pytest.mark.parametrize("grid", [None, Grid(3, 32)], ids=["floats", "int3"])
def test_the_size_of_inputs_means_nothing_beside_dead_columns(grid):
    weight, hessian = weights(16, 64), hessians(1, 64)
    hessian[:, 5] = hessian[:, :, 5] = 0
    one, other = (
        solve(weight, hessian * size, 0.5, MaskStructure.parse("row"), grid=grid)
        for size in (1.0, 2.0**-20)
    )
    assert torch.equal(one, other)


def test_a_group_that_is_likely_to_go_as_a_whole_keeps_what_is_kept_of_it():
    """Its scale is chosen before it is known what is."""
    weight, hessian = weights(48, 256), hessians(1, 256)
    hessian[:, :, :] *= torch.linspace(0.05, 4, 256).outer(torch.linspace(0.05, 4, 256))
    solved = solve(weight, hessian, 0.8, MaskStructure.parse("row"), grid=Grid(4, 8))
    kept = (solved[0] != 0).sum(dim=1)
    # a weight may be rounded to zero, but not all of a group
    assert kept.float().mean() > 0.97 * (256 - round(0.8 * 256))


def test_singular_hessians_are_damped_until_they_work():
    x = torch.randn(4, 64)
    sparse = solve(
        weights(16, 64), (x.t() @ x)[None], 0.5, MaskStructure.parse("row"), dampening=1e-12
    )
    assert torch.isfinite(sparse).all()


def test_hopeless_hessians_end_in_an_error():
    with pytest.raises(WexpandError, match="dampening_frac"):
        error_factor(-torch.eye(8)[None], 0.01)
    with pytest.raises(WexpandError, match="NaN"):
        solve(weights(4, 8), torch.full((1, 8, 8), torch.nan), 0.5, MaskStructure.parse("row"))


@pytest.mark.parametrize(
    "value,kind",
    [("2:4", "2:4"), (124, "2:4"), ("0:0", "unstructured"), ("row", "row"), (248, "4:8")],
)
def test_mask_structure_as_yaml_gives_it(value, kind):
    assert str(MaskStructure.parse(value)) == kind


@pytest.mark.parametrize("value", ["4:2", "2:4:8", "rows", 7, "", "-1:4", "4:4"])
def test_wrong_mask_structures(value):
    with pytest.raises(WexpandError, match="mask_structure"):
        MaskStructure.parse(value)


def test_misfits_are_named():
    with pytest.raises(WexpandError, match="in_features: 66 is not a multiple of 4"):
        solve(weights(4, 66), hessians(1, 66), 0.5, MaskStructure.parse("2:4"))
    with pytest.raises(WexpandError, match="block_size: 30"):
        solve(weights(4, 64), hessians(1, 64), 0.5, MaskStructure.parse("2:4"), block_size=30)
    with pytest.raises(WexpandError, match="one value per row"):
        solve(weights(2, 8), hessians(1, 8), torch.rand(2), MaskStructure.parse("unstructured"))


# --- grids


def naive(weight, hessian, sparsity, grid, scales, order=None):
    """Column by column in float64, every update at once: columns with large inputs first, masks by
    row in blocks of 128 columns, of which each has as many zeros as masking alone would give it."""
    order = hessian.diagonal().argsort(descending=True) if order is None else order
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    weight, width = weight.double()[:, order], weight.shape[1]
    cost = (weight / factor.diagonal()).square()
    likely = cost.argsort(dim=1).argsort(dim=1) < round(sparsity * width)
    for start in range(0, width, 128):
        end = min(start + 128, width)
        cost = (weight[:, start:end] / factor.diagonal()[start:end]).square()
        count = likely[:, start:end].sum(dim=1, keepdim=True)
        gone = cost.argsort(dim=1).argsort(dim=1) < count
        for i in range(start, end):
            scale = scales[:, order[i] // grid.group].double()
            value = grid.nearest((weight[:, i] / scale).nan_to_num()) * scale
            value = torch.where(gone[:, i - start], 0, value)
            error = (weight[:, i] - value) / factor[i, i]
            weight[:, i] = value
            weight[:, i + 1 :] -= error.unsqueeze(1) * factor[i, i + 1 :]
    return weight[:, order.argsort()]


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("bits,group", [(8, 128), (4, 64), (4, 32), (3, 128), (2, 64)])
def test_rounds_and_prunes_in_one_loop(bits, group, sparsity):
    weight, hessian, grid = weights(24, 300), hessians(1, 300), Grid(bits, group)
    found = sparsegpt.solve(weight, hessian, sparsity, MaskStructure.parse("row"), grid=grid)
    assert found.scales.shape == (1, 24, -(-300 // group)) and found.scales.dtype == torch.float16
    damped = hessian[0].double() + 0.01 * hessian[0].double().diagonal().mean() * torch.eye(300)
    expected = naive(weight, damped, sparsity, grid, found.scales[0])
    # a weight that lies between two values may fall to either, and moves others after it
    close = (found.weights[0] - expected).abs() < 1e-6
    assert close.double().mean() > 0.98
    change, right = (w.double() - weight.double() for w in (found.weights[0], expected))
    error = ((change @ damped) * change).sum()
    assert error == pytest.approx(float(((right @ damped) * right).sum()), rel=0.02)


def test_columns_with_large_inputs_come_first():
    weight, hessian, grid = weights(60, 256), hessians(1, 256)[0], Grid(4, 64)
    sizes = torch.ones(256)
    sizes[-32:] = 8  # those that would come last
    hessian = hessian * sizes * sizes.unsqueeze(1)
    row = MaskStructure.parse("row")
    found = sparsegpt.solve(weight, hessian.unsqueeze(0), 0.0, row, grid=grid)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(256)
    as_they_are = naive(weight, damped, 0.0, grid, found.scales[0], torch.arange(256))

    def error(change):
        return float(((change @ damped) * change).sum())

    assert error(found.weights[0].double() - weight) < 0.7 * error(as_they_are - weight)


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("structure", ["row", "unstructured", "2:4"])
def test_every_weight_lies_on_the_grid(structure, bits):
    weight, hessian, grid = weights(20, 96), hessians(3, 96), Grid(bits, 32)
    found = sparsegpt.solve(weight, hessian, 0.5, MaskStructure.parse(structure), grid=grid)
    scales = found.scales.float().repeat_interleave(32, dim=2)
    q = (found.weights / scales).nan_to_num()
    assert (q - q.round()).abs().max() < 1e-3 and q.min() >= -8.001 and q.max() <= 7.001
    assert (found.weights == 0).float().mean() >= 0.5
    if bits == 3:
        odd = q[found.weights != 0].round()
        assert (odd % 2 == 1).all() and odd.abs().max() == 7


def test_solving_beats_rounding_to_nearest():
    weight, hessian, grid = weights(40, 256), hessians(1, 256), Grid(4, 128)
    found = sparsegpt.solve(weight, hessian, 0.0, MaskStructure.parse("row"), grid=grid).weights[0]
    nearest = torch.empty_like(weight)
    for part in torch.arange(256).split(128):
        columns = weight[:, part].t().unsqueeze(0)
        scale = grid.scales(columns, torch.ones(1, 1, 1))
        nearest[:, part] = grid.round(columns, scale.unsqueeze(1))[0].t()

    def error(change):
        return float(((change @ hessian[0]) * change).sum())

    assert error(found - weight) < 0.8 * error(nearest - weight)
