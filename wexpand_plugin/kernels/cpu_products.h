// What panels (cpu_panels.h) are made of: which columns a row keeps, and weights times those
// columns for many tokens.

#pragma once

#include "cpu_common.h"

namespace {

// list_kept(mask, first, end, columns): the places of a row's kept weights between two columns,
// from `first` on. Returns how many; may write up to LISTED behind them.

#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)

constexpr int LISTED = 32;

inline int64_t list_kept(const uint8_t* mask, int64_t first, int64_t end, uint16_t* columns) {
    alignas(64) static constexpr uint16_t COUNT[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                       11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                       22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    uint16_t* to = columns;
    __m512i places = _mm512_load_si512(COUNT);
    for (int64_t c = first; c < end; c += 32) {
        uint32_t bits = load_bits<uint32_t>(mask + c / 8);
        if (end - c < 32) bits &= (1u << (end - c)) - 1;
        _mm512_storeu_si512(to,
                            _mm512_maskz_compress_epi16(bits, places));  // to memory it is slower
        places = _mm512_add_epi16(places, _mm512_set1_epi16(32));
        to += __builtin_popcount(bits);
    }
    return to - columns;
}

#else

constexpr int LISTED = 8;

struct Places {
    uint16_t of[256][8] = {};  // the places of a byte's set bits, then zeros
    constexpr Places() {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, next = 0; lane < 8; ++lane)
                if (bits >> lane & 1) of[bits][next++] = uint16_t(lane);
    }
};
alignas(64) constexpr Places PLACES;

inline int64_t list_kept(const uint8_t* mask, int64_t first, int64_t end, uint16_t* columns) {
    uint16_t* to = columns;
    for (int64_t c = first; c < end; c += 8) {
        const int bits = end - c < 8 ? mask[c / 8] & ((1 << (end - c)) - 1) : mask[c / 8];
        uint16_t places[8];  // local, or the compiler must fear that a store changes the next load
        for (int i = 0; i < 8; ++i) places[i] = uint16_t(c - first + PLACES.of[bits][i]);
        std::memcpy(to, places, sizeof places);
        to += __builtin_popcount(bits);
    }
    return to - columns;
}

#endif

// Products<V>: how weights of a type are multiplied with a panel, [columns][tokens] of x.
//   X, W             what a panel holds, and what weights are read as     WIDE, MOST   tokens of a
//   vector, and vectors of a panel x(v)             v as a panel holds it token(slot)  the token in
//   a slot of a vector weights(from, kept, to)   `kept` weights as W, perhaps written to `to`; may
//   read 8 more add<N>(columns, weights, kept, panel, sums)   sums[0 .. WIDE * N) += the weights
//   times their columns of N vectors

template <class V> struct Products {
#if defined(__AVX512F__)
    typedef float Tokens __attribute__((vector_size(64), may_alias));
#else
    typedef float Tokens __attribute__((vector_size(32), may_alias));
#endif
    using X = float;
    using W = float;
    static constexpr int64_t WIDE = sizeof(Tokens) / sizeof(float), MOST = 64 / WIDE;

    static X x(V v) { return to_float(v); }
    static int64_t token(int64_t slot) { return slot; }
    static const W* weights(const V* from, int64_t kept, W* to) {
        if constexpr (std::is_same_v<V, W>) return from;
        for (int64_t k = 0; k < kept; k += 8) *(Float8*)(to + k) = load8(from + k);
        return to;
    }

    template <int N> static void add(const uint16_t* columns, const W* weights, int64_t kept,
                                     const X* panel, float* sums) {
        constexpr int CHAINS =
            N >= 4   ? 1
            : N >= 2 ? 2
                     : 4;  // a multiply-add waits for the one before it in the same sum
        Tokens acc[CHAINS][N] = {};
        const auto one = [&](Tokens* sum, int64_t k) {
            const Tokens* x = (const Tokens*)(panel + columns[k] * (WIDE * N));
            const float w = weights[k];
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) sum[i] += w * x[i];
        };
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) acc[0][i] = ((const Tokens*)sums)[i];
        int64_t k = 0;
        for (; k + CHAINS <= kept; k += CHAINS)
#pragma GCC unroll 4
            for (int chain = 0; chain < CHAINS; ++chain) one(acc[chain], k + chain);
        for (; k < kept; ++k) one(acc[0], k);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            for (int chain = 1; chain < CHAINS; ++chain) acc[0][i] += acc[chain][i];
            ((Tokens*)sums)[i] = acc[0][i];
        }
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

// One instruction multiplies pairs of bfloat16, so two weights are taken at a time and the tokens
// of their columns interleaved.
template <> struct Products<Bf16> {
    using X = Bf16;
    using W = Bf16;
    static constexpr int64_t WIDE = 32, MOST = 2;

    static X x(Bf16 v) { return v; }
    // Interleaving takes 4 slots of every 8 to the first sum and 4 to the second.
    static int64_t token(int64_t slot) { return slot % 8 / 4 * 16 + slot / 8 * 4 + slot % 4; }
    static const W* weights(const Bf16* from, int64_t, W*) { return from; }

    template <int N> static void add(const uint16_t* columns, const W* weights, int64_t kept,
                                     const X* panel, float* sums) {
        constexpr int CHAINS = N == 1 ? 2 : 1;
        alignas(64) static constexpr X NOTHING[WIDE * N] = {};
        __m512 acc[CHAINS][2 * N] = {};
        const auto two = [&](__m512* sum, const X* a, const X* b, uint32_t pair) {
            const auto w = (__m512bh)_mm512_set1_epi32(int(pair));
#pragma GCC unroll 2
            for (int i = 0; i < N; ++i) {
                const __m512i first = _mm512_load_si512(a + i * WIDE),
                              second = _mm512_load_si512(b + i * WIDE);
                sum[2 * i] =
                    _mm512_dpbf16_ps(sum[2 * i], (__m512bh)_mm512_unpacklo_epi16(first, second), w);
                sum[2 * i + 1] = _mm512_dpbf16_ps(
                    sum[2 * i + 1], (__m512bh)_mm512_unpackhi_epi16(first, second), w);
            }
        };
        const auto column = [&](int64_t k) { return panel + columns[k] * (WIDE * N); };
#pragma GCC unroll 8
        for (int i = 0; i < 2 * N; ++i) acc[0][i] = _mm512_load_ps(sums + 16 * i);
        int64_t k = 0;
        for (; k + 2 * CHAINS <= kept; k += 2 * CHAINS)
#pragma GCC unroll 2
            for (int64_t c = 0; c < 2 * CHAINS; c += 2)
                two(acc[c / 2], column(k + c), column(k + c + 1),
                    load_bits<uint32_t>((const uint8_t*)(weights + k + c)));
        for (; k + 2 <= kept; k += 2)
            two(acc[0], column(k), column(k + 1),
                load_bits<uint32_t>((const uint8_t*)(weights + k)));
        if (k < kept) two(acc[0], column(k), NOTHING, weights[k].bits);
#pragma GCC unroll 8
        for (int i = 0; i < 2 * N; ++i) {
            if constexpr (CHAINS == 2) acc[0][i] = _mm512_add_ps(acc[0][i], acc[1][i]);
            _mm512_store_ps(sums + 16 * i, acc[0][i]);
        }
    }
};

#endif

}  // namespace
