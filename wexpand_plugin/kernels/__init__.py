"""Kernels for the routed linear, and the choice between them.

A kernel is a module with

    name
        shown in the one log line that says what was chosen
    unavailable(device, dtype) -> str | None
        why it cannot run here; None if it can
    prepare(pool) -> list[Tensor]
        the row pool in this kernel's own layout, made once at load
    run(x, experts, layout, out_features) -> Tensor
        y [tokens, out], without bias, in the dtype of x
    logits(x, weight) -> Tensor
        float32 [tokens, experts], the router's weight [experts, in] times x, without its bias

`x` is [tokens, in]; `experts` is int64 [tokens], or None where the pool has one expert. Values
keep their dtype in the layout, a router its own (`router.ROUTER_DTYPES`), sums are float32. The
fast kernels never synchronise with a GPU and no shape depends on data, so a CUDA graph can
hold them. The reference does both: it is chosen by itself on CPUs only, where it is merely slow.
"""

from types import ModuleType

import torch

from ..errors import WexpandError

__all__ = ["choose", "get"]

NAMES = ("cpu", "triton", "reference")


def get(name: str) -> ModuleType:
    """The kernel module called `name`."""
    from importlib import import_module

    if name not in NAMES:
        raise WexpandError(f"kernel: {name!r} is not one of {', '.join(NAMES)}")
    return import_module(f"{__name__}.{name}")


def choose(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, str]:
    """The fastest kernel that runs on `device` for `dtype`, and a sentence for the log.

    The environment variable WEXPAND_KERNEL (cpu, triton or reference) overrides the choice.

    :raises WexpandError: the kernel that it names cannot run, or no fast one can and this is no CPU
    """
    import os

    forced = os.environ.get("WEXPAND_KERNEL")
    refused: list[str] = []
    # the reference synchronises with a GPU, which a CUDA graph refuses: there only if asked for
    own = NAMES if device.type == "cpu" else NAMES[:-1]
    for name in (forced,) if forced else own:
        kernel = get(name)
        reason = kernel.unavailable(device, dtype)
        if reason is None:
            skipped = f" ({'; '.join(refused)})" if refused else ""
            return kernel, f"{name} kernel on {device.type}, {dtype}{skipped}"
        refused.append(f"{name}: {reason}")
    if forced:
        raise WexpandError(f"WEXPAND_KERNEL: {'; '.join(refused)}")
    raise WexpandError(
        f"kernel: none runs on {device.type}, {dtype} ({'; '.join(refused)}); the slow reference "
        "does, with WEXPAND_KERNEL=reference and --enforce-eager"
    )
