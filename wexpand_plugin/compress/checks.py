"""What a recipe cannot be applied to, found before any calibration."""

import copy
from collections.abc import Mapping
from typing import Any

import torch.distributed
from torch import nn

from ..errors import WexpandError
from ..format.rowpool import finite
from ..hf.names import empty_model, missing_tensors, saved_names

__all__ = ["refuse_distributed", "refuse_nonfinite", "refuse_unrolled"]


def refuse_distributed(modifier: str) -> None:
    """Every process would see its own part of the data, and only one of them is saved."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if (size := torch.distributed.get_world_size()) > 1:
            raise WexpandError(
                f"{modifier}: {size} processes (torchrun) are not supported; run it in one"
            )


def refuse_nonfinite(linears: Mapping[str, nn.Linear]) -> None:
    """A weight with a NaN or an infinite value is a damaged one."""
    for name, linear in linears.items():
        for kind, values in linear.named_parameters(recurse=False):
            if not finite(values.detach()):
                raise WexpandError(
                    f"{name}.{kind}: holds NaN or infinite values; repair the model, or leave the "
                    f"linear out with ignore: ['{name}']"
                )


def refuse_unrolled(model: Any, linears: Mapping[str, nn.Linear]) -> None:
    """Linears that the model's own class does not have could be saved, and not loaded again.

    llm-compressor unrolls the fused experts of a mixture into linears. Of some models it saves them
    under names that their class takes, of others not, whichever linears are meant.
    """
    kind = type(model).__name__
    try:
        own = empty_model(type(model), copy.deepcopy(model.config))
    except Exception:  # a class that cannot be built from its config cannot be compared with
        return
    known = {name: type(module) for name, module in own.named_modules()}
    for name in linears:
        if not issubclass(known.get(name, nn.Module), nn.Linear):
            parts = name.split(".")
            last = next(n for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in known)
            raise WexpandError(
                f"{name}: {kind} has no such linear but one module of all experts, so a model that "
                "stores it by itself could not be loaded again; leave the experts dense with "
                rf"ignore: ['re:.*\.{parts[last - 1]}\..*']"
            )
    unrolled = any(name not in known for name, _ in model.named_modules())
    if unrolled and (missing := missing_tensors(own, saved_names(model))):
        raise WexpandError(
            f"model: llm-compressor unrolls the experts of a {kind} and saves them under names "
            f"that {kind} does not load ({missing[0]} would be missing), so it cannot be compressed"
        )
