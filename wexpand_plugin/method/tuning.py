"""Block tuning: what is kept is trained to reproduce the outputs of the dense block.

A solver sees one linear at a time and minimises the error of its outputs. What matters is the error
of the block's output, to which the linears contribute together, and to which earlier blocks have
contributed already: the inputs are those that the compressed model produces. So after a block has
been solved, its kept values, biases and cluster biases are trained by Adam, in float32, on the
squared error between the block's output on those inputs and the dense model's output, each token's
relative to the size of what the dense model gives: the next block normalises its input, and a few
tokens that are a thousand times larger than the rest would else be all that counts.

Masks, row maps and routers stay as they are, so no byte is added. A row version that experts share
gets the gradient of all their tokens. Values of a `Grid` are trained through their rounding (the
straight-through estimator: rounding counts as the identity), their scales beside them. A part of
the calibration batches is held out: the values that did best on it are kept, be it those of the
solver.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .clusters import Router
from .grids import Grid
from .versions import SolvedRows

__all__ = ["TunableLinear", "TuneResult", "tune_block"]

HELD_OUT = 16
"""one batch in so many is held out"""
STEP_TOKENS = 2048
"""tokens of a step, at least, if the calibration set is not small"""
LEAST_STEPS = 8
"""steps of an epoch, at least, if there are as many batches"""
PATIENCE = 3
"""epochs without progress on the held-out batches before training ends"""


class TunableLinear(nn.Module):
    """A linear with trainable row versions: y = W_e x + b + B_c, c being the router's choice.

    :param rows: the row versions [versions, in], zeros where pruned
    :param keep: which weights are trained, booleans [versions, in]
    :param version_map: the row version of each expert and neuron, int64 [experts, out]
    :param grid: that `rows` lie on, with their scales; None for floats
    :param router: None with one cluster
    :param bias: [out], trained too
    :param cluster_bias: B [clusters, out], trained too
    :param cluster_expert: e of each cluster; None: c itself
    """

    def __init__(
        self,
        rows: SolvedRows,
        keep: Tensor,
        version_map: Tensor,
        grid: Grid | None,
        router: Router | None,
        bias: Tensor | None,
        cluster_bias: Tensor | None = None,
        cluster_expert: Tensor | None = None,
    ):
        super().__init__()
        self.grid, self.router, self.version_map = grid, router, version_map
        self.cluster_expert = None if cluster_expert is None else cluster_expert.long()
        self.keep, self.dtype = keep, rows.weights.dtype
        # relative to their size: a learning rate means the same for weights of any size
        kept = rows.weights[keep].float()
        self.size = float(kept.square().mean().sqrt()) if kept.numel() and kept.any() else 1.0
        self.values = nn.Parameter(rows.weights.float() / self.size)
        self.bias = None if bias is None else nn.Parameter(bias.float() / self.size)
        self.cluster_bias = None
        if cluster_bias is not None:
            self.cluster_bias = nn.Parameter(cluster_bias.float() / self.size)
        self.scales = rows.scales
        # relative: an equal step for scales of any size
        self.stretch = None
        if rows.scales is not None:
            self.stretch = nn.Parameter(torch.zeros(rows.scales.shape, device=keep.device))

    def weight(self) -> Tensor:
        """The row versions as they would be stored, float32 [versions, in]."""
        if self.grid is None or self.scales is None or self.stretch is None:
            return self.values * (self.size * self.keep)
        q, rounded = self._integers(self.grid)
        stretched = self._columns(self.scales.float() * self.stretch.exp())
        return (q + (rounded - q).detach()) * stretched * self.keep

    def _integers(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The values in units of the scales that they came with, before and after rounding."""
        assert self.scales is not None
        q = self.values * (self.size / self._columns(self.scales.float()).clamp(min=1e-8))
        return q, grid.nearest(q.detach())

    def _columns(self, scales: Tensor) -> Tensor:
        """The scale of each weight: [versions, groups] -> [versions, in]."""
        assert self.grid is not None
        return scales.repeat_interleave(self.grid.group, 1)[:, : self.values.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        weight, rows = self.weight().to(x.dtype), x.reshape(-1, x.shape[-1])
        clusters = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        if self.router is not None:
            clusters = self.router.route(rows.detach())
        if len(self.version_map) == 1:
            y = rows @ weight[self.version_map[0]].t()
        else:
            order, parts = [], []
            labels = clusters
            if self.cluster_expert is not None:
                labels = self.cluster_expert[clusters]
            for expert in range(len(self.version_map)):
                tokens = (labels == expert).nonzero().squeeze(1)
                order.append(tokens)
                parts.append(rows[tokens] @ weight[self.version_map[expert]].t())
            y = torch.cat(parts)[torch.cat(order).argsort()]
        if self.bias is not None:
            y = y + (self.bias * self.size).to(x.dtype)
        if self.cluster_bias is not None:
            own = nn.functional.embedding(clusters, self.cluster_bias)
            y = y + (own * self.size).to(x.dtype)
        return y.view(*x.shape[:-1], y.shape[1])

    @torch.no_grad()
    def solved_bias(self) -> Tensor | None:
        """The bias as it is now, float32 [out]; None for a linear without one."""
        return None if self.bias is None else self.bias * self.size

    @torch.no_grad()
    def solved_cluster_bias(self) -> Tensor | None:
        """The biases of the clusters as they are now, float32 [clusters, out]; None without."""
        return None if self.cluster_bias is None else self.cluster_bias * self.size

    @torch.no_grad()
    def solved(self) -> SolvedRows:
        """The row versions as they are now, on their grid, in the dtype that they came in."""
        if self.grid is None or self.scales is None or self.stretch is None:
            return SolvedRows(self.weight().to(self.dtype).add_(0.0))
        scales = (self.scales.float() * self.stretch.exp()).half()
        weight = self._integers(self.grid)[1] * self._columns(scales.float()) * self.keep
        return SolvedRows(weight.to(self.dtype).add_(0.0), scales)


@dataclass(frozen=True)
class TuneResult:
    """Relative squared error of a block's outputs, the mean over the held-out tokens."""

    before: float
    after: float
    epochs: int
    """that were trained"""
    diverged: bool = False
    """training led to values that are not finite; what was there before has been kept"""


def tune_block(
    run: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    linears: Sequence[TunableLinear],
    *,
    epochs: int,
    lr: float,
    seed: int = 0,
    counts: Sequence[Tensor | None] | None = None,
    quiet: bool = False,
) -> TuneResult:
    """Train `linears`, in place, until the block's outputs are close to `targets`.

    :param run: output [..., hidden] of the block, with `linears` in it, on a calibration batch
    :param targets: what the dense model has there, one for each batch, as `run` gives it
    :param epochs: passes over the batches that are not held out, at most
    :param lr: of Adam, relative to the size of a linear's weights; falls linearly to 0
    :param seed: of the order of the batches
    :param counts: of each batch, which tokens count: booleans [...]; None: all
    """
    counts = counts or [None] * len(targets)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator).tolist()
    held_out = order[: max(1, len(order) // HELD_OUT)] if len(order) > 1 else order
    train = order[len(held_out) :] or order

    def error(number: int) -> Tensor:
        """Sum of the relative squared error of the tokens of a batch that count."""
        y, target = run(number).float(), targets[number].float()
        size = target.square().sum(dim=-1)
        change = (y - target.to(y)).square().sum(dim=-1) / size.clamp(min=1e-12).to(y)
        count = counts[number]
        return change.sum() if count is None else change[count.to(change.device)].sum()

    def tokens(number: int) -> int:
        count = counts[number]
        return targets[number][..., 0].numel() if count is None else int(count.sum())

    seen = max(1, sum(map(tokens, held_out)))

    def measure() -> float:
        with torch.no_grad():
            return sum(float(error(number)) for number in held_out) / seen

    usual = max(1, sum(map(tokens, train)) / len(train))
    parameters = [p for linear in linears for p in linear.parameters()]
    size = max(1, min(round(STEP_TOKENS / usual), len(train) // LEAST_STEPS))
    steps = -(-len(train) // size)
    adam = torch.optim.Adam(parameters, lr=lr)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: 1 - n / (epochs * steps + 1))
    before = lowest = measure()
    best, since, trained = _copy(parameters), 0, 0
    diverged = not math.isfinite(before)
    with tqdm(total=epochs * steps, desc="Tuning", leave=False, disable=quiet) as bar:
        for _ in range(0 if diverged else epochs):
            trained += 1
            shuffled = torch.randperm(len(train), generator=generator).tolist()
            for first in range(0, len(train), size):
                some = shuffled[first : first + size]
                adam.zero_grad()
                with torch.enable_grad():
                    for place in some:
                        (error(train[place]) / (usual * len(some))).backward()
                adam.step()
                decay.step()
                bar.update()
            found = measure()
            bar.set_postfix_str(f"error {before:.4f} -> {found:.4f}")
            if not math.isfinite(found):
                diverged = True
                break
            if found < lowest:
                lowest, best, since = found, _copy(parameters), 0
            elif (since := since + 1) >= PATIENCE:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return TuneResult(before, lowest, trained, diverged)


def _copy(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
