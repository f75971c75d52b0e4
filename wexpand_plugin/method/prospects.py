"""What each setting of a linear would cost: the candidates that `dial` chooses from.

Every candidate is solved, measured and let go of: the loss that it is predicted to add and its
bytes are all that is kept. Sparsities of one kind of values share a Hessian and a column loop,
stacked as if they were rows of one tall weight. Errors are measured on inputs that nothing was
solved for: least squares on few tokens looks better on these than on any others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import WexpandError
from .dial import Candidate, Setting
from .masks import MaskStructure
from .sensitivity import Sensitivity, added_loss
from .settings import Settings
from .solvers.sparsegpt import chunk_size, solve
from .versions import StoredBytes

__all__ = ["DENSE", "Dial", "Weighs", "prospects"]

DENSE = Setting("auto", 0.0)
"""a linear as it is"""

# Fewer bits come before more zeros: at equal bytes 16-bit values with many zeros lose far more than
# 4-bit values with few. Few zeros make nothing smaller, as they cost a bit for every weight.
SPARSITIES = {
    "auto": (0.0, 0.5),
    "int8": (0.0, 0.25, 0.5, 0.7, 0.8, 0.9),
    "int4": (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
}
"""kind of values -> sparsities that are tried"""

Weighs = Callable[[Setting], StoredBytes]
"""what things weigh in a setting"""


@dataclass(frozen=True)
class Dial:
    """What the settings of all linears are chosen by."""

    size_budget: float
    """bytes stored over dense bytes, of all linears together"""
    values: str
    """one of GRIDS, or "auto": any of them, or the dense dtype"""
    base: Settings
    """everything else; its own sparsity and values mean nothing"""

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> "Dial":
        """From the keys of a recipe with `sparsity: auto`; those left out are Settings' own.

        :raises WexpandError: a value that cannot be, by its key, with what would be right
        """
        plain = {"num_experts": 1, "num_clusters": 0, "budget_scope": "model"}
        for key, right in plain.items():
            if (value := keys.get(key, getattr(Settings, key))) != right:
                raise WexpandError(
                    f"{key}: {value!r} should be {right} with sparsity auto, which chooses "
                    "for linears of one expert over the whole model"
                )
        budget, values = keys.get("size_budget"), keys.get("values", Settings.values)
        if budget is None or not 0 < budget < 1:
            raise WexpandError(
                f"size_budget: {budget} should be above 0 and below 1 with sparsity auto, which "
                "chooses what is best in so many bytes"
            )
        structure = MaskStructure.parse(keys.get("mask_structure", Settings.mask_structure))
        some = {
            "sparsity": structure.n / structure.m if structure.m else 0.5,
            "values": "int4" if values == "auto" else values,
            "size_budget": None,
        }
        return cls(budget, values, Settings(**{**keys, **some}))

    def grid(self) -> dict[str, list[float]]:
        """The settings that a linear may have: kind of values -> sparsities."""
        structure = self.base.structure
        of_structure = (0.0, structure.n / structure.m) if structure.m else None
        return {
            kind: list(of_structure or sparsities)
            for kind, sparsities in SPARSITIES.items()
            if self.values in ("auto", kind)
        }

    def settings(self, setting: Setting) -> Settings:
        """How a linear of this setting is expanded; DENSE is not."""
        structure = str(self.base.structure) if setting.sparsity else "row"
        return replace(
            self.base, values=setting.values, sparsity=setting.sparsity, mask_structure=structure
        )

    def stored(self, setting: Setting, shape: torch.Size, weighs: Weighs) -> int:
        """Bytes, at most, of a linear [out, in] of this setting."""
        rows, width = shape
        if setting == DENSE:
            return weighs(setting).dense(rows, width)
        kept = width - round(width * setting.sparsity)
        # rows that differ in length may each end in a byte that is not full
        kept = min(width, kept + (self.base.structure.kind == "unstructured"))
        return rows * int(weighs(setting).row(torch.tensor([kept]), width))

    def least(self, shapes: Sequence[torch.Size], weighs: Weighs) -> int:
        """Bytes, at least, of linears of these shapes, whatever is chosen."""
        every = [Setting(kind, share) for kind, shares in self.grid().items() for share in shares]
        return sum(min(self.stored(one, shape, weighs) for one in every) for shape in shapes)


def prospects(
    weights: Sequence[Tensor],
    hessian: Tensor,
    unseen: Tensor,
    sensitivities: Sequence[Sensitivity],
    dial: Dial,
    weighs: Weighs,
) -> list[list[Candidate]]:
    """The candidates of each linear of an input group.

    :param weights: dense weights [out_i, in]
    :param hessian: mean of x x^T over the inputs to solve for [in, in], float32
    :param unseen: the same over other inputs, to measure errors on
    :param sensitivities: of the outputs of each
    """
    found: list[list[Candidate]] = [[] for _ in weights]
    linears = [len(weight) for weight in weights]
    for setting, solved in _solved(torch.cat(list(weights)), linears, hessian, dial):
        parts = solved.split(linears)
        for own, dense, part, sensitivity in zip(found, weights, parts, sensitivities, strict=True):
            stored = dial.stored(setting, dense.shape, weighs)
            loss = 0.0
            if setting != DENSE:
                loss = added_loss((part - dense).float(), unseen, sensitivity)
            own.append(Candidate(setting, loss, stored))
    return found


def _solved(
    weight: Tensor, linears: list[int], hessian: Tensor, dial: Dial
) -> Iterator[tuple[Setting, Tensor]]:
    """Each setting, and the weight [rows, in] that it gives."""
    base, (rows, width) = dial.base, weight.shape
    for kind, sparsities in dial.grid().items():
        if kind == DENSE.values and DENSE.sparsity in sparsities:
            yield DENSE, weight
            sparsities = [share for share in sparsities if share != DENSE.sparsity]
        stack = 1
        if base.structure.kind == "row":  # of which each row may have a sparsity of its own
            stack = next(
                n for n in range(len(sparsities), 0, -1)
                if n == 1 or chunk_size(n * rows, width, base.max_bytes) > 1
            )  # fmt: skip
        for first in range(0, len(sparsities), stack):
            some = sparsities[first : first + stack]
            own = dial.settings(Setting(kind, some[0]))
            shares = torch.tensor(some, dtype=torch.float64, device=weight.device)
            solved = solve(
                weight.repeat(len(some), 1), hessian.unsqueeze(0),
                some[0] if len(some) == 1 else shares.repeat_interleave(rows),
                own.structure, linears=linears * len(some), block_size=base.block_size,
                dampening=base.dampening_frac, grid=own.grid,
            )  # fmt: skip
            for share, part in zip(some, solved.weights[0].split(rows), strict=True):
                yield Setting(kind, share), part
