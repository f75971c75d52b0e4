"""SparseGPT, for all experts and all linears of an input group in one column loop.

SparseGPT (arXiv 2301.00774) prunes the columns of a weight from left to right, in blocks. With U
the upper Cholesky factor of the inverse Hessian, the cost of removing weight w_rj is
(w_rj / U_jj)^2, and removing it adds -(w_rj / U_jj) U_j,j+1: to the columns to its right. Given U,
rows do not see each other. So

- linears that read the same tensor share H, hence U, and are solved as one tall weight [rows, in];
- experts differ in H alone: they form a batch [experts, in, rows];
- columns are cut into blocks (128: where masks are chosen) and sub-blocks (16: where updates are
  rank-1); everything to the right of a sub-block in its block is updated by one matrix product.

Between blocks the same updates need no inverse. With H = T^T T, T lower triangular, and e = w - q
what the columns before a block b have lost, the error |T e|^2 is least for columns of the block
that gain T_bb^-1 T_b,<b e. Within it U_bb = T_bb^-T. So U itself, three times the work of T in a
wide linear, is never made, and all that a block takes from those before it is one matrix product.

Later columns have fewer left that could make up for them, so they lose more. So the weights that a
row keeps are counted for each block by what removing any of its weights would cost, if no other
changed; which ones go is decided when the block's turn comes.

With a `Grid`, kept weights are rounded to it in the same loop, after the weights to their left and
before those to their right, so that the same updates make up for pruning and for rounding (sparsity
0 is GPTQ, arXiv 2210.17323). A weight that is rounded to zero need not be kept. Every weight loses
something then, and columns with large inputs, whose errors weigh most, come first, while all others
can still make up for them; scales are chosen before. Pruning alone spares these columns by itself,
and takes them as they come.

T comes from one Cholesky factorisation: with J the reversal of rows, J H J = L L^T gives
T = J L^T J.
"""

import torch
from torch import Tensor

from ...errors import WexpandError
from ..finite import is_finite
from ..grids import Grid
from ..masks import MaskStructure
from ..versions import SolvedRows

__all__ = ["chunk_bytes", "chunk_size", "error_factor", "solve"]

SUB_BLOCK = 16
ROWS = 1024
"""whose weights are sorted at a time, over their whole width"""
DAMPING_TRIES = 6


def error_factor(
    hessians: Tensor, dampening: float, *, order: Tensor | None = None, overwrite: bool = False
) -> Tensor:
    """T [batch, in, in], lower triangular: H + damping = T^T T; with `overwrite` in the place of H.

    Damping is `dampening` times the mean of H's diagonal; if that does not make H positive
    definite it grows tenfold, a few times.

    :param order: [batch, in], that H's rows and columns are taken in; None: as they are

    :raises WexpandError: H holds NaN or infinity, or stays singular with the largest damping tried
    """
    if not is_finite(hessians):
        raise WexpandError(
            "Hessian: the calibration inputs hold NaN or infinite values, or some whose squares "
            "overflow"
        )
    factors = hessians if overwrite else torch.empty_like(hessians)
    width = hessians.shape[-1]
    last = torch.arange(width - 1, -1, -1, device=hessians.device).expand(len(hessians), -1)
    for hessian, factor, own in zip(
        hessians, factors, last if order is None else order.flip(1), strict=True
    ):
        factor.copy_(_reversed_cholesky(hessian[own.unsqueeze(1), own], dampening).flip(0, 1).mT)
    return factors


def _reversed_cholesky(hessian: Tensor, dampening: float) -> Tensor:
    """L of H + damping = L L^T; H is overwritten."""
    diagonal, damping = hessian.diagonal(), dampening
    live = diagonal != 0
    # of columns with inputs, so that damping goes with their size; others get any positive value
    mean = torch.where(live.any(), diagonal.sum() / live.sum().clamp(min=1), 1.0)
    diagonal[~live] = mean
    diagonal += damping * mean
    for _ in range(DAMPING_TRIES):
        factor, info = torch.linalg.cholesky_ex(hessian)
        if not int(info):
            return factor
        grown = max(damping * 10, 1e-6)
        diagonal += (grown - damping) * mean
        damping = grown
    raise WexpandError(
        f"dampening_frac: {dampening} and up to {damping:g} leave the Hessian of "
        "the calibration inputs singular; use more calibration tokens or a larger value"
    )


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
    overwrite: bool = False,
) -> SolvedRows:
    """One sparse copy of `weight` per Hessian. `chunk_size` says how many to solve at once.

    :param weight: [rows, in] of one linear, or of several that share their input, stacked
    :param hessians: [experts, in, in] float32, any positive scale (mean of x x^T over an expert's
        tokens)
    :param sparsity: fraction pruned, 0 <= s < 1; with the `row` structure also a tensor [rows],
        one value per row
    :param linears: rows of each stacked linear; unstructured thresholds are taken within a linear
    :param block_size: columns per mask decision
    :param dampening: see `error_factor`
    :param grid: the values that kept weights may have; its group divides `block_size`
    :param overwrite: whether `hessians` are not needed any more
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
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    if grid is None or structure.kind == "n:m":  # whose columns stand together
        order = torch.arange(width, device=weight.device).expand(len(hessians), -1)
    else:
        order = diagonal.argsort(dim=1, descending=True, stable=True)
    columns = weight.t().float()[order]
    columns[diagonal.gather(1, order) == 0] = 0
    factor = error_factor(hessians, dampening, order=order, overwrite=overwrite)
    solved = weight.new_empty(len(hessians), rows, width)
    scales = _solve_columns(
        columns, factor, order, solved, sparsity, structure, linears, block_size, grid
    )
    return SolvedRows(solved, scales)


def chunk_bytes(rows: int, width: int) -> int:
    """Working memory of `solve` for each Hessian, in float32: a weight [rows, width], the Hessian,
    its factor, and what one is mixed from or a block of columns takes, about as much again. A mask
    of the weight, a byte each, is left out."""
    return 4 * width * (rows + 3 * width)


def chunk_size(rows: int, width: int, max_bytes: int) -> int:
    """How many Hessians `solve` can take at once in `max_bytes` of working memory, at least 1."""
    return max(1, max_bytes // chunk_bytes(rows, width))


def _solve_columns(
    columns: Tensor,
    factor: Tensor,
    order: Tensor,
    solved: Tensor,
    sparsity: float | Tensor,
    structure: MaskStructure,
    linears: list[int],
    block_size: int,
    grid: Grid | None,
) -> Tensor | None:
    """The column loop, from `columns` [experts, in, rows] and `factor` T [experts, in, in], both in
    `order` [experts, in], to `solved` [experts, rows, in]. `columns` become what the rows have
    lost.

    Returns the grid's scales [experts, rows, groups].
    """
    width = columns.shape[1]
    sub_block = SUB_BLOCK - SUB_BLOCK % structure.m if structure.m else SUB_BLOCK
    sub_block = max(sub_block, structure.m)
    identity = torch.eye(block_size, dtype=factor.dtype, device=factor.device)
    d = 1 / factor.diagonal(dim1=1, dim2=2).unsqueeze(2)  # the diagonal of U
    dense = not isinstance(sparsity, Tensor) and sparsity == 0
    likely = None
    if not dense and (grid is not None or structure.kind == "row"):
        likely = _likely(columns, d, sparsity, structure, linears, block_size)
    if grid is not None:
        scales = _scales(columns, d, order, likely, grid)
        groups, each = order // grid.group, torch.arange(len(order), device=order.device)
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        own = factor[:, start:end, start:end]
        unit = identity[: end - start, : end - start]
        u = torch.linalg.solve_triangular(own, unit, upper=False).mT
        lost, errors = columns[:, start:end], torch.empty_like(columns[:, start:end])
        u_own = d[:, start:end]
        # what the columns gain from those before the block; as the loop goes on, what they become
        block = torch.baddbmm(lost, u.mT @ factor[:, start:end, :start], columns[:, :start])
        if dense or structure.kind == "n:m":  # of which each group's turn comes below
            pruned = torch.zeros_like(block, dtype=torch.bool)
        elif structure.kind == "row":
            assert likely is not None
            number = likely[:, start:end].sum(dim=1)
            pruned = _cheapest((block / u_own).square_(), number)
        else:
            pruned = _below((block / u_own).square_(), float(sparsity), linears)
        for s in range(0, end - start, sub_block):
            e = min(s + sub_block, end - start)
            for i in range(s, e):
                if structure.kind == "n:m" and i % structure.m == 0:
                    few = slice(i, i + structure.m)
                    pruned[:, few] = _lowest(block[:, few], u_own[:, few], structure)
                weight, gone = block[:, i], pruned[:, i]
                if grid is None:
                    error = torch.where(gone, weight, 0) / u_own[:, i]
                    weight.masked_fill_(gone, 0)
                else:
                    scale = scales[each, groups[:, start + i]]
                    value = grid.round(weight, scale).masked_fill_(gone, 0)
                    error = (weight - value) / u_own[:, i]
                    weight.copy_(value)
                errors[:, i] = error
                if i + 1 < e:
                    block[:, i + 1 : e].addcmul_(
                        u[:, i, i + 1 : e].unsqueeze(2), error.unsqueeze(1), value=-1
                    )
            if e < end - start:
                block[:, e:].baddbmm_(u[:, s:e, e:].mT, errors[:, s:e], alpha=-1)
        lost -= block
        # a value that underflows in the weight's dtype may have become -0.0
        found = block.transpose(1, 2).to(solved.dtype).add_(0.0)
        solved.scatter_(2, order[:, None, start:end].expand_as(found), found)
    return scales.transpose(1, 2).half() if grid is not None else None


def _likely(
    columns: Tensor,
    d: Tensor,
    sparsity: float | Tensor,
    structure: MaskStructure,
    linears: list[int],
    block_size: int,
) -> Tensor:
    """What would be pruned if no weight changed: booleans like `columns` [experts, in, rows].

    :param d: diagonal of U [experts, in, 1]
    """
    if structure.kind == "n:m":
        return _lowest(columns, d, structure)
    if structure.kind == "unstructured":
        blocks = zip(columns.split(block_size, dim=1), d.split(block_size, dim=1), strict=True)
        masks = [_below((part / own).square_(), float(sparsity), linears) for part, own in blocks]
        return torch.cat(masks, dim=1)
    experts, width, rows = columns.shape
    share = torch.as_tensor(sparsity, dtype=torch.float64, device=columns.device)
    number = torch.round(share * width).long().expand(experts, rows)
    parts = zip(columns.split(ROWS, dim=2), number.split(ROWS, dim=1), strict=True)
    return torch.cat([_cheapest((part / d).square_(), own) for part, own in parts], dim=2)


def _scales(
    columns: Tensor, d: Tensor, order: Tensor, gone: Tensor | None, grid: Grid
) -> Tensor:
    """The scales of each group of columns [experts, groups, rows].

    :param columns: [experts, in, rows] in `order` [experts, in], as are `d` [experts, in, 1] and
        `gone`, what is likely to be pruned
    """
    found = []
    for own in order.argsort(dim=1).split(grid.group, dim=1):  # where they are now
        place = own.unsqueeze(2)
        several = place.expand(-1, -1, columns.shape[2])
        part = columns.gather(1, several)
        if gone is not None:
            likely = gone.gather(1, several)
            # something of a group may be kept after all, and then needs a scale
            part.masked_fill_(likely & ~likely.all(dim=1, keepdim=True), 0)
        found.append(grid.scales(part, d.gather(1, place) ** -2))
    return torch.stack(found, dim=1)


def _lowest(weights: Tensor, diagonal: Tensor, structure: MaskStructure) -> Tensor:
    """Where the n cheapest of every m columns are: booleans like `weights` [experts, in, rows]."""
    cost = (weights / diagonal).square_().unflatten(1, (-1, structure.m))
    lowest = cost.topk(structure.n, dim=2, largest=False).indices
    return torch.zeros_like(cost, dtype=torch.bool).scatter_(2, lowest, True).flatten(1, 2)


def _cheapest(cost: Tensor, number: Tensor) -> Tensor:
    """The cheapest weights of each row: booleans like `cost` [experts, columns, rows].

    :param number: how many [experts, rows]
    """
    last = (number - 1).clamp(min=0).unsqueeze(2)
    threshold = _sorted(cost.transpose(1, 2)).gather(2, last).squeeze(2)
    pruned = cost <= threshold.masked_fill_(number == 0, -1.0).unsqueeze(1)
    # of equal costs, zeros nearly always, the first
    expert, row = (pruned.sum(dim=1) > number).nonzero(as_tuple=True)
    if len(expert):
        rank = cost[expert, :, row].argsort(dim=1, stable=True).argsort(dim=1)
        pruned[expert, :, row] = rank < number[expert, row].unsqueeze(1)
    return pruned


def _below(cost: Tensor, sparsity: float, linears: list[int]) -> Tensor:
    """The cheapest weights of each linear in a block: booleans like `cost` [experts, columns,
    rows]."""
    masks = []
    for part in cost.split(linears, dim=2):
        # upstream's rule, kept so that masks are equal: everything up to and including this order
        # statistic
        flat = part.reshape(len(part), -1)
        threshold = _smallest(flat, int(flat.shape[1] * sparsity))
        masks.append(part <= threshold.view(-1, 1, 1))
    return torch.cat(masks, dim=2)


def _sorted(values: Tensor) -> Tensor:
    """Along the last dimension."""
    if values.device.type != "cpu":
        return values.sort().values
    import numpy as np  # sorts with vector instructions where torch does not

    return torch.from_numpy(np.sort(values.numpy()))


def _smallest(values: Tensor, number: int) -> Tensor:
    """Of each row of [n, m], the value that `number` others come before: [n]."""
    if values.device.type != "cpu":
        return values.kthvalue(number + 1).values
    import numpy as np

    return torch.from_numpy(np.partition(values.numpy(), number)[:, number])
