// Many tokens of one expert: nothing is expanded and zeros cost nothing.
//
// Vectors lie along the tokens: each kept weight is broadcast and multiplied with its column of x, for up to 64 tokens at once,
// whose sums stay in registers. x is packed for it once per call: panels of 64 tokens, [columns][tokens]. All arithmetic is in
// float32, whatever the type of the values.

#pragma once

#include <vector>

#include "cpu_common.h"

namespace {

// list(mask, first, end, columns): the places of a row's kept weights between two columns, from `first` on. Returns how many; may
// write up to LISTED behind them.

#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)

constexpr int LISTED = 32;

inline int64_t list(const uint8_t* mask, int64_t first, int64_t end, uint16_t* columns) {
    alignas(64) static constexpr uint16_t COUNT[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                       16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    uint16_t* to = columns;
    __m512i places = _mm512_load_si512(COUNT);
    for (int64_t c = first; c < end; c += 32) {
        uint32_t bits = load_bits<uint32_t>(mask + c / 8);
        if (end - c < 32) bits &= (1u << (end - c)) - 1;
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(bits, places));  // to memory it is slower
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

inline int64_t list(const uint8_t* mask, int64_t first, int64_t end, uint16_t* columns) {
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

#if defined(__AVX512F__)
typedef float Tokens __attribute__((vector_size(64), may_alias));
#else
typedef float Tokens __attribute__((vector_size(32), may_alias));
#endif
constexpr int64_t WIDE = sizeof(Tokens) / sizeof(float);

// sums[0 .. WIDE * N) += kept weights times their columns of a panel of WIDE * N tokens.
template <int N> void accumulate(const uint16_t* columns, const float* weights, int64_t kept, const float* panel, float* sums) {
    constexpr int CHAINS = N >= 4 ? 1 : N >= 2 ? 2 : 4;  // a multiply-add waits for the one before it in the same sum
    Tokens acc[CHAINS][N] = {};
    const auto add = [&](Tokens* sum, int64_t k) {
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
        for (int chain = 0; chain < CHAINS; ++chain) add(acc[chain], k + chain);
    for (; k < kept; ++k) add(acc[0], k);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        for (int chain = 1; chain < CHAINS; ++chain) acc[0][i] += acc[chain][i];
        ((Tokens*)sums)[i] = acc[0][i];
    }
}

using Accumulate = void (*)(const uint16_t*, const float*, int64_t, const float*, float*);
constexpr Accumulate ACCUMULATE[] = {nullptr,       accumulate<1>, accumulate<2>, accumulate<3>, accumulate<4>,
                                     accumulate<5>, accumulate<6>, accumulate<7>, accumulate<8>};

constexpr int64_t WORD = 64;               // columns that are packed at a time
constexpr int64_t PANEL = 64;              // tokens
constexpr int64_t PANEL_BYTES = (WIDE > 8 ? 48 : 24) << 10;  // of one panel's columns, in L1 or L2: see evals/LOG.md
constexpr int64_t PANEL_ROWS = 128;        // the most rows of one call: they share each visit of x to the cache
constexpr int64_t PANEL_TOKENS = 512;      // whose sums stay in L2

template <class V> struct Panels {
    const Call<V>& call;
    const int64_t least_tokens, width;  // columns, rounded up to words
    const float* packed;
    const int64_t* begin;  // of each expert's panels in `packed`

    // For the experts that have at least `tokens` tokens: packs their x.
    Panels(const Call<V>& call, int64_t tokens) : call(call), least_tokens(tokens), width((call.in + WORD - 1) / WORD * WORD) {
        thread_local Buffer buffer;
        thread_local std::vector<int64_t> begins;
        begins.resize(call.experts);
        int64_t size = 0;
        for (int64_t e = 0; e < call.experts; ++e) {
            begins[e] = size;
            if (take(e)) size += width * whole(call.count(e));
        }
        float* const to = (float*)buffer.get(size * sizeof(float));
        packed = to, begin = begins.data();
        pack(to);
    }

    bool take(int64_t expert) const { return call.count(expert) >= least_tokens; }

    static int64_t whole(int64_t tokens) { return (tokens + WIDE - 1) / WIDE * WIDE; }
    static int64_t panel(int64_t tokens) { return least(PANEL, whole(tokens)); }  // tokens of the first panel of so many

    void pack(float* to) const {
        struct Item { int64_t expert, first; };  // a panel: an expert, and which of its tokens is the first
        thread_local std::vector<Item> items;
        items.clear();
        for (int64_t e = 0; e < call.experts; ++e)
            for (int64_t first = 0; take(e) && first < call.count(e); first += PANEL) items.push_back({e, first});
        const Item* const item = items.data();  // of this thread
        const int64_t words = width / WORD, work = int64_t(items.size()) * words;
#pragma omp parallel for num_threads(call.threads) if (work > 64)
        for (int64_t i = 0; i < work; ++i) {
            const auto [expert, first] = item[i / words];
            const int64_t column = i % words * WORD, tokens_wide = panel(call.count(expert) - first);
            const int32_t* tokens = call.order + call.begins[expert];
            float* at = to + begin[expert] + first * width + column * tokens_wide;
            for (int64_t t = 0; t < tokens_wide; ++t) {  // the last token again where there is none: nobody stores its sums
                const V* x = call.x + tokens[least(first + t, call.count(expert) - 1)] * call.in + column;
                for (int64_t c = 0; c < least(WORD, call.in - column); ++c) at[c * tokens_wide + t] = to_float(x[c]);
            }
        }
    }

    // A range of output rows for all of the expert's tokens.
    void multiply(int64_t expert, int64_t first, int64_t last) const {
        for (int64_t t = 0; t < call.count(expert); t += PANEL_TOKENS) multiply(expert, t, first, last);
    }

    // Columns whose x fits L1 at a time: list the kept weights of all rows, multiply them with panel after panel.
    void multiply(int64_t expert, int64_t token, int64_t first, int64_t last) const {
        const float* const x = packed + begin[expert] + token * width;
        thread_local Buffer columns_buffer, weights_buffer, sums_buffer;
        const int32_t *map = call.row_map + expert * call.out, *tokens = call.order + call.begins[expert] + token;
        const int64_t rows = last - first, count = least(PANEL_TOKENS, call.count(expert) - token);
        const int64_t chunk = PANEL_BYTES / (panel(count) * int64_t(sizeof(float))) / 8 * 8;
        auto* columns = (uint16_t*)columns_buffer.get((rows * chunk + LISTED) * sizeof(uint16_t));
        auto* weights = (float*)weights_buffer.get((rows * chunk + 8) * sizeof(float));
        auto* sums = (float*)sums_buffer.get(rows * whole(count) * sizeof(float));  // [panel][row][token]
        std::memset(sums, 0, rows * whole(count) * sizeof(float));
        const V* values[PANEL_ROWS];
        for (int64_t r = 0; r < rows; ++r) values[r] = call.values + call.starts[map[first + r]];

        for (int64_t column = 0; column < call.in; column += chunk) {
            const int64_t end = least(call.in, column + chunk);
            int64_t begin[PANEL_ROWS + 1] = {0};
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t later = least(r + 8, rows - 1);  // rows of a pool that experts share lie anywhere
                __builtin_prefetch(values[later]);
                __builtin_prefetch((const char*)values[later] + 64);
                __builtin_prefetch(call.mask + map[first + later] * call.mask_bytes() + column / 8);
                const uint8_t* mask = call.mask + map[first + r] * call.mask_bytes();
                const int64_t kept = list(mask, column, end, columns + begin[r]);
                for (int64_t k = 0; k < kept; k += 8) *(Eight*)(weights + begin[r] + k) = eight(values[r] + k);
                values[r] += kept;
                begin[r + 1] = begin[r] + kept;
            }
            for (int64_t t = 0; t < count; t += PANEL) {
                const int64_t tokens_wide = panel(count - t);
                for (int64_t r = 0; r < rows; ++r)
                    ACCUMULATE[tokens_wide / WIDE](columns + begin[r], weights + begin[r], begin[r + 1] - begin[r],
                                                    x + t * width + column * tokens_wide, sums + t * rows + r * tokens_wide);
            }
        }
        for (int64_t t = 0; t < count; ++t) {
            const int64_t begin = t / PANEL * PANEL, tokens_wide = panel(count - begin);
            const float* from = sums + begin * rows + t % PANEL;
            for (int64_t r = 0; r < rows; ++r) store(call.y + tokens[t] * call.out + first + r, from[r * tokens_wide]);
        }
    }
};

}  // namespace
