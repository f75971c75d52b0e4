"""Which calibration batches a plan is made from: as many as it needs, drawn from all there are.

They are drawn by their identity (`calibration`): the same ones in whatever order the loader gives
them, and however several ranks share them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..method import ranks
from ..method.row_sample import order_of
from .calibration import Known

__all__ = ["PlanBatch", "plan_batches", "plan_tokens"]

PLAN_TOKENS = 8192
"""tokens that a plan is made from"""
PLAN_TOKENS_PER_COLUMN = 4
"""and for each input column of the widest linear"""
UNSEEN = 4
"""one batch in so many is kept to measure errors on; nothing is solved for it"""


@dataclass(frozen=True)
class PlanBatch:
    """A batch, and what is known of it."""

    inputs: dict[str, Tensor]
    """what the model's forward takes, on its device"""
    known: Known
    unseen: bool = False
    """whether it is one to measure errors on"""

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], device: torch.device) -> "PlanBatch":
        """`batch` as a data loader gives it."""
        inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        return cls(inputs, Known.of(batch))


def plan_tokens(linears: Iterable[nn.Linear]) -> int:
    """How many tokens a plan of `linears` needs."""
    widest = max(linear.weight.shape[1] for linear in linears)
    return max(PLAN_TOKENS, PLAN_TOKENS_PER_COLUMN * widest)


def plan_batches(
    loader: Iterable[Mapping[str, Tensor]],
    device: torch.device,
    need: float = math.inf,
    seed: int = 0,
) -> list[PlanBatch]:
    """Those of this rank's batches that a plan is made from; one, if there would be none.

    :param need: tokens that they have together, those of all ranks; by default all there are
    """
    own = [PlanBatch.of(batch, torch.device("cpu")) for batch in loader]
    tokens = ranks.gathered([batch.known.tokens for batch in own])
    drawn = []
    for rank, number in order_of([batch.known.identity for batch in own], seed):
        drawn.append((rank, number))
        need -= tokens[rank][number]
        if need <= 0:
            break
    unseen = set(drawn[UNSEEN - 1 :: UNSEEN])
    mine = [number for rank, number in drawn if rank == ranks.rank()]
    return [
        PlanBatch(
            {key: value.to(device) for key, value in own[number].inputs.items()},
            own[number].known, (ranks.rank(), number) in unseen,
        )
        for number in mine or range(min(1, len(own)))
    ]  # fmt: skip
