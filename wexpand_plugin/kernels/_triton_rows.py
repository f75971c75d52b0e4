"""How packed rows are read inside a Triton kernel; the layout is described in `triton.py`.

The unit is a group of four columns of one row version. Two things say all about it: four mask bits,
and the place of its first kept weight, counted from the row version's first. `groups` finds both
for many groups at once. From there a weight is "if its bit is set, take it and step one further",
four times, with no more counting: `next_float` steps through memory, `next_integer` shifts a word
that `integers` has loaded with all that the group keeps.

Words are unsigned 32-bit (stored as int32).
"""

import triton
import triton.language as tl

__all__ = ["groups", "integers", "next_float", "next_integer", "row_versions"]


@triton.jit
def bit_count(word):
    """Set bits of uint32 words, as int32. LLVM turns this form into one `popc` instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def row_versions(row_map, starts, neurons, inside, values):
    """Each neuron's row version, and a pointer to the element that it begins at."""
    version = tl.load(row_map + neurons, mask=inside, other=0).to(tl.int64)
    start = tl.load(starts + version, mask=inside, other=0).to(tl.int64)
    return version, values + start


@triton.jit
def groups(
    mask,
    mask_words,
    version,
    here,
    first,
    before,
    in_features,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Mask bits and places of the 8 * WORDS groups from word `first` on: [ROWS, 8 * WORDS].

    The low four bits of `bits` belong to the group. `before` [ROWS] is what the words before
    `first` keep; it comes back with these words' weights added. Where `mask` is None rows are full,
    and it is arithmetic: columns past the last of the row are the last of their groups.
    """
    if mask is None:
        group = first * 8 + tl.arange(0, 8 * WORDS)
        span, lane = group // 64 * 256, group % 64
        left = tl.minimum(in_features - tl.minimum(span, in_features), 256)
        place = tl.minimum(span, in_features) + lane * (left // 64) + tl.minimum(lane, left % 64)
        places = tl.zeros((ROWS, 1), tl.int32) + place[None, :]
        bits = places * 0 + 15
    else:
        words_of = mask + version * mask_words
        word = first + tl.arange(0, WORDS)
        words = tl.load(words_of[:, None] + word[None, :], mask=here, other=0)
        words = words.to(tl.uint32, bitcast=True)
        counts = bit_count(words)
        earlier = before[:, None] + tl.cumsum(counts, 1) - counts
        shift = (tl.arange(0, 8) * 4).to(tl.uint32)[None, None, :]
        lower = words[:, :, None] & ((shift * 0 + 1 << shift) - 1)
        bits = tl.reshape(words[:, :, None] >> shift, (ROWS, 8 * WORDS))
        places = tl.reshape(earlier[:, :, None] + bit_count(lower), (ROWS, 8 * WORDS))
        before += tl.sum(counts, 1)
    return bits, places, before


@triton.jit
def next_float(at, bits, bit: tl.constexpr, FULL: tl.constexpr):
    """Each group's weight for its column `bit` (zero where pruned), and the pointers after it.

    The load has no mask: it may read one weight past a group, which costs no extra memory line
    and fewer instructions than a masked one. `values` is padded for the last row version. In full
    rows what is read past the last column is multiplied by an input of zero.
    """
    weights = tl.load(at)
    if FULL:
        at += 1
    else:
        kept = (bits & (1 << bit)) != 0
        weights = tl.where(kept, weights, 0.0)
        at += kept.to(tl.int32)
    return weights, at


@triton.jit
def integers(weight, places, BITS: tl.constexpr):
    """uint32 [ROWS, groups]: what each group keeps, up to four integers, the first in low bits.

    `weight` [ROWS] points at the row versions' first words. Two words are read, since a group may
    begin anywhere in the first; the second comes from the same memory line most of the time.
    """
    offset = places * BITS
    word = weight[:, None] + (offset >> 5)
    low = tl.load(word).to(tl.uint32, bitcast=True)
    high = tl.load(word + 1).to(tl.uint32, bitcast=True)
    shift = (offset & 31).to(tl.uint32)
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def next_integer(packed, bits, bit: tl.constexpr, FULL: tl.constexpr, BITS: tl.constexpr):
    """As `next_float`, int32, from what `integers` gave; and what it leaves for the next ones."""
    weights = (packed << (32 - BITS)).to(tl.int32, bitcast=True) >> (32 - BITS)
    if BITS < 4:  # odd ones, see format/values.py
        weights = weights * 2 + 1
    if FULL:
        packed = packed >> BITS
    else:
        kept = (bits & (1 << bit)) != 0
        weights = tl.where(kept, weights, 0)
        packed = tl.where(kept, packed >> BITS, packed)
    return weights, packed
