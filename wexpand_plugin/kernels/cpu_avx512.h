// The kernel for CPUs with AVX-512, whose `vpexpand` spreads packed values to the places of a
// mask's set bits. There are three ways:
//
//   few tokens    Four rows at a time, expanded in registers: load the next values (unaligned,
//                 always a full vector), spread them, multiply with the tokens' x. All tokens of an
//                 expert share the expansion. The dense weight never exists, not even in cache.
//   many tokens   A tile of rows is expanded once into a buffer that fits the L2 cache, then
//                 multiplied with all of the expert's tokens in blocks whose x fits L1. Zeros take
//                 as long as other weights.
//   many tokens and few weights: panels (cpu_panels.h), which skip the zeros.
//
// The first two run the same inner loop (`dot_block`): 4 rows x T tokens of accumulators, lanes
// along the input columns, summed across lanes at the end. What a vector is and how one expands is
// said by a `Lanes` struct per value type and instruction set.

#pragma once

#include "cpu_common.h"
#include "cpu_panels.h"

namespace {

template <class V> constexpr bool HAS_EXPAND =
    false;                         // whether this CPU expands V in one instruction
template <class V> struct Avx512;  // defined if so

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

// ---- One vector of weights. Each Lanes<V> gives:
//   Acc, Op          accumulator and operand vectors        STEP    columns per operand
//   Bits             unsigned integer of STEP bits          TOKENS  tokens per block that fit the
//   registers expand(p, bits)  values p[0..popcount) spread to the set bits, zero elsewhere; may
//   read a full vector from p load(x), load(x, n)   all STEP columns of x, or the first n and zeros
//   in_register(v)   keeps the compiler from folding the load of v into each instruction that uses
//   it: loads are what the
//                    inner loop runs out of, and the memory form of expand is the slower one (both
//                    seen on Zen 4)
//   fma(acc, w, x), sum4(acc of 4 rows, out)      out[0..3] += the sum of each accumulator's lanes

struct AccLanes {
    using Acc = __m512;
    static constexpr int TOKENS = 6;
    static Acc zero() { return _mm512_setzero_ps(); }
    template <class Vector> static Vector in_register(Vector v) {
        asm("" : "+v"(v));
        return v;
    }
    static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) {
        const Acc ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const Acc cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const Acc all =
            _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
        const __m256 half =
            _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        const __m128 quarter =
            _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), quarter));
    }
};

struct FloatLanes : AccLanes {
    using Op = __m512;
    using Bits = uint16_t;
    static constexpr int STEP = 16;
    static void fma(Acc& acc, Op w, Op x) { acc = _mm512_fmadd_ps(w, x, acc); }
};

template <class V> struct Lanes;

template <> struct Lanes<float> : FloatLanes {
    static Op expand(const float* p, Bits bits) {
        return _mm512_maskz_expand_ps(bits, in_register(_mm512_loadu_ps(p)));
    }
    static Op load(const float* x) { return _mm512_loadu_ps(x); }
    static Op load(const float* x, int n) {
        return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), x);
    }
};

template <> constexpr bool HAS_EXPAND<float> = true;

#if defined(__AVX512VBMI2__)

template <> struct Lanes<Fp16> : FloatLanes {
    static Op expand(const Fp16* p, Bits bits) {
        return _mm512_cvtph_ps(
            _mm256_maskz_expand_epi16(bits, in_register(_mm256_loadu_si256((const __m256i*)p))));
    }
    static Op load(const Fp16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
    static Op load(const Fp16* x, int n) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), x));
    }
};

#if defined(__AVX512BF16__)
template <> struct Lanes<Bf16> : AccLanes {
    using Op = __m512i;
    using Bits = uint32_t;
    static constexpr int STEP = 32;
    static Op expand(const Bf16* p, Bits bits) {
        return _mm512_maskz_expand_epi16(bits, in_register(_mm512_loadu_si512(p)));
    }
    static Op load(const Bf16* x) { return _mm512_loadu_si512(x); }
    static Op load(const Bf16* x, int n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, x); }
    static void fma(Acc& acc, Op w, Op x) { acc = _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
};
#else
template <> struct Lanes<Bf16> : FloatLanes {
    static Op widen(__m256i v) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
    }
    static Op expand(const Bf16* p, Bits bits) {
        return widen(
            _mm256_maskz_expand_epi16(bits, in_register(_mm256_loadu_si256((const __m256i*)p))));
    }
    static Op load(const Bf16* x) { return widen(_mm256_loadu_si256((const __m256i*)x)); }
    static Op load(const Bf16* x, int n) {
        return widen(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), x));
    }
};
#endif

template <> constexpr bool HAS_EXPAND<Bf16> = true;
template <> constexpr bool HAS_EXPAND<Fp16> = true;
#endif  // VBMI2

// ---- Where the inner loop takes its next vectors of weights from.

constexpr int ROWS = 4;

// Straight from the row pool: expanded in registers. Rows are too short for the hardware to learn
// their stream before it ends, so while a group of rows is read the group after it is fetched:
// `ahead` values further on.
template <class V> struct Packed {
    using L = Lanes<V>;
    const V* values[ROWS];
    const uint8_t* mask[ROWS];
    int64_t ahead[ROWS];

    void prefetch() const {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(values[r] + ahead[r]);
    }

    typename L::Op next(int row, typename L::Bits valid) {
        const auto bits = typename L::Bits(load_bits<typename L::Bits>(mask[row]) & valid);
        const auto w = L::expand(values[row], bits);
        values[row] += __builtin_popcount(bits);
        mask[row] += sizeof bits;
        return w;
    }
};

// From rows already expanded into a tile, `stride` vectors apart.
template <class V> struct Expanded {
    using L = Lanes<V>;
    const typename L::Op* row[ROWS];

    void prefetch() const {}
    typename L::Op next(int r, typename L::Bits) { return L::in_register(*row[r]++); }
};

// sums[t * stride + row] += dot products of ROWS rows and T tokens over `columns` columns that
// start at `column` of x.
template <class V, int T, class Weights> inline void dot_block(Weights weights, const V* const* x,
                                                               int64_t column, int64_t columns,
                                                               float* sums, int64_t stride) {
    using L = Lanes<V>;
    typename L::Acc acc[T][ROWS];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) acc[t][r] = L::zero();

    const int64_t end = column + columns / L::STEP * L::STEP;
    const int rest = int(columns % L::STEP);
    constexpr auto ALL = typename L::Bits(~typename L::Bits(0));
    for (; column < end; column += L::STEP) {
        if (column & L::STEP)
            weights.prefetch();  // two steps of a half full row are about one cache line
        typename L::Op w[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) w[r] = weights.next(r, ALL);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const auto xt = L::in_register(L::load(x[t] + column));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) L::fma(acc[t][r], w[r], xt);
        }
    }
    if (rest) {
        const auto valid = typename L::Bits((uint64_t(1) << rest) - 1);
        typename L::Op w[ROWS];
        for (int r = 0; r < ROWS; ++r) w[r] = weights.next(r, valid);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const auto xt = L::load(x[t] + column, rest);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) L::fma(acc[t][r], w[r], xt);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
        L::sum4(acc[t][0], acc[t][1], acc[t][2], acc[t][3], sums + t * stride);
}

template <class V, class Weights> void dot_block(int tokens, Weights weights, const V* const* x,
                                                 int64_t column, int64_t columns, float* sums,
                                                 int64_t stride) {
    if constexpr (Lanes<V>::TOKENS > 2) {
        switch (tokens) {
            case 3:
                return dot_block<V, 3>(weights, x, column, columns, sums, stride);
            case 4:
                return dot_block<V, 4>(weights, x, column, columns, sums, stride);
            case 5:
                return dot_block<V, 5>(weights, x, column, columns, sums, stride);
            case 6:
                return dot_block<V, 6>(weights, x, column, columns, sums, stride);
        }
    }
    if (tokens == 1) return dot_block<V, 1>(weights, x, column, columns, sums, stride);
    return dot_block<V, 2>(weights, x, column, columns, sums, stride);
}

// ---- One call.

constexpr int64_t MAX_ROWS = 64;     // rows per work item
constexpr int64_t MAX_TOKENS = 512;  // tokens that share one expanded tile: their sums stay in L2
constexpr int64_t X_BYTES =
    24 << 10;  // x of a block of tokens, as held in registers: most of a 32 KiB L1
constexpr int64_t DIRECT_TOKENS = 12;  // more tokens of one expert than this pay for a tile

template <class V> struct Avx512 {
    using L = Lanes<V>;
    using Op = typename L::Op;
    const Call<V>& call;

    void run() const {
        const Panels<V> panels(call, panels_from(call.density));
        call.share(MAX_ROWS, [&](int64_t expert, int64_t first, int64_t last) {
            if (panels.take(expert)) return panels.multiply(expert, first, last);
            const int64_t count = call.count(expert);
            const int32_t *map = call.row_map + expert * call.out,
                          *tokens = call.order + call.begins[expert];
            if (count <= DIRECT_TOKENS) direct(map, tokens, count, first, last);
            else
                for (int64_t t = 0; t < count; t += MAX_TOKENS)
                    tiled(map, tokens + t, count - t < MAX_TOKENS ? count - t : MAX_TOKENS, first,
                          last);
        });
    }

    // Tokens of one expert from which skipping zeros is faster than multiplying with them (Zen 4;
    // evals/LOG.md of 2026-11-26).
    static int64_t panels_from(double density) {
        constexpr bool pairs = L::STEP == 32;  // one instruction multiplies twice as many
        if (density > (pairs ? 0.45 : 0.6)) return int64_t(1) << 62;
        return int64_t(pairs ? 8 + 25 * density : 4 + 12 * density + 90 * density * density);
    }

    // ROWS rows of an expert from `row`; past the last row the last one again, whose sums nobody
    // stores.
    Packed<V> packed(const int32_t* map, int64_t row) const {
        Packed<V> weights;
        for (int r = 0; r < ROWS; ++r) {
            const int64_t version = map[row + r < call.out ? row + r : call.out - 1];
            const int64_t next = map[row + r + ROWS < call.out ? row + r + ROWS : call.out - 1];
            weights.values[r] = call.values + call.starts[version];
            weights.ahead[r] = int64_t(call.starts[next]) - int64_t(call.starts[version]);
            weights.mask[r] = call.mask + version * call.mask_bytes();
        }
        return weights;
    }

    void direct(const int32_t* map, const int32_t* tokens, int64_t count, int64_t first,
                int64_t last) const {
        for (int64_t t0 = 0; t0 < count; t0 += L::TOKENS) {
            const int n = int(count - t0 < L::TOKENS ? count - t0 : L::TOKENS);
            const V* xs[L::TOKENS];
            for (int t = 0; t < n; ++t) xs[t] = call.x + tokens[t0 + t] * call.in;
            for (int64_t row = first; row < last; row += ROWS) {
                float sums[L::TOKENS * ROWS] = {};
                dot_block<V>(n, packed(map, row), xs, 0, call.in, sums, ROWS);
                for (int t = 0; t < n; ++t)
                    for (int64_t r = 0; r < ROWS && row + r < last; ++r)
                        store(call.y + tokens[t0 + t] * call.out + row + r, sums[t * ROWS + r]);
            }
        }
    }

    // Column chunk by column chunk: expand it for all rows, multiply it with all tokens, add to the
    // sums.
    void tiled(const int32_t* map, const int32_t* tokens, int64_t count, int64_t first,
               int64_t last) const {
        thread_local Buffer tile_buffer, sums_buffer;
        const int64_t groups = (last - first + ROWS - 1) / ROWS, rows = groups * ROWS;
        const int64_t chunk = X_BYTES / (L::TOKENS * int64_t(sizeof(Op))) * L::STEP;
        const int64_t width =
            chunk / L::STEP +
            1;  // one vector apart, or equal columns of all rows share a cache set
        Op* tile = (Op*)tile_buffer.get(rows * width * sizeof(Op));
        float* sums = (float*)sums_buffer.get(count * rows * sizeof(float));
        std::memset(sums, 0, count * rows * sizeof(float));
        Packed<V> weights[MAX_ROWS / ROWS];
        for (int64_t g = 0; g < groups; ++g) weights[g] = packed(map, first + g * ROWS);

        for (int64_t column = 0; column < call.in; column += chunk) {
            const int64_t columns = call.in - column < chunk ? call.in - column : chunk;
            for (int64_t g = 0; g < groups; ++g)
                expand(weights[g], columns, tile + g * ROWS * width, width);
            for (int64_t t0 = 0; t0 < count; t0 += L::TOKENS) {
                const int n = int(count - t0 < L::TOKENS ? count - t0 : L::TOKENS);
                const V* xs[L::TOKENS];
                for (int t = 0; t < n; ++t) xs[t] = call.x + tokens[t0 + t] * call.in;
                for (int64_t g = 0; g < groups; ++g) {
                    const Op* at = tile + g * ROWS * width;
                    const Expanded<V> expanded{{at, at + width, at + 2 * width, at + 3 * width}};
                    dot_block<V>(n, expanded, xs, column, columns, sums + t0 * rows + g * ROWS,
                                 rows);
                }
            }
        }
        for (int64_t t = 0; t < count; ++t)
            for (int64_t r = 0; r < last - first; ++r)
                store(call.y + tokens[t] * call.out + first + r, sums[t * rows + r]);
    }

    static void expand(Packed<V>& weights, int64_t columns, Op* tile, int64_t width) {
        for (int64_t s = 0; columns > 0; ++s, columns -= L::STEP) {
            const auto valid =
                typename L::Bits(columns < L::STEP ? (uint64_t(1) << columns) - 1 : ~uint64_t(0));
            if (s & 1) weights.prefetch();
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) tile[r * width + s] = weights.next(r, valid);
        }
    }
};

#endif  // AVX-512

}  // namespace
