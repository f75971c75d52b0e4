"""Inputs of a dense model's MLP linears, recorded once.

All experiments look at single layers of the dense model, so one forward pass records all they
need: the rows that enter each MLP linear, for a bounded number of tokens.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evals.pocket import MODEL
from wexpand_plugin.method.inputs import InputGroup, find_groups, record_inputs, token_rows

__all__ = ["Recorded", "block_of", "input_groups", "label", "mlp_linears", "record"]


class Recorded(NamedTuple):
    """An input group and what it reads."""

    group: InputGroup
    x: Tensor
    """[tokens, in]"""


def label(model: str) -> str:
    """What to call a model in results: the embedded one is "pocket"."""
    return "pocket" if Path(model).resolve() == MODEL.resolve() else Path(model).name


def mlp_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears inside modules called mlp, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".mlp." in name
    }


def block_of(name: str) -> int:
    """The number of the decoder block that a linear is in."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"linear: {name!r} has no number of a block in it")
    return int(found.group(1))


def input_groups(model: Any, every: int, row: Tensor) -> list[InputGroup]:
    """The groups of MLP linears of every `every`-th block, found by a forward of `row` [1, n]."""
    chosen = {n: m for n, m in mlp_linears(model).items() if block_of(n) % every == 0}
    return find_groups(chosen, [partial(model, input_ids=row)])


@torch.no_grad()
def record(model: Any, groups: Sequence[InputGroup], rows: Tensor) -> list[Recorded]:
    """What each group reads when the model runs the token ids `rows` [rows, context]."""
    forwards = [partial(model, input_ids=batch) for batch in rows.split(8)]
    found = [torch.empty(rows.numel(), group.linears[0].in_features) for group in groups]
    at = 0
    for inputs in record_inputs([group.linears[0] for group in groups], forwards):
        for group, x in zip(groups, found, strict=True):
            part = token_rows(inputs[group.linears[0]], None)
            x[at : at + len(part)] = part
        at += len(part)
    return [Recorded(group, x) for group, x in zip(groups, found, strict=True)]
