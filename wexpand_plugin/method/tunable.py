"""A linear whose kept values, scales and biases are trained, in float32 and relative to their size.

Masks, row maps and routers stay as they are, so no byte is added. A row version that experts share
gets the gradient of all their tokens. Values of a `Grid` are trained through their rounding (the
straight-through estimator: rounding counts as the identity), their scales beside them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .clusters import Router
from .grids import Grid
from .versions import SolvedRows

__all__ = ["TunableLinear"]


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

    @property
    def pace(self) -> float:
        """Of its training, times the learning rate."""
        return 1.0 if self.grid is None else self.grid.pace

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
            for expert, own in enumerate(_Experts.apply(weight, self.version_map)):
                tokens = (labels == expert).nonzero().squeeze(1)
                order.append(tokens)
                parts.append(rows[tokens] @ own.t())
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


class _Experts(torch.autograd.Function):
    """The weights of all experts from row versions: `weight[version_map]`, one by one.

    Torch's own gradient of a few of many rows has all rows; for sixteen experts they are made and
    added up sixteen times, which takes longer than all products of a step.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, version_map: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(version_map)
        ctx.versions = len(weight)
        return tuple(weight.index_select(0, versions) for versions in version_map)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (version_map,) = ctx.saved_tensors
        summed = gradients[0].new_zeros(ctx.versions, gradients[0].shape[1])
        for versions, gradient in zip(version_map, gradients, strict=True):
            summed.index_add_(0, versions, gradient)
        return summed, None
