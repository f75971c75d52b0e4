"""Inputs of a dense model's MLP linears, on calibration and on held-out text.

Both experiments look at single layers of the dense model, so one forward pass records all they
need: the rows that enter each MLP linear, for a bounded number of tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evals.pocket import MODEL, corpus

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
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    last: dict[str, Any] = {}

    def note(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            # gate and up read the same tensor, one after the other
            if last.get("input") is args[0]:
                seen[name] = seen[last["name"]]
            else:
                seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
                last.update(input=args[0], name=name)

        return hook

    for name, module in mlp_linears(model).items():
        hooks.append(module.register_forward_pre_hook(note(name)))
    for batch in rows.split(8):
        model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    joined: dict[int, Tensor] = {}
    for parts in seen.values():
        if id(parts) not in joined:
            joined[id(parts)] = torch.cat(parts)
    return {name: joined[id(parts)] for name, parts in seen.items()}


def write_plot(figure: Any, path: Path) -> None:
    """Save a matplotlib figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
