"""Inputs of a dense model's MLP linears, on calibration and on held-out text.

Both experiments look at single layers of the dense model, so one forward pass records all they
need: the rows that enter each MLP linear, for a bounded number of tokens.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evals.pocket import MODEL, corpus
from wexpand_plugin.method.inputs import find_groups, record_inputs, token_rows

__all__ = ["label", "mlp_linears", "record", "write_plot"]


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


@torch.no_grad()
def record(
    model: Any, tokenizer: Any, texts: Sequence[str], tokens: int, context: int = 256
) -> dict[str, Tensor]:
    """The inputs [tokens, in] of each MLP linear; linears that read one tensor share one record."""
    rows = corpus.token_rows(texts, tokenizer, context)[: tokens // context]
    forwards = [partial(model, input_ids=batch) for batch in rows.split(8)]
    groups = find_groups(mlp_linears(model), forwards)
    seen: list[list[Tensor]] = [[] for _ in groups]
    for inputs in record_inputs([group.linears[0] for group in groups], forwards):
        for group, parts in zip(groups, seen, strict=True):
            parts.append(token_rows(inputs[group.linears[0]], None))
    joined = [torch.cat(parts) for parts in seen]
    return {name: x for group, x in zip(groups, joined, strict=True) for name in group.names}


def write_plot(figure: Any, path: Path) -> None:
    """Save a matplotlib figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
