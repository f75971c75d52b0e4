"""The CPU kernel: `cpu.cpp`, compiled on first use, called through ctypes (which frees the GIL).

Its layout is one uint8 tensor, described in `cpu_pool.h`: the sizes, the row map, where each row
version begins, and the versions, each with its scales, mask and values side by side. That is the
checkpoint, about 8 bytes more for a row version and 4 for a neuron, whatever fills full rows up to
a multiple of 128 columns, and where int4 rows keep more in one half than in the other a byte for
each two weights too many (1% of a layer of 2048 columns at 50%). Some integers have no code of
their own and are kept as wider ones, which hold the same numbers: 6 and 5 bits as int8, so that
they take as much memory and time as these; sparse rows in 3 and 2 bits as int4. At equal bytes full
rows in few bits lose less than sparse ones (evals/LOG.md of 2026-11-27), and those are read as they
are stored.

Values of a float codec must be of the dtype of x. Integers are multiplied as they are, with x as
it is: what comes out differs from the reference by the rounding of float32 sums.
"""

import ctypes
import functools
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WexpandError
from ..format.clusters import ClusterBias
from ..format.router import ROUTER_DTYPES
from ..format.rowpool import RowPool
from ..format.values import ValueCodec, codec
from . import LayerShape
from .build import DEFAULT_FLAGS, BuildError, build

__all__ = ["instructions", "load", "logits", "name", "prepare", "route", "run", "unavailable"]

name = "cpu"

SOURCE = Path(__file__).with_name("cpu.cpp")
TYPES = {torch.float32: "float", torch.bfloat16: "Bf16", torch.float16: "Fp16"}
VALUES = {
    "float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "int3": 5, "int2": 6
}  # fmt: skip
WIDER = {"int6": "int8", "int5": "int8"}
"""values -> those that they are kept as"""
WIDER_SPARSE = WIDER | {"int3": "int4", "int2": "int4"}
"""the same where rows have a mask"""
SIZES = 17  # numbers at the beginning of the layout, of which `prepare` writes the first seven
STEP = 128  # columns: groups of scales divide it or are a multiple of it


@functools.cache
def load(dtype: torch.dtype, flags: tuple[str, ...] = DEFAULT_FLAGS) -> ctypes.CDLL:
    """The library for x of this dtype, compiled with `flags` if need be. Raises BuildError."""
    path = build(SOURCE, (*flags, f"-DWEXPAND_X={TYPES[dtype]}"))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}") from error
    number, long, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    sizes, biases = [long] * 3, [*[pointer] * 4, long]
    signatures = {
        "wexpand_instructions": (ctypes.c_char_p, []),
        "wexpand_pool_bytes": (long, [pointer] * 2),
        "wexpand_pool_fill": (None, [pointer] * 6),
        "wexpand_linear": (number, [pointer] * 3 + sizes + biases + [pointer, number]),
        "wexpand_logits": (None, [number, pointer, pointer, *sizes, pointer, number]),
        "wexpand_route": (None, [number, *[pointer] * 3, *sizes, long, pointer, number]),
    }
    for function, (result, arguments) in signatures.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return library


@functools.cache
def _problem(dtype: torch.dtype) -> str | None:
    """Why the library cannot be had, or None. Warns once for each dtype."""
    try:
        load(dtype)
    except BuildError as error:
        message = f"wexpand: no compiled CPU kernel, sparse layers will be slow ({error})"
        warnings.warn(message, stacklevel=2)
        return str(error)
    return None


def unavailable(device: torch.device, dtype: torch.dtype, shape: LayerShape) -> str | None:
    """Why this kernel cannot run on `device` for `dtype`, or None. Compiles on the first call."""
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    if dtype not in TYPES:
        return f"{dtype} is not float32, bfloat16 or float16"
    return _narrow(shape.codec) or _problem(dtype)


def _narrow(how: ValueCodec | None) -> str | None:
    """Why groups of scales are too narrow, or None; columns split between workers can be."""
    if how and how.scaled and math.gcd(how.group, STEP) < 8:
        return f"groups of {how.group} columns share a scale, multiples of 8 should"
    return None


def instructions(dtype: torch.dtype) -> str:
    """The instruction set that the library was compiled for, for a log or a table."""
    return load(dtype).wexpand_instructions().decode()


def prepare(pool: RowPool, dtype: torch.dtype) -> list[Tensor]:
    """The layout described above, one uint8 tensor, whatever the `dtype` of x.

    Shares no memory with the pool, whose tensors may be views of a mapped file that would stay
    mapped. Raises WexpandError from 32 GiB on.
    """
    if reason := _narrow(pool.codec):
        raise WexpandError(f"row pool: {reason}")
    wider = WIDER if pool.mask is None else WIDER_SPARSE
    if pool.codec.name in wider:
        pool = pool.recoded(codec(wider[pool.codec.name]))
    group, scale = pool.codec.group, pool.scale
    if scale is not None and group % STEP:
        narrow = math.gcd(group, STEP)
        scale = scale.repeat_interleave(group // narrow, dim=1)
        group, scale = narrow, scale[:, : -(-pool.in_features // narrow)]
    sizes = [VALUES[pool.codec.name], int(pool.mask is not None), group, pool.in_features]
    sizes += [pool.out_features, pool.experts, pool.versions]
    header = torch.tensor(sizes + [0] * (SIZES - len(sizes)), dtype=torch.int64, device="cpu")
    firsts = pool.first_versions()[:-1].to(torch.int32)
    parts = (pool.values, pool.mask, scale, firsts, pool.row_map)
    tensors = [None if part is None else part.contiguous() for part in parts]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    library = load(dtype)
    size = library.wexpand_pool_bytes(header.data_ptr(), pointers[1])
    if size >= 1 << 35:
        raise WexpandError(f"row pool: {size} bytes in one linear should be below 32 GiB")
    layout = torch.empty(size, dtype=torch.uint8, device="cpu")
    layout[: header.nbytes] = header.view(torch.uint8)
    library.wexpand_pool_fill(layout.data_ptr(), *pointers)
    return [layout]


def run(
    x: Tensor,
    experts: Tensor | None,
    layout: list[Tensor],
    out_features: int,
    bias: Tensor | None = None,
    clusters: Tensor | None = None,
    cluster_bias: ClusterBias | None = None,
) -> Tensor:
    """y [tokens, out] = x [tokens, in] times each token's own expert, transposed, plus biases;
    float32 sums.

    Uses as many threads as torch does. Raises WexpandError if an expert or a cluster does not
    exist.
    """
    x = x.contiguous()
    tokens, in_features = x.shape
    y = x.new_empty(tokens, out_features)
    values = scale = None
    number = 1
    if cluster_bias is not None:
        values, scale, number = cluster_bias.values, cluster_bias.scale, cluster_bias.clusters
    if number == 1:
        clusters = None
    if bias is not None:
        bias = bias.to(x.dtype)
    for part in (bias, values, scale):
        if part is not None and (part.shape[-1] != out_features or not part.is_contiguous()):
            raise WexpandError(f"bias: {list(part.shape)} should be contiguous, {out_features} out")
    experts = None if experts is None else experts.contiguous()
    clusters = None if clusters is None else clusters.contiguous()
    pointers = [
        None if part is None else part.data_ptr() for part in (bias, values, scale, clusters)
    ]
    problem = load(x.dtype).wexpand_linear(
        layout[0].data_ptr(),
        x.data_ptr(),
        None if experts is None else experts.data_ptr(),
        tokens,
        in_features,
        out_features,
        *pointers,
        number,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if problem:
        _refuse(problem, x, clusters if problem == 5 else experts, layout, out_features, number)
    return y


def _refuse(
    problem: int,
    x: Tensor,
    chosen: Tensor | None,
    layout: list[Tensor],
    out_features: int,
    clusters: int,
) -> None:
    """Say what the library found not to fit."""
    values, _, _, in_features, out, experts = layout[0][: 6 * 8].view(torch.int64).tolist()
    if problem == 1:
        raise WexpandError(f"x: {x.shape[1]} columns do not fit the {in_features} of the weights")
    if problem == 2:
        raise WexpandError(f"out_features: {out_features} should be {out}, those of the weights")
    if problem == 3:
        wanted = [name for name, number in VALUES.items() if number == values]
        raise WexpandError(f"x: dtype {x.dtype} should be {wanted[0]}, that of the weights")
    assert chosen is not None
    low, high = (int(v) for v in chosen.aminmax())
    what, last = ("experts", experts - 1) if problem == 4 else ("clusters", clusters - 1)
    raise WexpandError(f"{what}: {low} to {high} should be within 0 to {last}")


def route(x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
    """Cluster of each token: `x` [tokens, in] -> int64 [tokens].

    Of two levels a token reads the parents' rows and those of one parent's children. Its cluster
    does not depend on the tokens beside it, and is what its `logits` choose.
    """
    x, weight, bias = *_checked(x, weight), bias.contiguous()
    tokens, in_features = x.shape
    rows = weight.shape[0]
    if bias.dtype != torch.float32 or bias.shape != (rows,):
        raise WexpandError(f"router: bias {bias.dtype} should be float32 [{rows}]")
    chosen = torch.empty(tokens, dtype=torch.int64, device=x.device)
    load(x.dtype).wexpand_route(
        weight.dtype == torch.float16,
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        tokens,
        in_features,
        parents,
        rows - parents,
        chosen.data_ptr(),
        torch.get_num_threads(),
    )
    return chosen


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [tokens, rows] = x [tokens, in] times the router's `weight` [rows, in].

    A token's logits do not depend on the tokens beside it.
    """
    x, weight = _checked(x, weight)
    found = torch.empty(len(x), len(weight), dtype=torch.float32, device=x.device)
    load(x.dtype).wexpand_logits(
        weight.dtype == torch.float16,
        x.data_ptr(),
        weight.data_ptr(),
        len(x),
        x.shape[1],
        len(weight),
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found


def _checked(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both, contiguous."""
    if weight.dtype not in ROUTER_DTYPES or weight.shape[1] != x.shape[1]:
        raise WexpandError(
            f"router: {weight.dtype} {list(weight.shape)} should be float16 or float32 "
            f"[rows, {x.shape[1]}]"
        )
    return x.contiguous(), weight.contiguous()
