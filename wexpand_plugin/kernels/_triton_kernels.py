"""The device code of the Triton kernel: the layout it reads is described in `triton.py`.

`nibbles` is the one idea: the mask words of a few row versions become, for every group of four
columns, the four mask bits and the place of the group's first kept weight. From there a weight is
"if its bit is set, load it and step one further", four times, with no more counting.

Words are unsigned 32-bit (stored as int32); places count from the row version's first weight.
"""

import triton
import triton.language as tl

__all__ = ["gather_gemv", "grouped_gemm", "router_logits", "sort_tokens"]

# Triton's interpreter multiplies the bits of bfloat16 as integers in tl.dot; products of bfloat16
# are exact in float32, so widening there changes nothing else.
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def bit_count(word):
    """Set bits of uint32 words, as int32. LLVM turns this form into one `popc` instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def nibbles(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """uint32 [ROWS, WORDS] -> bits and places [ROWS, 8 * WORDS], counts [ROWS].

    The low four bits of `bits` belong to the group; `places` is relative to the first word.
    """
    counts = bit_count(words)
    before = tl.cumsum(counts, 1) - counts
    shift = (tl.arange(0, 8) * 4).to(tl.uint32)[None, None, :]
    bits = words[:, :, None] >> shift
    lower = words[:, :, None] & ((shift * 0 + 1 << shift) - 1)
    places = before[:, :, None] + bit_count(lower)
    shape: tl.constexpr = (ROWS, 8 * WORDS)
    return tl.reshape(bits, shape), tl.reshape(places, shape), tl.sum(counts, 1)


@triton.jit
def next_weights(at, bits, bit: tl.constexpr):
    """Each group's weight for its column `bit` (zero where pruned), and the pointers after it.

    The load has no mask: it may read one weight past a group, which costs no extra memory line
    and fewer instructions than a masked one. `values` is padded for the last row version.
    """
    kept = (bits & (1 << bit)) != 0
    return tl.where(kept, tl.load(at), 0.0), at + kept.to(tl.int32)


@triton.jit
def row_versions(row_map, starts, neurons, inside, values, mask, mask_words):
    """Where each neuron's row version begins: pointers to its first weight and its first word."""
    version = tl.load(row_map + neurons, mask=inside, other=0).to(tl.int64)
    start = tl.load(starts + version, mask=inside, other=0).to(tl.int64)
    return values + start, mask + version * mask_words


@triton.jit
def gather_gemv(
    x,
    x_stride,
    experts,
    values,
    mask,
    starts,
    row_map,
    y,
    in_features,
    out_features,
    mask_words,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One token times ROWS neurons of its expert; grid (ceil(out / ROWS), tokens)."""
    token = tl.program_id(1)
    neurons = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = neurons < out_features
    if experts is not None:
        row_map += tl.load(experts + token) * out_features
    weight, words_of = row_versions(row_map, starts, neurons, inside, values, mask, mask_words)
    x += token.to(tl.int64) * x_stride

    word = tl.arange(0, WORDS)
    group = tl.arange(0, 8 * WORDS)
    column = group // 64 * 256 + group % 64
    total = tl.zeros((ROWS, 8 * WORDS), tl.float32)
    for first in range(0, mask_words, WORDS):
        here = inside[:, None] & (first + word < mask_words)[None, :]
        words = tl.load(words_of[:, None] + first + word[None, :], mask=here, other=0)
        bits, places, count = nibbles(words.to(tl.uint32, bitcast=True), ROWS, WORDS)
        at = weight[:, None] + places
        for bit in tl.static_range(4):
            columns = first * 32 + column + bit * 64
            inputs = tl.load(x + columns, mask=columns < in_features, other=0).to(tl.float32)
            weights, at = next_weights(at, bits, bit)
            total += weights.to(tl.float32) * inputs[None, :]
        weight += count
    tl.store(y + token.to(tl.int64) * out_features + neurons, tl.sum(total, 1), mask=inside)


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
    y,
    tokens,
    in_features,
    out_features,
    mask_words,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
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
    weight, words_of = row_versions(row_map, starts, neurons, inside, values, mask, mask_words)
    inputs_of = x + token.to(tl.int64) * x_stride

    word = tl.arange(0, 8)
    column = tl.arange(0, 64)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, mask_words, 8):
        words = tl.load(words_of[:, None] + first + word[None, :], mask=inside[:, None], other=0)
        bits, places, count = nibbles(words.to(tl.uint32, bitcast=True), ROWS, 8)
        at = weight[:, None] + places
        for bit in tl.static_range(4):
            columns = first * 32 + bit * 64 + column
            inputs = tl.load(
                inputs_of[None, :] + columns[:, None],
                mask=valid[None, :] & (columns < in_features)[:, None],
                other=0,
            )
            weights, at = next_weights(at, bits, bit)
            if WIDEN:
                weights, inputs = weights.to(tl.float32), inputs.to(tl.float32)
            total = tl.dot(weights.to(inputs.dtype), inputs, total, input_precision="ieee")
        weight += count
    outputs = y + token.to(tl.int64)[None, :] * out_features + neurons[:, None]
    tl.store(outputs, total, mask=inside[:, None] & valid[None, :])
