"""What a model computes in while it is compressed, and what it is saved in: its own dtype.

A CPU without instructions for bfloat16 calculates with it many times slower than with float32, so
there float32 is used unless something else was asked for.
"""

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from torch import nn

__all__ = ["compute_dtype", "own_dtypes", "set_dtypes", "stored_dtype"]

# what Linux calls the instructions that multiply in these dtypes
_INSTRUCTIONS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def compute_dtype(asked: str, own: torch.dtype) -> torch.dtype:
    """The dtype to calibrate in: the one `asked` for, or for "auto" the fastest of those that lose
    nothing.

    :param own: of the model as it is saved
    """
    if asked != "auto":
        return getattr(torch, asked)
    if torch.accelerator.is_available() or _cpu_multiplies(own):
        return own
    return torch.float32


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for `dtype`; also True where that cannot be found out."""
    needed = _INSTRUCTIONS.get(dtype)
    try:
        return needed is None or bool(needed & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return True


def stored_dtype(model: Any, weight: torch.Tensor) -> torch.dtype:
    """The dtype that a weight of `model` is saved in: config.json's, whatever it is held in now."""
    found = getattr(model.config, "dtype", None)
    return found if isinstance(found, torch.dtype) else weight.dtype


def own_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Parameter -> its dtype; one that is tied has several names."""
    with disable_onloading():
        return {name: parameter.dtype for name, parameter in _named(model)}


def set_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give those parameters of `model` that are named, and float, these dtypes.

    Tied ones stay tied.
    """
    made: dict[int, nn.Parameter] = {}  # what has taken the place of a parameter, by its id
    with disable_onloading():  # where they are: on a GPU every weight would be copied there
        named = _named(model)  # keeps all of them alive, so that no id is used again
    for name, parameter in named:
        dtype = dtypes.get(name, parameter.dtype)
        if not parameter.is_floating_point() or parameter.dtype == dtype:
            continue
        if id(parameter) not in made:
            value = parameter.detach().to(dtype)
            made[id(parameter)] = nn.Parameter(value, requires_grad=False)
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        delattr(module, kind)  # an offloaded one would keep its dtype
        setattr(module, kind, made[id(parameter)])


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All names of all parameters."""
    return list(model.named_parameters(remove_duplicate=False))
