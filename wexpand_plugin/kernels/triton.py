"""The Triton kernel for NVIDIA GPUs, compute capability 8.0 and up; bfloat16, float16, float32.

What one token costs is what its rows weigh: at sparsity s, 2(1-s) + 1/8 bytes per weight instead
of 2, and (1-s)/2 + 1/8 + 1/64 with int4 in groups of 128. So a row stays packed until it is in
registers, and is unpacked there.

Layout. A kernel thread owns groups of four columns. Inside every 256 columns, group q (0 to 63)
is columns q, 64+q, 128+q, 192+q, so that threads side by side read inputs side by side.
`prepare` puts mask bits and values into that order, 256 columns after 256 columns, group after
group:

    values   [nnz + 8]                  of floats: the kept weights in the new order, then zeros
             int32 [words + 8]          of integers: as in the checkpoint, a stream of bits, the
                                        first in the low ones; each row version from a word on
    mask     int32 [versions, words]    8 words per 256 columns; group q is bits 4(q%8) to
                                        4(q%8)+3 of word q//8; spare bits of the last 256 are zero;
                                        empty where rows are full
    starts   int32 [versions]           where each row version begins in `values`
                                        (int64 from 2**31 elements on)
    row_map  int32 [experts, out]       as in the checkpoint
    scale    float16 [versions * scales + some]    as in the checkpoint, then zeros

That is the checkpoint plus 4 bytes per row version, up to 3 at the end of its integers and up to
31 bytes of spare mask: at 4096 columns and 90% sparsity 0.3% more, at 50% 0.1%. Where a group
begins inside its row is counted, not stored: a scan over word bit counts, and one bit count per
group of four. In full rows it is known.

Integers are multiplied as they are, which bfloat16 and float16 hold exactly, and float32 sums over
the columns of a scale are multiplied by it. Groups of scales that no multiple of 16 columns makes
(a tensor-parallel rank can get some) are decoded to the dtype of x instead, which takes its bytes.

Three ways through, chosen by the number of tokens alone:

1. One token, or up to 4 that have experts: `gather_gemv`, a program per token and 4 or 8 neurons,
   float32 multiply-adds.
2. Up to 16 tokens: `grouped_gemm` with one block per expert, which takes the tokens that chose it
   out of all 16, and ends at once if there is none. No sorting, and an expert's rows are unpacked
   once however many tokens share it.
3. More: `sort_tokens` (counting sort, one launch) and `grouped_gemm` with one expert per block of
   32, 64 or 128 tokens. The grid has room for the worst split of tokens over experts; what is not
   needed ends at once.

The router is a fourth kernel for up to 16 tokens: `router_logits`, a program per token and row of
its weight, which is read as it is stored; or, where it has two levels, `router_choice`, a program
per token, which reads the parents' rows and those of one parent's children. Of more tokens its
bytes do not count and torch multiplies. Biases, the linear's and the clusters', are added to the
sums before these are rounded and written; after blocks of 128 tokens, which have no registers left,
torch adds them.

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
Integers in groups of 128 take about 16 instructions per weight with a mask and 9.5 in full rows:
on those GPUs, but for the last, they bound int4 well before its bytes do.
With many tokens there are as many multiplications as dense, plus unpacking: slower than dense, at
best half its speed on an H200.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..format.bits import pack_bits, pack_fields, running
from ..format.clusters import ClusterBias
from ..format.router import choice
from ..format.rowpool import RowPool
from ..format.values import ValueCodec
from . import LayerShape
from .reference import biased

__all__ = ["logits", "name", "prepare", "route", "run", "unavailable"]

name = "triton"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPAN = 256  # columns that share one order of groups
PAD = 8  # zeros after the values: the kernel reads one element past a group
NARROW = 16  # columns of the narrowest product on tensor cores
GEMV_TOKENS = 4
GEMV_WORDS = 32  # of the mask, in a step of `gather_gemv`
FEW_TOKENS = 16
BIASED_TOKENS = 64  # of the largest blocks that have registers left for biases
CHOICE_ROWS = 64  # of a level of a router, at most, that one program compares
CHOICE_COLUMNS = 128  # in a step
WIDE = 8192  # output features from which fewer, larger programs fill a GPU
AT_ONCE = 1 << 24  # weights that `prepare` holds dense


def unavailable(device: torch.device, dtype: torch.dtype, shape: LayerShape) -> str | None:
    """Why this kernel cannot run on `device` for `dtype`; None if it can.

    With TRITON_INTERPRET=1 it runs on the CPU, in Triton's interpreter: slow, made for tests.
    """
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
    """`values`, `mask`, `starts`, `row_map` and `scale` in the layout above, on the pool's device,
    and an empty tensor whose sizes are the bits of an integer (0 for floats) and the group.

    Works through the row versions AT_ONCE weights at a time; no more is ever dense.
    """
    if pool.codec.group % NARROW:
        pool = pool.decoded(dtype)
    codec, device = pool.codec, pool.values.device
    bits = codec.bits if codec.scaled else 0
    spans = -(-pool.in_features // SPAN)
    width = spans * SPAN
    starts = running(elements(pool.kept(), bits))
    values = torch.zeros(
        int(starts[-1]) + PAD, dtype=torch.int32 if bits else codec.storage, device=device
    )
    rows = 0 if pool.mask is None else pool.versions
    mask = torch.empty(rows, spans * 8, dtype=torch.int32, device=device)

    def regroup(rows: Tensor) -> Tensor:
        """[rows, in] -> [rows, width], every span's 4 x 64 columns transposed."""
        rows = torch.nn.functional.pad(rows, (0, width - pool.in_features))
        return rows.view(-1, spans, 4, 64).transpose(2, 3).reshape(-1, width)

    step = max(1, AT_ONCE // width)
    for first in range(0, pool.versions, step):
        some = torch.arange(first, min(first + step, pool.versions), device=device)
        dense, keep = (regroup(part) for part in pool.stored(some))
        begin, end = int(starts[first]), int(starts[first + len(some)])
        values[begin:end] = into_words(dense, keep, codec) if bits else dense[keep]
        if pool.mask is not None:
            mask[first : first + step] = pack_bits(keep).view(torch.int32)
    small = len(values) < 1 << 31
    starts = starts[:-1].to(torch.int32 if small else torch.int64)
    scale = torch.empty(0, device=device)
    if pool.scale is not None:
        spare = GEMV_WORDS * 32 // codec.group + 1  # the kernels read a step past the last column
        scale = torch.nn.functional.pad(pool.scale.flatten(), (0, spare))
    sizes = torch.empty(0, bits, codec.group, device=device)
    return [values, mask, starts, pool.version_map(), scale, sizes]


def elements(kept: Tensor, bits: int) -> Tensor:
    """Elements of `values` that row versions take which keep so many weights."""
    return -(-kept * bits // 32) if bits else kept


def into_words(q: Tensor, keep: Tensor, how: ValueCodec) -> Tensor:
    """int32 [words]: the kept of `q` (int8 [rows, n]), each row version from a word boundary."""
    fields = how.fields(q[keep])
    return pack_fields(fields, keep.sum(dim=1), how.bits, align=4).view(torch.int32)


def share(group: int) -> int:
    """How many of four columns, 64 apart, share a scale."""
    return next(share for share in (4, 2, 1) if share == 1 or group % (64 * share) == 0)


class Tile(NamedTuple):
    """What one program of `grouped_gemm` multiplies."""

    neurons: int
    tokens: int
    words: int
    """of the mask, in a step: 8 columns side by side for each, four times"""
    warps: int


def tile(
    tokens: int, experts: int, out_features: int, dtype: torch.dtype, bits: int, group: int
) -> Tile:
    """Its size, for integers of `bits` (0: floats) in groups of so many columns."""
    mean = tokens / experts
    # columns side by side in a step share a scale
    words = next(words for words in (8, 4, 2) if group % (8 * words) == 0)
    if tokens <= FEW_TOKENS:
        return Tile(32 if out_features > WIDE else 16, FEW_TOKENS, words, 4)
    if mean <= 32 or dtype == torch.float32:
        return Tile(32, 32, words, 4)
    # no registers are left for longer steps by sums of a group beside those of all, nor by values
    # that lie across two words
    short = min(words, 4)
    if mean <= 64:
        return Tile(64, 64, short if bits in (3, 5, 6) else words, 8)
    return Tile(64, 128, short if bits else words, 8)


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
    from ._triton_kernels import gather_gemv, grouped_gemm, sort_tokens

    tokens, in_features = x.shape
    y = x.new_empty(tokens, out_features)
    if y.numel() == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    biases: tuple[Tensor | None, ...] = (bias, None, None, None)
    if cluster_bias is not None:
        alike = clusters is None or cluster_bias.clusters == 1
        biases = (bias, None if alike else clusters, cluster_bias.values, cluster_bias.scale)
    values, mask, starts, row_map, scale, sizes = layout
    bits, group = sizes.shape[1:]
    weights = (values, mask if mask.numel() else None, starts, row_map, scale if bits else None, y)
    mask_words, scales = -(-in_features // SPAN) * 8, -(-in_features // group) if bits else 0
    codec = dict(BITS=bits, GROUP=group, SHARE=share(group))
    with torch.cuda.device_of(x):
        if tokens <= (1 if experts is None else GEMV_TOKENS):
            rows = 8 if out_features > WIDE else 4
            gather_gemv[(-(-out_features // rows), tokens)](
                x, x.stride(0), experts, *weights, *biases, in_features, out_features, mask_words,
                scales, ROWS=rows, WORDS=GEMV_WORDS, num_warps=4, **codec,
            )  # fmt: skip
            return y
        number = 1 if experts is None else row_map.shape[0]
        rows, block, words, warps = tile(tokens, number, out_features, x.dtype, bits, group)
        late = block > BIASED_TOKENS
        if late:
            biases = (None,) * 4
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
            x, x.stride(0), experts, order, ends, *weights, *biases, tokens, in_features,
            out_features, mask_words, scales, EXPERTS=number,
            EXPERTS_PADDED=1 << (number - 1).bit_length(), ROWS=rows, WORDS=words, TOKENS=block,
            num_warps=warps, num_stages=2, **codec,
        )  # fmt: skip
    if late:
        return biased(y, bias, None if cluster_bias is None else cluster_bias.of(clusters))
    return y


def route(x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
    """Cluster of each token: `x` [tokens, in] -> int64 [tokens]."""
    from ._triton_kernels import router_choice

    tokens, in_features = x.shape
    clusters = len(weight) - parents
    rows = max(parents, -(-clusters // max(parents, 1)))
    if parents == 0 or tokens > FEW_TOKENS or rows > CHOICE_ROWS:
        return choice(logits(x, weight) + bias, parents)
    chosen = torch.empty(tokens, dtype=torch.int64, device=x.device)
    if tokens == 0:
        return chosen
    if x.stride(1) != 1:
        x = x.contiguous()
    with torch.cuda.device_of(x):
        router_choice[(tokens,)](
            x, x.stride(0), weight, bias, chosen, in_features, parents, clusters,
            ROWS=max(2, 1 << (rows - 1).bit_length()), BLOCK=CHOICE_COLUMNS, num_warps=8,
        )  # fmt: skip
    return chosen


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
