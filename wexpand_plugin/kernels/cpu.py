"""The CPU kernel: `cpu.cpp`, compiled on first use, called through ctypes (which frees the GIL).

Its layout is the checkpoint's own, made safe for vector loads. `prepare` returns

    values   [nnz + 64 bytes]                    as in the checkpoint, then zeros
    mask     uint8 [versions * ceil(in/8) + 8]   as in the checkpoint, flat, then zeros
    starts   int32 (all 32 bits) [versions]      where each row version begins in `values`
    row_map  int32 [experts, out]                as in the checkpoint

The kernel reads the mask 8 to 64 bits at a time wherever a row begins and cuts off what belongs to
the next row, so only the last row needs padding: 4 bytes per row version and 72 bytes are added.
"""

import ctypes
import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WexpandError
from ..format.router import ROUTER_DTYPES
from ..format.rowpool import RowPool
from . import LayerShape
from .build import DEFAULT_FLAGS, BuildError, build

__all__ = ["instructions", "load", "logits", "name", "prepare", "run", "unavailable"]

name = "cpu"

SOURCE = Path(__file__).with_name("cpu.cpp")
MASK_PADDING = 8
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def load(flags: tuple[str, ...] = DEFAULT_FLAGS) -> ctypes.CDLL:
    """The compiled library, built with `flags` if need be. Raises BuildError."""
    path = build(SOURCE, flags)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}") from error
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    shape, pool = [long] * 4, [pointer] * 4
    library.wexpand_linear.argtypes = [
        ctypes.c_int,
        pointer,
        pointer,
        *shape,
        *pool,
        pointer,
        ctypes.c_double,
        ctypes.c_int,
    ]
    library.wexpand_linear.restype = ctypes.c_int
    library.wexpand_logits.argtypes = [
        *[ctypes.c_int] * 2,
        pointer,
        pointer,
        *[long] * 3,
        pointer,
        ctypes.c_int,
    ]
    library.wexpand_logits.restype = None
    library.wexpand_instructions.argtypes = []
    library.wexpand_instructions.restype = ctypes.c_char_p
    return library


@functools.cache
def _problem() -> str | None:
    """Why the library cannot be had, or None. Warns once."""
    try:
        load()
    except BuildError as error:
        message = f"wexpand: no compiled CPU kernel, sparse layers will be slow ({error})"
        warnings.warn(message, stacklevel=2)
        return str(error)
    return None


def unavailable(device: torch.device, dtype: torch.dtype, shape: LayerShape) -> str | None:
    """Why this kernel cannot run on `device` for `dtype`, or None. Compiles on the first call."""
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    if shape.codec:
        return f"has no {shape.codec.name} values"
    if dtype not in TYPES:
        return f"{dtype} is not float32, bfloat16 or float16"
    return _problem()


def instructions() -> str:
    """The instruction set that the library was compiled for, for a log or a table."""
    return load().wexpand_instructions().decode()


def prepare(pool: RowPool) -> list[Tensor]:
    """The layout described above: `values`, `mask`, `starts`, `row_map`.

    Shares no memory with the pool, whose tensors may be views of a mapped file that would stay
    mapped. Raises WexpandError from 2**32 values on.
    """
    if pool.nnz >= 1 << 32:
        raise WexpandError(f"row pool: {pool.nnz} kept weights in one linear should be below 2**32")
    values = pool.values.new_zeros(pool.nnz + _padding(pool.values))
    values[: pool.nnz] = pool.values
    bits = pool.masked().mask
    assert bits is not None
    mask = bits.new_zeros(bits.numel() + MASK_PADDING)
    mask[: bits.numel()] = bits.flatten()
    starts = pool.starts()[:-1].to(torch.int32)  # past 2**31 the sign bit is the 32nd bit
    return [values, mask, starts, pool.version_map()]


def _padding(values: Tensor) -> int:
    """Values that fill 64 bytes."""
    return 64 // values.element_size()


def run(x: Tensor, experts: Tensor | None, layout: list[Tensor], out_features: int) -> Tensor:
    """y [tokens, out] = x [tokens, in] times each token's own expert, transposed; float32 sums.

    Uses as many threads as torch does. Raises WexpandError if an expert does not exist.
    """
    values, mask, starts, row_map = layout
    if x.dtype != values.dtype:
        raise WexpandError(f"x: dtype {x.dtype} should be {values.dtype}, that of the weights")
    x = x.contiguous()
    tokens, in_features = x.shape
    if mask.numel() - MASK_PADDING != starts.numel() * ((in_features + 7) // 8):
        raise WexpandError(f"x: {in_features} columns do not fit the layout's rows")
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    if experts is not None:
        experts = experts.contiguous()
    failed = load().wexpand_linear(
        TYPES[x.dtype],
        x.data_ptr(),
        None if experts is None else experts.data_ptr(),
        tokens,
        in_features,
        out_features,
        row_map.shape[0],
        values.data_ptr(),
        mask.data_ptr(),
        starts.data_ptr(),
        row_map.data_ptr(),
        y.data_ptr(),
        (values.numel() - _padding(values)) / (starts.numel() * in_features),
        torch.get_num_threads(),
    )
    if failed and experts is not None:
        low, high = (int(v) for v in experts.aminmax())
        raise WexpandError(f"experts: {low} to {high} should be within 0 to {row_map.shape[0] - 1}")
    return y


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [tokens, experts] = x [tokens, in] times the router's `weight` [experts, in].

    A token's logits do not depend on the tokens beside it.
    """
    if weight.dtype not in ROUTER_DTYPES or weight.shape[1] != x.shape[1]:
        raise WexpandError(
            f"router: {weight.dtype} {list(weight.shape)} should be float16 or float32 "
            f"[experts, {x.shape[1]}]"
        )
    x, weight = x.contiguous(), weight.contiguous()
    found = torch.empty(len(x), len(weight), dtype=torch.float32, device=x.device)
    load().wexpand_logits(
        TYPES[x.dtype],
        TYPES[weight.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        len(x),
        x.shape[1],
        len(weight),
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found
