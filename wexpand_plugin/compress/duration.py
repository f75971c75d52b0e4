"""How long expanding a model will take, told before any work.

What is done is counted from shapes: passes of a block, products for Hessians, columns solved,
errors weighed. How fast this machine is at each is measured, on a few hundred tokens and a small
solve: constants from elsewhere would be off by the ratio of two machines. Reading, tracing and
saving the model are not counted.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as multiply

from ..method.settings import Settings
from ..method.solvers.sparsegpt import chunk_size, solve
from .remembered import remembered_bytes
from .together import TOGETHER

__all__ = ["START", "Speed", "seconds"]

TOKENS = 1024
"""that speeds are measured with, at most"""
OTHERS = 1.3
"""time of a block over that of its linears: attention, norms, moving tensors"""
PCA = 50
"""products that finding a component takes for each value of the sample"""
EPOCH = 4
"""passes that an epoch of tuning is worth, backward included"""
SOLVED = 256
"""columns of what is solved to measure the solver"""
COLD = 1.3
"""time of work whose data is nowhere near over that of the same done again and again"""
START = 4.0
"""seconds that no block takes: the model is traced, and all is called for the first time"""
HELD_OUT = 256
"""rows of an expert, at most, that a version is judged by"""


@dataclass(frozen=True)
class Speed:
    """Of a machine, in seconds."""

    token: float
    """that a token takes in a block"""
    routed: float
    """that it takes there with experts"""
    product: float
    """of a multiplication and an addition in float32 products"""
    weight: float
    """that the solver takes for a weight"""
    column: float
    """that the solver takes for a column, however few weights it has"""

    @classmethod
    def measured(cls, block: nn.Module, batch: int, settings: Settings) -> "Speed":
        """Of this machine, for blocks like `block`.

        :param batch: tokens of a calibration batch
        """
        shapes: dict[tuple[torch.Size, torch.dtype], int] = {}
        device = torch.device("cpu")
        for module in block.modules():
            if isinstance(module, nn.Linear):
                key = module.weight.shape, module.weight.dtype
                shapes[key] = shapes.get(key, 0) + 1
                device = module.weight.device
        # with routers short batches are run together
        batch = TOGETHER if settings.clusters > 1 else max(1, batch)
        rows = min(batch, TOKENS)
        one = routed = 0.0
        for (shape, dtype), count in shapes.items():
            x = _random(rows, shape[1], dtype, device)
            weight = _random(shape[0], shape[1], dtype, device)
            taken = _fastest(partial(multiply, x, weight))
            one, routed = one + count * taken, routed + count * taken
            if settings.num_experts > 1:  # each of them gets a few of a batch's tokens
                own = x[: -(-batch // settings.num_experts)]
                again = _fastest(partial(multiply, own, weight)) * rows / len(own)
                routed += count * (again - taken)
        token = OTHERS * one / rows
        width = min(1024, max((shape[1] for shape, _ in shapes), default=64))
        square = _random(1024, width, torch.float32, device)
        product = _fastest(lambda: square.t() @ square) / (1024 * width**2)
        few, many, columns = 64, 1024, min(SOLVED, width)
        columns -= columns % max(1, settings.structure.m)
        hessian = torch.eye(columns, device=device).unsqueeze(0)
        solves = [
            _fastest(
                partial(
                    solve,
                    square[:count, :columns].contiguous(),
                    hessian,
                    settings.sparsity,
                    settings.structure,
                    block_size=settings.block_size,
                    grid=settings.grid,
                )  # fmt: skip
            )
            for count in (few, many)
        ]
        solving = max(0.0, solves[1] - solves[0]) / (many - few) / columns
        column = max(0.0, solves[0] / columns - few * solving)
        return cls(token, token + (routed - one) / rows, product, solving, column)

    def solved(self, rows: float, width: int, hessians: int = 1) -> float:
        """Seconds to solve [rows, width] for one Hessian of so many that are solved together."""
        # half of the columns lie before a column, on average
        products = rows * width * max(0, width - SOLVED) / 2 + width**3 / 3
        each = width * self.column / hessians + rows * width * self.weight
        return products * self.product + each


def seconds(
    groups: Sequence[tuple[int, int]],
    tokens: int,
    settings: Settings,
    speed: Speed,
    others: Iterable[tuple[int, int]] = (),
    ranks: int = 1,
    parts: Sequence[str] = (),
) -> float:
    """Of expanding one block.

    :param groups: output and input width of each input group, in calling order
    :param tokens: of calibration, that count; of one rank
    :param others: the same of linears that are not expanded and come before the groups
    :param ranks: processes that share what is solved, experts or, with one, its rows
    :param parts: in which part of the block each group is
    """
    experts, clusters = settings.num_experts, settings.clusters
    # the pipeline's own: calibration (without routers also statistics) and propagation
    total = 2.0 * tokens * speed.token
    if clusters > 1:
        total = tokens * speed.routed * _passes(groups, tokens, settings, list(others), parts)
        for _, width in groups:
            samples = min(settings.samples, tokens)
            total += PCA * samples * width * settings.dims(width) * speed.product
    nodes, pairs = float(experts), 0.0
    if settings.size_budget is not None:
        nodes, pairs = 1.5 * experts, experts * (1 + 0.65 * math.log2(experts))
    held_out = min(HELD_OUT, tokens / 16 / experts)
    for rows, width in groups:
        together = min(int(nodes), chunk_size(rows, width, settings.max_bytes))
        total += 0.6 * tokens * width**2 * speed.product
        if experts == 1:
            total += speed.solved(rows / ranks, width)
        else:
            total += nodes * speed.solved(rows, width, together) / ranks
        total += nodes * rows * width * speed.weight  # to choose from, pack and put in place
        weighed = pairs * rows * width * (0.6 * width + held_out)
        total += weighed * speed.product / ranks
    if settings.tune_epochs:
        total += speed.token * tokens * (1 + EPOCH * settings.tune_epochs)
    total += speed.token * tokens * EPOCH * settings.tune_model_epochs
    return COLD * total


def _passes(
    groups: Sequence[tuple[int, int]],
    tokens: int,
    settings: Settings,
    others: Sequence[tuple[int, int]],
    parts: Sequence[str],
) -> float:
    """How often a block runs that is replayed for each of its groups, propagation included.

    What is done runs once, nearly (`remembered`): to reach a group, all of its part that comes
    before it; to pass the last of a part, that group alone, where what it reads can be kept.
    """
    sizes = [rows * width for rows, width in groups]
    every = sum(sizes) + sum(rows * width for rows, width in others)
    kept = remembered_bytes(settings.max_bytes, 4 * tokens * min(width for _, width in groups))
    total, before = 0.0, float(every - sum(sizes))
    for place, (_, width) in enumerate(groups):
        total += before
        if parts and place and parts[place] != parts[place - 1]:
            before = 0.0
        ends = place + 1 == len(groups) or bool(parts and parts[place + 1] != parts[place])
        if ends and 4 * tokens * width <= kept:
            before = 0.0
        before += sizes[place]
    # tuned, or calibrated on the dense block, it has become another meanwhile
    same = settings.num_experts > 1 and not settings.tune_epochs
    return (total + (before if same else every)) / every


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # not from torch's own generator, which is about to shuffle the calibration data
    own = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, device=device, generator=own).to(dtype)


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of a call: the faster of two, after one that warms up. With one thread its CPU time,
    which says the same, and nothing of what else the machine does."""
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda or torch.get_num_threads() > 1 else time.process_time
    found = []
    for _ in range(3):
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        call()
        if cuda:
            torch.cuda.synchronize()
        found.append(clock() - start)
    return min(found[1:])
