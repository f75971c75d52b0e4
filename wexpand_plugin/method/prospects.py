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

# Fewer bits come before more zeros, down to two bits: at equal bytes full rows in b - 1 bits lose
# less than sparse ones in b. Few zeros make nothing smaller, as they cost a bit for every weight;
# and half zeros in 16, 8, 6 or 5 bits are as large as full rows of fewer that lose less by far.
SPARSITIES = {
    "auto": (0.0,),
    "int8": (0.0,),
    "int6": (0.0,),
    "int5": (0.0,),
    "int4": (0.0, 0.3, 0.5),
    "int3": (0.0, 0.2, 0.5),
    "int2": (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
}
"""kind of values -> sparsities that are tried"""
ALONE = (0.0, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""of values that are given, which leave zeros alone to choose"""

Weighs = Callable[[Setting], StoredBytes]
"""what things weigh in a setting"""


@dataclass(frozen=True)
class Dial:
    """What the settings of all linears are chosen by."""

    size_budget: float | None
    """bytes stored over dense bytes, of all linears together; None: as many as it takes"""
    read_budget: float | None
    """bytes that a token reads over dense bytes; None: as many as it takes"""
    values: str
    """one of GRIDS, "float": the dense dtype, or "auto": any of these"""
    base: Settings
    """everything else; its own sparsity and values mean nothing"""

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> "Dial":
        """From the keys of a recipe with `sparsity: auto`; those left out are Settings' own.

        :raises WexpandError: a value that cannot be, by its key, with what would be right
        """
        experts = keys.get("num_experts", Settings.num_experts)
        plain = {"num_clusters": 0} | ({"budget_scope": "model"} if experts == 1 else {})
        for key, right in plain.items():
            if (value := keys.get(key, getattr(Settings, key))) != right:
                raise WexpandError(
                    f"{key}: {value!r} should be {right} with sparsity auto, which chooses "
                    "for linears without cluster biases over the whole model"
                )
        size, read = keys.get("size_budget"), keys.get("read_budget")
        if experts > 1 and read is None:
            raise WexpandError(
                f"read_budget: None should be above 0 and below 1 with sparsity auto and "
                f"num_experts {experts}: zeros and bits are chosen by what a token reads, and "
                "experts share what size_budget leaves; or num_experts 1"
            )
        if size is None and read is None:
            raise WexpandError(
                "size_budget: None should be above 0 and below 1 with sparsity auto, which "
                "chooses what is best in so many bytes"
            )
        bounds = {"read_budget": read} | ({"size_budget": size} if experts == 1 else {})
        for key, bound in bounds.items():
            if bound is not None and not 0 < bound < 1:
                raise WexpandError(
                    f"{key}: {bound} should be above 0 and below 1 with sparsity auto, which "
                    "chooses what is best in so many bytes"
                )
        structure = MaskStructure.parse(keys.get("mask_structure", Settings.mask_structure))
        values = keys.get("values", Settings.values)
        if experts > 1 and structure.kind == "unstructured":
            raise WexpandError(
                f"mask_structure: {structure} should be row or N:M with sparsity auto and "
                f"num_experts {experts}: what a token reads would depend on its expert"
            )
        some = {
            "sparsity": structure.n / structure.m if structure.m else 0.5,
            "values": "int4" if values == "auto" else values,
            "size_budget": None if experts == 1 else size,
            "read_budget": None,
        }
        return cls(size, read, values, Settings(**{**keys, **some}))

    @property
    def budgets(self) -> dict[str, float]:
        """Those that there are, by key."""
        both = {"size_budget": self.size_budget, "read_budget": self.read_budget}
        return {key: budget for key, budget in both.items() if budget is not None}

    def grid(self) -> dict[str, list[float]]:
        """The settings that a linear may have: kind of values -> sparsities."""
        structure = self.base.structure
        of_structure = (0.0, structure.n / structure.m) if structure.m else None
        kinds = SPARSITIES
        if self.values != "auto":
            kinds = {DENSE.values if self.values == "float" else self.values: ALONE}
        return {kind: list(of_structure or sparsities) for kind, sparsities in kinds.items()}

    def settings(self, setting: Setting) -> Settings:
        """How a linear of this setting is expanded; DENSE is not."""
        structure = str(self.base.structure) if setting.sparsity else "row"
        return replace(
            self.base, values=setting.values, sparsity=setting.sparsity, mask_structure=structure
        )

    def bytes_of(
        self, setting: Setting, shape: torch.Size, weighs: Weighs, router: bool = True
    ) -> tuple[int, int]:
        """Bytes, at most, of a linear [out, in] of this setting: stored, with one version of each
        row, and read by a token.

        :param router: whether a token reads the router with this linear; it does with one linear of
            an input group
        """
        (rows, width), weight = shape, weighs(setting)
        if setting == DENSE:
            return (weight.dense(rows, width),) * 2
        kept = width - round(width * setting.sparsity)
        # rows that differ in length may each end in a byte that is not full
        kept = min(width, kept + (self.base.structure.kind == "unstructured"))
        once, own = rows * int(weight.row(torch.tensor([kept]), width)), self.settings(setting)
        own = replace(own, stored_bytes=weight)
        return once + own.fixed_bytes(rows, width), once + own.fixed_read(rows, width, router)

    def least(self, shape: torch.Size, weighs: Weighs) -> tuple[int, int]:
        """Bytes, at least, of a linear of this shape, whatever is chosen: stored, and read, but for
        the router."""
        every = [Setting(kind, share) for kind, shares in self.grid().items() for share in shares]
        stored, read = zip(
            *(self.bytes_of(one, shape, weighs, router=False) for one in every), strict=True
        )
        return min(stored), min(read)


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
        every = zip(found, weights, parts, sensitivities, strict=True)
        for place, (own, dense, part, sensitivity) in enumerate(every):
            stored, read = dial.bytes_of(setting, dense.shape, weighs, router=place == 0)
            loss = 0.0
            if setting != DENSE:
                loss = added_loss((part - dense).float(), unseen, sensitivity)
            own.append(Candidate(setting, loss, stored, read))
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
                (n for n in range(len(sparsities), 1, -1)
                 if chunk_size(n * rows, width, base.max_bytes) > 1), 1
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
