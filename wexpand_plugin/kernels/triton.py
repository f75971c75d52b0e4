"""The Triton kernel for NVIDIA GPUs, compute capability 8.0 and up; bfloat16, float16, float32.

What one token costs is what its rows weigh: at sparsity s, 2(1-s) + 1/8 bytes per weight instead
of 2. So a row stays packed until it is in registers, and is unpacked there.

Layout. A kernel thread owns groups of four columns. Inside every 256 columns, group q (0 to 63)
is columns q, 64+q, 128+q, 192+q, so that threads side by side read inputs side by side.
`prepare` puts mask bits and values into that order, 256 columns after 256 columns, group after
group:

    values   [nnz + 8]                  the kept weights in the new order, then zeros
    mask     int32 [versions, words]    8 words per 256 columns; group q is bits 4(q%8) to
                                        4(q%8)+3 of word q//8; spare bits of the last 256 are zero
    starts   int32 [versions]           where each row version begins in `values`
                                        (int64 from 2**31 kept weights on)
    row_map  int32 [experts, out]       as in the checkpoint

That is the checkpoint plus 4 bytes per row version and up to 31 bytes of spare mask: at 4096
columns and 90% sparsity 0.3% more, at 50% 0.1%. Where a group begins inside its row is counted,
not stored: a scan over word bit counts, and one bit count per group of four.

Three ways through, chosen by the number of tokens alone:

1. One token, or up to 4 that have experts: `gather_gemv`, a program per token and 4 or 8 neurons,
   float32 multiply-adds.
2. Up to 16 tokens: `grouped_gemm` with one block per expert, which takes the tokens that chose it
   out of all 16, and ends at once if there is none. No sorting, and an expert's rows are unpacked
   once however many tokens share it.
3. More: `sort_tokens` (counting sort, one launch) and `grouped_gemm` with one expert per block of
   32, 64 or 128 tokens. The grid has room for the worst split of tokens over experts; what is not
   needed ends at once.

The router is a fourth kernel for up to 16 tokens, `router_logits`, a program per token and expert,
which reads the map as it is stored; for more its bytes do not count and torch multiplies.

Shapes depend on the shapes of the arguments only and nothing waits for the GPU, so `run` can be
captured in a CUDA graph after one ordinary call (which compiles).

Block sizes. The T tokens of one expert in blocks of B read its packed rows ceil(T/B) times
(mostly from L2: the blocks that share rows are neighbours in the grid) and unpack them as often;
inputs are read out/rows times at 2 bytes each. Unpacking a weight takes 11 to 15 instructions of
one lane, whatever B; the product 2B operations on tensor cores, which do some 16 (A100) to 33
(H200) of them in the time of one lane instruction. So B = 128 makes unpacking as long as the
product on an A100 and twice as long on an H200, and B = 256 does not fit the registers: B is the
smallest of 16, 32, 64, 128 that holds the mean number of tokens per expert. The block of 128
takes 74 KiB of shared memory before Hopper, which GPUs with 99 KiB have too, and 142 KiB there.
float32 is multiplied exactly, outside the tensor cores (no TF32), and stays at B = 32.

What to expect. THIS KERNEL HAS NOT BEEN TIMED ON A GPU. Its results are tested in Triton's
interpreter; its compiled form is tested for spills and shared memory, and the instructions were
counted in it. From arithmetic only, for one token in bfloat16: the bytes allow 1.78x over dense
at 50% sparsity, 2.76x at 70%, 3.81x at 80%, 6.15x at 90%; the instructions (about 11 per weight,
pruned or not) allow at best 1.2x on an H200 (4.8 TB/s), 1.6x on an H100, 1.8x on an A100 (2 TB/s)
and more than 6x on an RTX 4090 (1 TB/s), at any sparsity. The smaller of the two is the bound.
With many tokens there are as many multiplications as dense, plus unpacking: slower than dense, at
best half its speed on an H200.
"""

import torch
from torch import Tensor

from ..format.bits import pack_bits, unpack_bits
from ..format.clusters import ClusterBias
from ..format.router import choice
from ..format.rowpool import RowPool
from . import LayerShape
from .reference import biased

__all__ = ["logits", "name", "prepare", "route", "run", "unavailable"]

name = "triton"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPAN = 256  # columns that share one order of groups
PAD = 8  # zeros after the values: the kernel reads one weight past a group
GEMV_TOKENS = 4
FEW_TOKENS = 16
WIDE = 8192  # output features from which fewer, larger programs fill a GPU
AT_ONCE = 1 << 24  # weights that `prepare` holds dense


def unavailable(device: torch.device, dtype: torch.dtype, shape: LayerShape) -> str | None:
    """Why this kernel cannot run on `device` for `dtype`; None if it can.

    With TRITON_INTERPRET=1 it runs on the CPU, in Triton's interpreter: slow, made for tests.
    """
    if shape.codec:
        return f"has no {shape.codec.name} values"
    if dtype not in DTYPES:
        return f"{dtype} is not bfloat16, float16 or float32"
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    return None


def prepare(pool: RowPool, dtype: torch.dtype) -> list[Tensor]:
    """`values`, `mask`, `starts` and `row_map` in the layout above, on the pool's device.

    Works through the row versions AT_ONCE weights at a time; no more is ever dense.
    """
    spans = -(-pool.in_features // SPAN)
    width = spans * SPAN
    starts, bits = pool.starts(), pool.masked().mask
    assert bits is not None
    values = pool.values.new_zeros(pool.nnz + PAD)
    mask = torch.empty(pool.versions, spans * 8, dtype=torch.int32, device=bits.device)

    def regroup(rows: Tensor) -> Tensor:
        """[rows, in] -> [rows, width], every span's 4 x 64 columns transposed."""
        rows = torch.nn.functional.pad(rows, (0, width - pool.in_features))
        return rows.view(-1, spans, 4, 64).transpose(2, 3).reshape(-1, width)

    step = max(1, AT_ONCE // width)
    for first in range(0, pool.versions, step):
        some = torch.arange(first, min(first + step, pool.versions), device=bits.device)
        begin, end = int(starts[first]), int(starts[first + len(some)])
        keep = regroup(unpack_bits(bits[some], pool.in_features))
        values[begin:end] = regroup(pool.rows(some))[keep]
        mask[first : first + step] = pack_bits(keep).view(torch.int32)
    small = pool.nnz < 1 << 31
    starts = starts[:-1].to(torch.int32 if small else torch.int64)
    return [values, mask, starts, pool.version_map()]


def tile(tokens: int, experts: int, out_features: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Neurons and tokens of one `grouped_gemm` program, and its warps."""
    mean = tokens / experts
    if tokens <= FEW_TOKENS:
        return (32 if out_features > WIDE else 16), FEW_TOKENS, 4
    if mean <= 32 or dtype == torch.float32:
        return 32, 32, 4
    return 64, (64 if mean <= 64 else 128), 8


def run(
    x: Tensor,
    experts: Tensor | None,
    layout: list[Tensor],
    out_features: int,
    bias: Tensor | None = None,
    clusters: Tensor | None = None,
    cluster_bias: ClusterBias | None = None,
) -> Tensor:
    """y [tokens, out] = x [tokens, in] times each token's own expert, transposed, plus biases."""
    y = multiply(x, experts, layout, out_features)
    return biased(y, bias, None if cluster_bias is None else cluster_bias.of(clusters))


def route(x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
    """Cluster of each token: `x` [tokens, in] -> int64 [tokens]."""
    return choice(logits(x, weight) + bias, parents)


def multiply(
    x: Tensor, experts: Tensor | None, layout: list[Tensor], out_features: int
) -> Tensor:
    """y [tokens, out] = x [tokens, in] times each token's own expert, transposed."""
    from ._triton_kernels import gather_gemv, grouped_gemm, sort_tokens

    tokens, in_features = x.shape
    y = x.new_empty(tokens, out_features)
    if y.numel() == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    values, mask, starts, row_map = layout
    weights = (values, mask, starts, row_map, y)
    words = mask.shape[1]
    with torch.cuda.device_of(x):
        if tokens <= (1 if experts is None else GEMV_TOKENS):
            rows = 8 if out_features > WIDE else 4
            gather_gemv[(-(-out_features // rows), tokens)](
                x, x.stride(0), experts, *weights, in_features, out_features, words,
                ROWS=rows, WORDS=32, num_warps=4,
            )  # fmt: skip
            return y
        number = 1 if experts is None else row_map.shape[0]
        rows, block, warps = tile(tokens, number, out_features, x.dtype)
        order = ends = None
        used = min(number, tokens)
        blocks = (tokens - used) // block + used  # no split over experts needs more
        if experts is not None and tokens <= FEW_TOKENS:
            blocks = number
        elif experts is not None:
            order = torch.empty(tokens, dtype=torch.int32, device=x.device)
            ends = torch.empty(number, dtype=torch.int32, device=x.device)
            sort_tokens[(number,)](experts, order, ends, tokens, BLOCK=1024, num_warps=4)
        grouped_gemm[(blocks, -(-out_features // rows))](
            x, x.stride(0), experts, order, ends, *weights, tokens, in_features, out_features,
            words, EXPERTS=number, EXPERTS_PADDED=1 << (number - 1).bit_length(), ROWS=rows,
            TOKENS=block, num_warps=warps, num_stages=2,
        )  # fmt: skip
    return y


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [tokens, experts] = x [tokens, in] times the router's `weight` [experts, in]."""
    from ._triton_kernels import router_logits

    tokens, in_features = x.shape
    if tokens > FEW_TOKENS:
        return torch.nn.functional.linear(x.float(), weight.float())
    found = torch.empty(tokens, len(weight), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return found
    if x.stride(1) != 1:
        x = x.contiguous()
    with torch.cuda.device_of(x):
        router_logits[(len(weight), tokens)](
            x, x.stride(0), weight, found, in_features, BLOCK=1024, num_warps=4
        )
    return found
