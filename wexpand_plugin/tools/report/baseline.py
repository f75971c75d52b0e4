"""One sparse version of each neuron, to compare the experts with: what plain pruning would give.

From a directory pruned by SparseGPT (or any other method), packed by us or saved dense with its
zeros. Without one, a model whose experts share versions serves itself: each neuron's most used one.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...errors import WexpandError
from ...format import checkpoint
from ...format.config import WexpandConfig
from ...format.rowpool import RowPool, unpack_rows
from .data import common_versions

__all__ = ["Baseline", "shared_base"]


class Baseline:
    """The pruned model in `directory`, one linear at a time."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        found = checkpoint.read_json(self.directory / "config.json").get("quantization_config")
        self.config: WexpandConfig | None = None
        if found:
            self.config = checkpoint.read_config(self.directory)
            self.files = checkpoint.tensor_files(self.directory)
        else:
            self.files = checkpoint.tensor_files(checkpoint.weight_files(self.directory))

    def weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Dense weight [out, in] of linear `name`; WexpandError if it is not there, not `shape`,
        not pruned, or has several experts."""
        from safetensors import safe_open

        if self.config is not None and name in self.config.linears:
            pool, _, _ = checkpoint.read_linear(self.files, name, self.config)
            if pool.experts > 1:
                raise WexpandError(
                    f"baseline: {self.directory}: {name} has {pool.experts} experts; a baseline "
                    "has one sparse version of each neuron"
                )
            weight = pool.expert(0)
        elif f"{name}.weight" in self.files:
            with safe_open(self.files[f"{name}.weight"], framework="pt") as tensors:
                weight = tensors.get_tensor(f"{name}.weight")
        else:
            raise WexpandError(f"baseline: {self.directory} has no linear {name}")
        if tuple(weight.shape) != shape:
            raise WexpandError(
                f"baseline: {self.directory}: {name} is {list(weight.shape)}, not {list(shape)}"
            )
        if bool((weight != 0).all()):
            raise WexpandError(
                f"baseline: {self.directory}: {name} holds no zeros; give a pruned model"
            )
        return weight


def shared_base(pool: RowPool, tokens: list[int]) -> tuple[Tensor, Tensor] | None:
    """Each neuron's most used row [out, in], and which neurons [out] have one that experts share.

    None where hardly any neuron has: a fully expanded linear has no common version.
    """
    versions, count = common_versions(pool.row_map, tokens)
    shared = count > 1
    if pool.experts == 1 or float(shared.float().mean()) < 0.1:
        return None
    return unpack_rows(pool, versions), shared.to(torch.bool)
