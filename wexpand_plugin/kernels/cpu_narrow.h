// The kernel for CPUs without AVX-512: AVX2, and any other through the compiler's vectors of 8 floats.
//
//   few tokens    One row at a time, 64 columns per step: a table turns each byte of the mask into a shuffle that spreads the
//                 next values to 8 columns; multiply with the tokens' x. The dense weight never exists, not even in cache.
//   many tokens   Nothing is expanded and zeros cost nothing. Vectors lie along the tokens: each kept weight is
//                 broadcast and multiplied with its column of x, for up to 64 tokens at once, whose sums stay in registers.
//                 x is packed for it once per call: panels of 64 tokens, [columns][tokens].
//
// All arithmetic is in float32, whatever the type of the values.

#pragma once

#include <vector>

#include "cpu_common.h"

namespace {

typedef float Vec __attribute__((vector_size(32), may_alias));
constexpr int LANES = 8;

// ---- 8 columns of weights: w = values p[0..popcount) spread to the set bits of a mask byte, zero elsewhere. May read up to 32
// bytes from p. The byte comes as `row`, moved SHIFT bits to the left: where its row of a table begins.

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

template <class V> constexpr int WIDTH = 8;   // bytes of a row. float32: 8 x 1, for vpermps; negative where the column is pruned
template <> constexpr int WIDTH<Fp16> = 16;  // 8 x 2, for pshufb; negative clears
template <> constexpr int WIDTH<Bf16> = 32;  // 8 x 4, for pshufb on two copies of 8 values: to the upper halves of floats
template <class V> constexpr int SHIFT = WIDTH<V> == 32 ? 5 : WIDTH<V> == 16 ? 4 : 0;  // addresses scale by 8 at no cost

template <class V> struct Shuffles {
    int8_t table[256 * WIDTH<V>] = {};
    constexpr Shuffles() {
        constexpr int size = WIDTH<V> / 8, used = size == 1 ? 1 : 2;  // bytes of a place, and of it those that hold a value
        int8_t* to = table;
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, next = 0; lane < 8; ++lane, to += size) {
                const bool kept = bits >> lane & 1;
                for (int byte = 0; byte < size; ++byte) to[byte] = -128;
                for (int byte = 0; kept && byte < used; ++byte) to[size - used + byte] = int8_t(used * next + byte);
                next += kept;
            }
    }
    const int8_t* operator[](uint64_t row) const { return table + row * (WIDTH<V> >> SHIFT<V>); }
};
template <class V> alignas(64) constexpr Shuffles<V> SHUFFLES;

inline void expand(Vec& w, const float* p, uint64_t row) {
    const __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)SHUFFLES<float>[row]));
    __m256 values = _mm256_loadu_ps(p);
    asm("" : "+x"(values));  // vpermps takes twice as long with its values in memory (seen on Zen 3)
    const __m256 spread = _mm256_permutevar8x32_ps(values, place);
    w = _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(place));
}
inline void expand(Vec& w, const Bf16* p, uint64_t row) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    w = _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256((const __m256i*)SHUFFLES<Bf16>[row])));
}
inline void expand(Vec& w, const Fp16* p, uint64_t row) {
    const __m128i values = _mm_loadu_si128((const __m128i*)p);
    w = _mm256_cvtph_ps(_mm_shuffle_epi8(values, _mm_load_si128((const __m128i*)SHUFFLES<Fp16>[row])));
}

#else

template <class V> constexpr int SHIFT = 0;

template <class V> [[gnu::noinline]] void expand(Vec& w, const V* p, uint64_t bits) {  // inlined, it takes seconds to compile
    for (int lane = 0; lane < LANES; ++lane) {
        const bool kept = bits >> lane & 1;
        w[lane] = kept ? to_float(*p) : 0.0f;
        p += kept;
    }
}

#endif

// ---- Few tokens.

constexpr int TOKENS = 8;  // whose sums fit the registers: they share the expansion of a row
constexpr int FEW = 12;    // tokens of one expert; more are faster by the panels below (9 at 90% sparsity, 20 at 50%)
constexpr int WORD = 64;

// sums[t] = the row whose values and mask are given times x[t * width ...], x padded to whole words with zeros. Rows are too short
// for the hardware to learn their stream before it ends, so while one is read a later one is fetched, `ahead` values further on.
template <int T, class V>
void dot(const V* values, const uint8_t* mask, int64_t ahead, int64_t columns, const float* x, int64_t width, float* sums) {
    Vec acc[T][2] = {};  // two: one would wait for itself
    for (int64_t column = 0; column < columns; column += WORD) {
        uint64_t word;
        std::memcpy(&word, mask + column / 8, sizeof word);
        if (columns - column < WORD) word &= (uint64_t(1) << (columns - column)) - 1;
        for (size_t line = 0; line < sizeof(V) / 2; ++line)  // what half full rows need
            __builtin_prefetch((const char*)(values + ahead) + 64 * line);
#pragma GCC unroll 8
        for (int step = 0; step < WORD / LANES; ++step) {
            const int right = LANES * step - SHIFT<V>;
            const uint64_t row = (right < 0 ? word << -right : word >> right) & 255u << SHIFT<V>;
            Vec w;
            expand(w, values, row);
            values += __builtin_popcountll(row);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) acc[t][step & 1] += w * *(const Vec*)(x + t * width + column + LANES * step);
        }
    }
    for (int t = 0; t < T; ++t) {
        const Vec sum = acc[t][0] + acc[t][1];
        sums[t] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
    }
}

// ---- Many tokens.

struct Places {
    uint16_t of[256][8] = {};  // the places of a byte's set bits, then zeros
    constexpr Places() {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, next = 0; lane < 8; ++lane)
                if (bits >> lane & 1) of[bits][next++] = uint16_t(lane);
    }
};
alignas(64) constexpr Places PLACES;

// sums[0 .. 8N) += kept weights times their columns of a panel of 8N tokens.
template <int N> void accumulate(const uint16_t* columns, const float* weights, int64_t kept, const float* panel, float* sums) {
    Vec acc[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) acc[i] = ((const Vec*)sums)[i];
    for (int64_t k = 0; k < kept; ++k) {
        const Vec* x = (const Vec*)(panel + columns[k] * int64_t(LANES * N));
        const float w = weights[k];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) acc[i] += w * x[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) ((Vec*)sums)[i] = acc[i];
}

using Accumulate = void (*)(const uint16_t*, const float*, int64_t, const float*, float*);
constexpr Accumulate ACCUMULATE[] = {nullptr,       accumulate<1>, accumulate<2>, accumulate<3>, accumulate<4>,
                                     accumulate<5>, accumulate<6>, accumulate<7>, accumulate<8>};

// ---- One call.

constexpr int64_t PANEL = 64;              // tokens
constexpr int64_t PANEL_BYTES = 24 << 10;  // of one panel's columns: most of a 32 KiB L1
constexpr int64_t ITEM_ROWS = 128;         // rows per work item: they share each visit of x to the L1
constexpr int64_t ITEM_TOKENS = 512;       // their sums stay in L2
constexpr int64_t AHEAD = 4;               // rows
constexpr int64_t NARROW_TOKENS = 1024;    // per call: bounds the packed x, which is kept

template <class V> struct Narrow {
    const Call<V>& call;

    void run() const {
        thread_local Buffer buffer;
        thread_local std::vector<int64_t> begins;
        const int64_t width = (call.in + WORD - 1) / WORD * WORD;
        begins.resize(call.experts);
        int64_t size = 0;
        for (int64_t e = 0; e < call.experts; ++e) {
            begins[e] = size;
            size += width * (call.count(e) <= FEW ? call.count(e) : lanes(call.count(e)));
        }
        float* const packed = (float*)buffer.get(size * sizeof(float));
        const int64_t* const begin = begins.data();  // of this thread: another would see its own `begins`
        const int64_t tokens = call.begins[call.experts];
#pragma omp parallel for schedule(dynamic) num_threads(call.threads) if (tokens > TOKENS)
        for (int64_t e = 0; e < call.experts; ++e)
            if (call.count(e) <= FEW) pack_rows(e, width, packed + begin[e]);
        for (int64_t e = 0; e < call.experts; ++e)
            if (call.count(e) > FEW) pack_panels(e, width, packed + begin[e]);
        call.share(ITEM_ROWS, [&](int64_t expert, int64_t first, int64_t last) {
            const float* x = packed + begin[expert];
            const int64_t count = call.count(expert);
            if (count <= FEW) return few(expert, x, width, first, last);
            for (int64_t t = 0; t < count; t += ITEM_TOKENS) many(expert, t, x + t * width, width, first, last);
        });
    }

    static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
    static int64_t lanes(int64_t tokens) { return (tokens + LANES - 1) / LANES * LANES; }
    static int64_t panel(int64_t tokens) { return least(PANEL, lanes(tokens)); }  // tokens of the first panel of so many

    void pack_rows(int64_t expert, int64_t width, float* packed) const {
        for (int64_t t = call.begins[expert]; t < call.begins[expert + 1]; ++t, packed += width) {
            const V* x = call.x + call.order[t] * call.in;
            for (int64_t c = 0; c < call.in; ++c) packed[c] = to_float(x[c]);
            for (int64_t c = call.in; c < width; ++c) packed[c] = 0;
        }
    }

    void pack_panels(int64_t expert, int64_t width, float* packed) const {
        const int64_t count = call.count(expert), panels = (count + PANEL - 1) / PANEL, words = width / WORD;
        const int32_t* tokens = call.order + call.begins[expert];
#pragma omp parallel for num_threads(call.threads)
        for (int64_t item = 0; item < panels * words; ++item) {
            const int64_t first = item / words * PANEL, column = item % words * WORD, tokens_wide = panel(count - first);
            float* to = packed + first * width + column * tokens_wide;
            for (int64_t t = 0; t < tokens_wide; ++t) {  // the last token again where there is none: nobody stores its sums
                const V* x = call.x + tokens[least(first + t, count - 1)] * call.in + column;
                for (int64_t c = 0; c < least(WORD, call.in - column); ++c) to[c * tokens_wide + t] = to_float(x[c]);
            }
        }
    }

    void few(int64_t expert, const float* x, int64_t width, int64_t first, int64_t last) const {
        constexpr decltype(&dot<1, V>) DOT[] = {nullptr,   dot<1, V>, dot<2, V>, dot<3, V>, dot<4, V>,
                                                dot<5, V>, dot<6, V>, dot<7, V>, dot<8, V>};
        const int32_t *map = call.row_map + expert * call.out, *tokens = call.order + call.begins[expert];
        const int64_t count = call.count(expert);
        for (int64_t row = first; row < last; ++row) {
            const V* values = call.values + call.starts[map[row]];
            const V* later = call.values + call.starts[map[least(row + AHEAD, call.out - 1)]];
            float sums[FEW];
            for (int64_t t = 0; t < count; t += TOKENS)
                DOT[least(TOKENS, count - t)](values, call.mask + map[row] * call.mask_bytes(), later - values, call.in,
                                              x + t * width, width, sums + t);
            for (int64_t t = 0; t < count; ++t) store(call.y + tokens[t] * call.out + row, sums[t]);
        }
    }

    // Columns whose x fits L1 at a time: list the kept weights of all rows, multiply them with panel after panel.
    void many(int64_t expert, int64_t token, const float* x, int64_t width, int64_t first, int64_t last) const {
        thread_local Buffer columns_buffer, weights_buffer, sums_buffer;
        const int32_t *map = call.row_map + expert * call.out, *tokens = call.order + call.begins[expert] + token;
        const int64_t rows = last - first, count = least(ITEM_TOKENS, call.count(expert) - token);
        const int64_t chunk = PANEL_BYTES / (panel(count) * int64_t(sizeof(float))) / 8 * 8;
        auto* columns = (uint16_t*)columns_buffer.get((rows * chunk + 8) * sizeof(uint16_t));
        auto* weights = (float*)weights_buffer.get((rows * chunk + 8) * sizeof(float));
        auto* sums = (float*)sums_buffer.get(rows * lanes(count) * sizeof(float));  // [panel][row][token]
        std::memset(sums, 0, rows * lanes(count) * sizeof(float));
        const V* values[ITEM_ROWS];
        for (int64_t r = 0; r < rows; ++r) values[r] = call.values + call.starts[map[first + r]];

        for (int64_t column = 0; column < call.in; column += chunk) {
            const int64_t end = least(call.in, column + chunk);
            int64_t begin[ITEM_ROWS + 1] = {0};
            for (int64_t r = 0; r < rows; ++r) {
                const uint8_t* mask = call.mask + map[first + r] * call.mask_bytes();
                begin[r + 1] = begin[r] + list(values[r], mask, column, end, columns + begin[r], weights + begin[r]);
            }
            for (int64_t t = 0; t < count; t += PANEL) {
                const int64_t tokens_wide = panel(count - t);
                for (int64_t r = 0; r < rows; ++r)
                    ACCUMULATE[tokens_wide / LANES](columns + begin[r], weights + begin[r], begin[r + 1] - begin[r],
                                                    x + t * width + column * tokens_wide, sums + t * rows + r * tokens_wide);
            }
        }
        for (int64_t t = 0; t < count; ++t) {
            const int64_t begin = t / PANEL * PANEL, tokens_wide = panel(count - begin);
            const float* from = sums + begin * rows + t % PANEL;
            for (int64_t r = 0; r < rows; ++r) store(call.y + tokens[t] * call.out + first + r, from[r * tokens_wide]);
        }
    }

    // The kept weights of one row between two columns, and their places from `column` on; moves `values` past them. Returns how many.
    static int64_t list(const V*& values, const uint8_t* mask, int64_t column, int64_t end, uint16_t* columns, float* weights) {
        const V* from = values;
        for (int64_t c = column; c < end; c += 8) {
            const int bits = end - c < 8 ? mask[c / 8] & ((1 << (end - c)) - 1) : mask[c / 8];
            uint16_t places[8];  // local, or the compiler must fear that one store changes the next load
            float floats[8];
            for (int i = 0; i < 8; ++i) places[i] = uint16_t(c - column + PLACES.of[bits][i]);
            for (int i = 0; i < 8; ++i) floats[i] = to_float(from[i]);
            std::memcpy(columns, places, sizeof places);
            std::memcpy(weights, floats, sizeof floats);
            const int kept = __builtin_popcount(bits);
            columns += kept, weights += kept, from += kept;
        }
        const int64_t kept = from - values;
        values = from;
        return kept;
    }
};

}  // namespace
