"""SparseGPT, for all experts and all linears of an input group in one column loop.

SparseGPT (arXiv 2301.00774) prunes the columns of a weight from left to right. With U the upper
Cholesky factor of the inverse Hessian, the cost of removing weight w_rj is (w_rj / U_jj)^2, and
removing it adds -(w_rj / U_jj) U_j,j+1: to the columns to its right. Given U, rows do not see each
other. So

- linears that read the same tensor share H, hence U, and are solved as one tall weight [rows, in];
- experts differ in H alone: they form a batch [experts, in, rows];
- columns are cut into blocks (128: where masks are chosen) and sub-blocks (32: where updates are
  rank-1); everything to the right of a sub-block is updated by one matrix product.

With a `Grid`, kept weights are rounded to it in the same loop, after the weights to their left and
before those to their right, so that the same updates make up for pruning and for rounding (sparsity
0 is GPTQ, arXiv 2210.17323). A weight that is rounded to zero need not be kept.

U comes from one Cholesky factorisation: with J the reversal of rows, J H J = L L^T gives
H^-1 = U^T U for U = J L^-1 J, which is upper triangular.
"""

import math

import torch
from torch import Tensor

from ...errors import WexpandError
from ..grids import Grid
from ..masks import MaskStructure
from ..versions import SolvedRows

__all__ = ["chunk_size", "inverse_factor", "solve"]

SUB_BLOCK = 32
DAMPING_TRIES = 6


def inverse_factor(hessians: Tensor, dampening: float) -> Tensor:
    """U [batch, in, in], upper triangular: (H + damping)^-1 = U^T U. Overwrites `hessians`.

    Damping is `dampening` times the mean of H's diagonal; if that does not make H positive
    definite it grows tenfold, a few times.

    :raises WexpandError: H holds NaN, or stays singular with the largest damping tried
    """
    if not bool(torch.isfinite(hessians).all()):
        raise WexpandError("Hessian: the calibration inputs hold NaN or infinite values")
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean(dim=1, keepdim=True)
    damping = dampening
    diagonal += damping * mean
    for _ in range(DAMPING_TRIES):
        factor, info = torch.linalg.cholesky_ex(hessians.flip(1, 2))
        failed = info != 0
        if not bool(failed.any()):
            break
        grown = max(damping * 10, 1e-6)
        diagonal[failed] += (grown - damping) * mean[failed]
        damping = grown
    else:
        raise WexpandError(
            f"dampening_frac: {dampening} and up to {damping:g} leave the Hessian of "
            "the calibration inputs singular; use more calibration tokens or a larger value"
        )
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).flip(1, 2)


def solve(
    weight: Tensor,
    hessians: Tensor,
    sparsity: float | Tensor,
    structure: MaskStructure,
    *,
    linears: list[int] | None = None,
    block_size: int = 128,
    dampening: float = 0.01,
    grid: Grid | None = None,
) -> SolvedRows:
    """One sparse copy of `weight` per Hessian. `chunk_size` says how many to solve at once.

    :param weight: [rows, in] of one linear, or of several that share their input, stacked
    :param hessians: [experts, in, in] float32, any positive scale (mean of x x^T over an expert's
        tokens)
    :param sparsity: fraction pruned, 0 <= s < 1; with the `row` structure also a tensor [rows],
        one value per row
    :param linears: rows of each stacked linear; unstructured thresholds are taken within a linear
    :param block_size: columns per mask decision
    :param dampening: see `inverse_factor`
    :param grid: the values that kept weights may have; its group divides `block_size`
    :return: [experts, rows, in]
    """
    rows, width = weight.shape
    linears = linears or [rows]
    if structure.kind == "n:m":
        for name, value in (("block_size", block_size), ("in_features", width)):
            if value % structure.m:
                raise WexpandError(
                    f"{name}: {value} is not a multiple of {structure.m} "
                    f"(mask_structure {structure})"
                )
    if isinstance(sparsity, Tensor) and structure.kind != "row":
        raise WexpandError(f"sparsity: one value per row needs mask_structure row, not {structure}")
    dead = hessians.diagonal(dim1=1, dim2=2) == 0
    columns = weight.t().float().repeat(len(hessians), 1, 1)
    columns[dead] = 0
    factor = inverse_factor(hessians.clone(), dampening)
    scales = _solve_columns(columns, factor, sparsity, structure, linears, block_size, grid)
    solved = weight.new_empty(len(hessians), rows, width).copy_(columns.transpose(1, 2))
    # a value that underflows in `weight`'s dtype may have become -0.0
    return SolvedRows(solved.add_(0.0), scales)


def chunk_size(rows: int, width: int, max_bytes: int) -> int:
    """How many Hessians `solve` can take at once in `max_bytes` of working memory, at least 1:
    a weight [rows, width], a Hessian and four copies of it for each, in float32."""
    return max(1, max_bytes // (4 * width * (rows + 5 * width)))


def _solve_columns(
    columns: Tensor,
    factor: Tensor,
    sparsity: float | Tensor,
    structure: MaskStructure,
    linears: list[int],
    block_size: int,
    grid: Grid | None,
) -> Tensor | None:
    """The column loop, in place: `columns` [experts, in, rows], `factor` U [experts, in, in].

    Returns the grid's scales [experts, rows, groups].
    """
    width = columns.shape[1]
    sub_block = SUB_BLOCK - SUB_BLOCK % structure.m if structure.m else SUB_BLOCK
    sub_block = max(sub_block, structure.m)
    if grid is not None:
        sub_block = math.gcd(sub_block, grid.group)
    diagonal = factor.diagonal(dim1=1, dim2=2).unsqueeze(2)
    scales: list[Tensor] = []
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        block, errors = columns[:, start:end], torch.empty_like(columns[:, start:end])
        u, d = factor[:, start:end, start:end], diagonal[:, start:end]
        if structure.kind == "n:m":
            pruned = torch.zeros_like(block, dtype=torch.bool)  # chosen group by group below
        else:
            pruned = _choose(block.square() / d.square(), start, sparsity, structure, linears)
        for s in range(0, end - start, sub_block):
            e = min(s + sub_block, end - start)
            if grid is not None and s % grid.group == 0:
                part = slice(s, min(s + grid.group, end - start))
                gone = pruned[:, part]
                if structure.kind == "n:m":  # what would be pruned if nothing changed any more
                    gone = _lowest(block[:, part], d[:, part], structure)
                scales.append(grid.scales(block[:, part].masked_fill(gone, 0), d[:, part] ** -2))
            for i in range(s, e):
                if structure.kind == "n:m" and i % structure.m == 0:
                    few = slice(i, i + structure.m)
                    pruned[:, few] = _lowest(block[:, few], d[:, few], structure)
                weight, gone = block[:, i], pruned[:, i]
                if grid is None:
                    error = torch.where(gone, weight, 0) / d[:, i]
                    weight.masked_fill_(gone, 0)
                else:
                    value = grid.round(weight, scales[-1]).masked_fill_(gone, 0)
                    error = (weight - value) / d[:, i]
                    weight.copy_(value)
                errors[:, i] = error
                if i + 1 < e:
                    block[:, i + 1 : e].addcmul_(
                        u[:, i, i + 1 : e].unsqueeze(2), error.unsqueeze(1), value=-1
                    )
            if e < end - start:
                block[:, e:].baddbmm_(u[:, s:e, e:].transpose(1, 2), errors[:, s:e], alpha=-1)
        if end < width:
            columns[:, end:].baddbmm_(factor[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
    return torch.stack(scales, dim=2).half() if grid is not None else None


def _lowest(weights: Tensor, diagonal: Tensor, structure: MaskStructure) -> Tensor:
    """Where the n cheapest of every m columns are: booleans like `weights` [experts, in, rows]."""
    cost = (weights.square() / diagonal.square()).unflatten(1, (-1, structure.m))
    lowest = cost.topk(structure.n, dim=2, largest=False).indices
    return torch.zeros_like(cost, dtype=torch.bool).scatter_(2, lowest, True).flatten(1, 2)


def _choose(
    cost: Tensor,
    start: int,
    sparsity: float | Tensor,
    structure: MaskStructure,
    linears: list[int],
) -> Tensor:
    """Which weights of one block to prune: booleans like `cost` [experts, columns, rows]."""
    experts, count, _ = cost.shape
    if structure.kind == "row":
        # the running total is rounded, so narrow last blocks keep the row's overall sparsity exact
        # to one weight
        share = torch.as_tensor(sparsity, dtype=torch.float64, device=cost.device)
        number = torch.round(share * (start + count)) - torch.round(share * start)
        order = cost.transpose(1, 2).argsort(dim=2)
        rank = torch.empty_like(order).scatter_(
            2, order, torch.arange(count, device=cost.device).expand_as(order)
        )
        return (rank < number.reshape(1, -1, 1)).transpose(1, 2)
    if sparsity == 0:
        return torch.zeros_like(cost, dtype=torch.bool)
    masks = []
    for part in cost.split(linears, dim=2):
        # upstream's rule, kept so that masks are equal: everything up to and including this order
        # statistic
        flat = part.reshape(experts, -1)
        threshold = flat.kthvalue(int(flat.shape[1] * sparsity) + 1, dim=1).values
        masks.append(part <= threshold.view(-1, 1, 1))
    return torch.cat(masks, dim=2)
