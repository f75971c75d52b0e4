"""The Triton kernels; `_triton_rows` reads the packed rows, `triton.py` describes their layout.

`gather_gemv` and `grouped_gemm` have an outer loop over mask words and an inner one over the four
columns of a group. With integers (BITS is 8, 4, 3 or 2, 0 for floats) what is summed are products
of inputs with integers, exact in float32, and a sum is multiplied by the scale of its GROUP columns
when the next column has another: after SHARE of the four. Past the last column that sum is zero and
the scale is whatever comes next in memory, where `scale` is padded.
"""

import triton
import triton.language as tl

from ._triton_rows import groups, integers, next_float, next_integer, row_versions

__all__ = ["gather_gemv", "grouped_gemm", "router_choice", "router_logits", "sort_tokens"]

# Triton's interpreter multiplies the bits of bfloat16 as integers in tl.dot; products of bfloat16
# are exact in float32, so widening there changes nothing else.
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def gather_gemv(
    x,
    x_stride,
    experts,
    values,
    mask,
    starts,
    row_map,
    scale,
    y,
    bias,
    clusters,
    cluster_bias,
    cluster_scale,
    in_features,
    out_features,
    mask_words,
    scales,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One token times ROWS neurons of its expert; grid (ceil(out / ROWS), tokens)."""
    token = tl.program_id(1)
    neurons = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = neurons < out_features
    if experts is not None:
        row_map += tl.load(experts + token) * out_features
    version, weight = row_versions(row_map, starts, neurons, inside, values)
    x += token.to(tl.int64) * x_stride

    FULL: tl.constexpr = mask is None
    word = tl.arange(0, WORDS)
    group = tl.arange(0, 8 * WORDS)
    column = group // 64 * 256 + group % 64
    before = tl.zeros((ROWS,), tl.int32)
    total = tl.zeros((ROWS, 8 * WORDS), tl.float32)
    for first in range(0, mask_words, WORDS):
        here = inside[:, None] & (first + word < mask_words)[None, :]
        bits, places, before = groups(
            mask, mask_words, version, here, first, before, in_features, ROWS, WORDS
        )
        if BITS:
            at = integers(weight, places, BITS)
        else:
            at = weight[:, None] + places
        part = tl.zeros((ROWS, 8 * WORDS), tl.float32)
        for bit in tl.static_range(4):
            columns = first * 32 + column + bit * 64
            inputs = tl.load(x + columns, mask=columns < in_features, other=0).to(tl.float32)
            if BITS:
                weights, at = next_integer(at, bits, bit, FULL, BITS)
                part += weights.to(tl.float32) * inputs[None, :]
                if bit % SHARE == SHARE - 1:
                    of = columns // GROUP
                    scales_of = tl.load(scale + version[:, None] * scales + of[None, :])
                    total += part * scales_of.to(tl.float32)
                    part = tl.zeros((ROWS, 8 * WORDS), tl.float32)
            else:
                weights, at = next_float(at, bits, bit, FULL)
                total += weights.to(tl.float32) * inputs[None, :]
    output = tl.sum(total, 1)
    if bias is not None:
        output += tl.load(bias + neurons, mask=inside, other=0).to(tl.float32)
    if cluster_bias is not None:
        if clusters is not None:
            cluster_bias += tl.load(clusters + token) * out_features
        whole = tl.load(cluster_bias + neurons, mask=inside, other=0).to(tl.float32)
        output += whole * tl.load(cluster_scale + neurons, mask=inside, other=0).to(tl.float32)
    tl.store(y + token.to(tl.int64) * out_features + neurons, output, mask=inside)


@triton.jit
def router_logits(x, x_stride, weight, logits, in_features, BLOCK: tl.constexpr):
    """One token times one row of the router's map; grid (experts, tokens)."""
    expert, token = tl.program_id(0), tl.program_id(1)
    x += token.to(tl.int64) * x_stride
    weight += expert.to(tl.int64) * in_features
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, in_features, BLOCK):
        columns = first + lane
        inside = columns < in_features
        inputs = tl.load(x + columns, mask=inside, other=0).to(tl.float32)
        total += inputs * tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    tl.store(logits + token * tl.num_programs(0) + expert, tl.sum(total, 0))


@triton.jit
def _best_row(x, weight, bias, first, count, in_features, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The row from `first` on, of `count`, with the largest logit, the first of equal ones; counted
    from `first`."""
    row, lane = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    there = row < count
    at = (first + row).to(tl.int64)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, in_features, BLOCK):
        columns = start + lane
        inside = columns < in_features
        inputs = tl.load(x + columns, mask=inside, other=0).to(tl.float32)
        weights = tl.load(
            weight + at[:, None] * in_features + columns[None, :],
            mask=there[:, None] & inside[None, :],
            other=0,
        )
        total += inputs[None, :] * weights.to(tl.float32)
    logits = tl.sum(total, 1) + tl.load(bias + at, mask=there, other=0)
    # of NaNs it may be any row
    return tl.minimum(tl.argmax(tl.where(there, logits, float("-inf")), 0), count - 1)


@triton.jit
def router_choice(
    x, x_stride, weight, bias, chosen, in_features, parents, number,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cluster, of such a number, that a router of two levels chooses; grid (tokens,).

    ROWS is at least `parents`, and the children of one of them.
    """
    token = tl.program_id(0)
    x += token.to(tl.int64) * x_stride
    parent = _best_row(x, weight, bias, 0, parents, in_features, ROWS, BLOCK)
    first = parent * number // parents
    count = (parent + 1) * number // parents - first
    child = _best_row(x, weight, bias, parents + first, count, in_features, ROWS, BLOCK)
    tl.store(chosen + token, (first + child).to(tl.int64))


@triton.jit(do_not_specialize=("tokens",))
def sort_tokens(experts, order, ends, tokens, BLOCK: tl.constexpr):
    """Counting sort by expert, one program per expert, stable, no atomics.

    `order` [tokens] gets the token numbers, expert after expert; `ends` [experts] where each
    expert's run ends in it.
    """
    mine = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    place = 0
    for first in range(0, tokens, BLOCK):
        token = first + lane
        expert = tl.load(experts + token, mask=token < tokens, other=mine)
        place += tl.sum((expert < mine).to(tl.int32), 0)
    for first in range(0, tokens, BLOCK):
        token = first + lane
        expert = tl.load(experts + token, mask=token < tokens, other=mine + 1)
        hit = (expert == mine).to(tl.int32)
        tl.store(order + place + tl.cumsum(hit, 0) - hit, token, mask=hit != 0)
        place += tl.sum(hit, 0)
    tl.store(ends + mine, place)


@triton.jit(do_not_specialize=("tokens",))
def grouped_gemm(
    x,
    x_stride,
    experts,
    order,
    ends,
    values,
    mask,
    starts,
    row_map,
    scale,
    y,
    bias,
    clusters,
    cluster_bias,
    cluster_scale,
    tokens,
    in_features,
    out_features,
    mask_words,
    scales,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A block of TOKENS tokens of one expert times ROWS of its neurons.

    The grid is (blocks, ceil(out / ROWS)): the blocks that read the same rows run side by side.

    Three ways to know which tokens and which expert:
    - `experts` None: there is one expert, block b holds tokens b * TOKENS and on;
    - `order` None: at most TOKENS tokens, unsorted, block b holds those that chose expert b;
    - else `order` and `ends` come from `sort_tokens`, and blocks past the last one do nothing.
    """
    block = tl.program_id(0)
    token = tl.arange(0, TOKENS)
    if experts is None:
        token += block * TOKENS
        valid = token < tokens
    elif order is None:
        valid = token < tokens
        valid = valid & (tl.load(experts + token, mask=valid, other=0) == block)
        if tl.sum(valid.to(tl.int32), 0) == 0:
            return
        row_map += block * out_features
    else:
        each = tl.arange(0, EXPERTS_PADDED)
        end = tl.load(ends + each, mask=each < EXPERTS, other=tokens)
        start = tl.load(ends + each - 1, mask=(each > 0) & (each <= EXPERTS), other=0)
        start = tl.where(each <= EXPERTS, start, tokens)
        blocks = (end - start + TOKENS - 1) // TOKENS
        expert = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
        if expert >= EXPERTS:
            return
        skipped = tl.sum(tl.where(each < expert, blocks, 0), 0)
        place = tl.sum(tl.where(each == expert, start, 0), 0) + (block - skipped) * TOKENS + token
        valid = place < tl.sum(tl.where(each == expert, end, 0), 0)
        token = tl.load(order + place, mask=valid, other=0)
        row_map += expert * out_features

    neurons = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = neurons < out_features
    version, weight = row_versions(row_map, starts, neurons, inside, values)
    inputs_of = x + token.to(tl.int64) * x_stride

    FULL: tl.constexpr = mask is None
    lane = tl.arange(0, 8 * WORDS)
    before = tl.zeros((ROWS,), tl.int32)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, mask_words, WORDS):
        here = inside[:, None]
        bits, places, before = groups(
            mask, mask_words, version, here, first, before, in_features, ROWS, WORDS
        )
        if BITS:
            at = integers(weight, places, BITS)
        else:
            at = weight[:, None] + places
        begin = first // 8 * 256 + first % 8 * 8
        part = tl.zeros((ROWS, TOKENS), tl.float32)
        for bit in tl.static_range(4):
            columns = begin + bit * 64 + lane
            inputs = tl.load(
                inputs_of[None, :] + columns[:, None],
                mask=valid[None, :] & (columns < in_features)[:, None],
                other=0,
            )
            if WIDEN:
                inputs = inputs.to(tl.float32)
            if BITS:
                weights, at = next_integer(at, bits, bit, FULL, BITS)
                part = tl.dot(weights.to(inputs.dtype), inputs, part, input_precision="ieee")
                if bit % SHARE == SHARE - 1:
                    of = (begin + bit * 64) // GROUP
                    scales_of = tl.load(scale + version * scales + of)
                    total += part * scales_of.to(tl.float32)[:, None]
                    part = tl.zeros((ROWS, TOKENS), tl.float32)
            else:
                weights, at = next_float(at, bits, bit, FULL)
                total = tl.dot(weights.to(inputs.dtype), inputs, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + neurons, mask=inside, other=0).to(tl.float32)[:, None]
    if cluster_bias is not None:
        rows = cluster_bias + neurons[:, None]
        if clusters is not None:
            cluster = tl.load(clusters + token, mask=valid, other=0)
            rows += cluster[None, :] * out_features
        whole = tl.load(rows, mask=inside[:, None], other=0).to(tl.float32)
        scale_of = tl.load(cluster_scale + neurons, mask=inside, other=0).to(tl.float32)
        total += whole * scale_of[:, None]
    outputs = y + token.to(tl.int64)[None, :] * out_features + neurons[:, None]
    tl.store(outputs, total, mask=inside[:, None] & valid[None, :])
