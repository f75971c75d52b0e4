"""One sparse version of each neuron, to compare the experts with: what plain pruning would give.

From a directory pruned by SparseGPT (or any other method), packed by us or saved dense with its
zeros. Without one, a model whose experts share versions serves itself: each neuron's most used one.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...errors import WexpandError
from ...format.model_dir import ModelDir
from ...format.rowpool import RowPool
from .data import common_versions

__all__ = ["Baseline", "shared_base"]


class Baseline:
    """The pruned model in `directory`, one linear at a time."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.model = ModelDir(directory)
        self.ours = self.model.config.linears if self.model.ours else {}

    def weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Dense weight [out, in] of linear `name`; WexpandError if it is not there, not `shape`,
        neither pruned nor rounded, or has several experts."""
        if name in self.ours:
            linear = self.model.linear(name)
            pool = linear.pool
            if linear.cluster_bias is not None:
                raise WexpandError(
                    f"baseline: {self.directory}: {name} has biases of clusters; a baseline has "
                    "one sparse version of each neuron and no more"
                )
            if pool.experts > 1:
                raise WexpandError(
                    f"baseline: {self.directory}: {name} has {pool.experts} experts; a baseline "
                    "has one sparse version of each neuron"
                )
            weight = pool.expert(0)
        elif f"{name}.weight" in self.model.headers:
            weight = self.model.read(f"{name}.weight")
        else:
            raise WexpandError(f"baseline: {self.directory} has no linear {name}")
        if tuple(weight.shape) != shape:
            raise WexpandError(
                f"baseline: {self.directory}: {name} is {list(weight.shape)}, not {list(shape)}"
            )
        if name not in self.ours and bool((weight != 0).all()):
            raise WexpandError(
                f"baseline: {self.directory}: {name} holds no zeros; give a pruned model"
            )
        return weight


def shared_base(pool: RowPool, tokens: list[int]) -> tuple[Tensor, Tensor] | None:
    """Each neuron's most used row [out, in], and which neurons [out] have one that experts share.

    None where hardly any neuron has: a fully expanded linear has no common version.
    """
    if pool.row_map is None:
        return None
    versions, count = common_versions(pool.row_map, tokens)
    shared = count > 1
    if float(shared.float().mean()) < 0.1:
        return None
    return pool.rows(pool.first_versions()[:-1] + versions), shared.to(torch.bool)
