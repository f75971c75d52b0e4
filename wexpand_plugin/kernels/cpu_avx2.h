// The kernel for CPUs without AVX-512: AVX2, and any other through the compiler's vectors of 8
// floats.
//
//   few tokens    One row at a time, 64 columns per step: a table turns each byte of the mask into
//                 a shuffle that spreads the next values to 8 columns; multiply with the tokens' x.
//                 The dense weight never exists, not even in cache.
//   many tokens   Panels (cpu_panels.h).
//
// All arithmetic is in float32, whatever the type of the values.

#pragma once

#include "cpu_common.h"
#include "cpu_panels.h"

namespace {

constexpr int LANES = 8;

// ---- 8 columns of weights: w = values p[0..popcount) spread to the set bits of a mask byte, zero
// elsewhere. May read up to 32 bytes from p. The byte comes as `row`, moved SHIFT bits to the left:
// where its row of a table begins.

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// Bytes of a row. float32: 8 x 1, for vpermps; negative where the column is pruned.
template <class V> constexpr int WIDTH = 8;
template <> constexpr int WIDTH<Fp16> = 16;  // 8 x 2, for pshufb; negative clears
template <> constexpr int WIDTH<Bf16> =
    32;  // 8 x 4, for pshufb on two copies of 8 values: to the upper halves of floats
template <class V> constexpr int SHIFT = WIDTH<V> == 32   ? 5
                                         : WIDTH<V> == 16 ? 4
                                                          : 0;  // addresses scale by 8 at no cost

template <class V> struct Shuffles {
    int8_t table[256 * WIDTH<V>] = {};
    constexpr Shuffles() {
        constexpr int size = WIDTH<V> / 8,
                      used =
                          size == 1 ? 1 : 2;  // bytes of a place, and of it those that hold a value
        int8_t* to = table;
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, next = 0; lane < 8; ++lane, to += size) {
                const bool kept = bits >> lane & 1;
                for (int byte = 0; byte < size; ++byte) to[byte] = -128;
                for (int byte = 0; kept && byte < used; ++byte)
                    to[size - used + byte] = int8_t(used * next + byte);
                next += kept;
            }
    }
    const int8_t* operator[](uint64_t row) const { return table + row * (WIDTH<V> >> SHIFT<V>); }
};
template <class V> alignas(64) constexpr Shuffles<V> SHUFFLES;

inline void expand(Float8& w, const float* p, uint64_t row) {
    const __m256i place =
        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)SHUFFLES<float>[row]));
    __m256 values = _mm256_loadu_ps(p);
    asm(""
        : "+x"(values));  // vpermps takes twice as long with its values in memory (seen on Zen 3)
    const __m256 spread = _mm256_permutevar8x32_ps(values, place);
    w = _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(place));
}
inline void expand(Float8& w, const Bf16* p, uint64_t row) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    w = _mm256_castsi256_ps(
        _mm256_shuffle_epi8(twice, _mm256_load_si256((const __m256i*)SHUFFLES<Bf16>[row])));
}
inline void expand(Float8& w, const Fp16* p, uint64_t row) {
    const __m128i values = _mm_loadu_si128((const __m128i*)p);
    w = _mm256_cvtph_ps(
        _mm_shuffle_epi8(values, _mm_load_si128((const __m128i*)SHUFFLES<Fp16>[row])));
}

#else

template <class V> constexpr int SHIFT = 0;

template <class V>
[[gnu::noinline]] void expand(Float8& w, const V* p,
                              uint64_t bits) {  // inlined, it takes seconds to compile
    for (int lane = 0; lane < LANES; ++lane) {
        const bool kept = bits >> lane & 1;
        w[lane] = kept ? to_float(*p) : 0.0f;
        p += kept;
    }
}

#endif

// ---- Few tokens.

constexpr int TOKENS = 8;  // whose sums fit the registers: they share the expansion of a row
constexpr int FEW = 19;    // the most tokens of one expert that go this way

// sums[t] = the row whose values and mask are given times x[t * width ...], x padded to whole words
// with zeros. Rows are too short for the hardware to learn their stream before it ends, so while
// one is read a later one is fetched, `ahead` values further on.
template <int T, class V> void dot(const V* values, const uint8_t* mask, int64_t ahead,
                                   int64_t columns, const float* x, int64_t width, float* sums) {
    Float8 acc[T][2] = {};  // two: one would wait for itself
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
            Float8 w;
            expand(w, values, row);
            values += __builtin_popcountll(row);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
                acc[t][step & 1] += w * *(const Float8*)(x + t * width + column + LANES * step);
        }
    }
    for (int t = 0; t < T; ++t) {
        const Float8 sum = acc[t][0] + acc[t][1];
        sums[t] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
    }
}

// ---- One call.

constexpr int64_t AHEAD = 4;  // rows

template <class V> struct Avx2 {
    const Call<V>& call;

    // Tokens of one expert from which panels are faster (AVX2 on Zen 4; evals/LOG.md of
    // 2026-11-26): 5 at 90% sparsity, 11 at 50%.
    static int64_t panels_from(double density) { return min(FEW, int64_t(4 + 15 * density)); }

    void run() const {
        const Panels<V> panels(call, panels_from(call.density));
        thread_local Buffer buffer;
        thread_local std::vector<int64_t> begins;
        const int64_t size = call.place(
            begins, [&](int64_t e) { return panels.take(e) ? 0 : panels.width * call.count(e); });
        float* const packed = (float*)buffer.get(size * sizeof(float));
        const int64_t* const begin =
            begins.data();  // of this thread: another would see its own `begins`
        const int64_t tokens = call.begins[call.experts];
#pragma omp parallel for schedule(dynamic) num_threads(call.threads) if (tokens > TOKENS)
        for (int64_t e = 0; e < call.experts; ++e)
            if (!panels.take(e)) pack_rows(e, panels.width, packed + begin[e]);
        call.share(PANEL_ROWS, [&](int64_t expert, int64_t first, int64_t last) {
            if (panels.take(expert)) panels.multiply(expert, first, last);
            else few(expert, packed + begin[expert], panels.width, first, last);
        });
    }

    void pack_rows(int64_t expert, int64_t width, float* packed) const {
        for (int64_t t = call.begins[expert]; t < call.begins[expert + 1]; ++t, packed += width) {
            const V* x = call.x + call.order[t] * call.in;
            for (int64_t c = 0; c < call.in; ++c) packed[c] = to_float(x[c]);
            for (int64_t c = call.in; c < width; ++c) packed[c] = 0;
        }
    }

    void few(int64_t expert, const float* x, int64_t width, int64_t first, int64_t last) const {
        constexpr decltype(&dot<1, V>) DOT[] = {nullptr,   dot<1, V>, dot<2, V>,
                                                dot<3, V>, dot<4, V>, dot<5, V>,
                                                dot<6, V>, dot<7, V>, dot<8, V>};
        const int32_t *map = call.row_map + expert * call.out,
                      *tokens = call.order + call.begins[expert];
        const int64_t count = call.count(expert);
        for (int64_t row = first; row < last; ++row) {
            const V* values = call.values + call.starts[map[row]];
            const V* later = call.values + call.starts[map[min(row + AHEAD, call.out - 1)]];
            float sums[FEW];
            for (int64_t t = 0; t < count; t += TOKENS)
                DOT[min(TOKENS, count - t)](values, call.mask + map[row] * call.mask_bytes(),
                                            later - values, call.in, x + t * width, width,
                                            sums + t);
            for (int64_t t = 0; t < count; ++t) store(call.y + tokens[t] * call.out + row, sums[t]);
        }
    }
};

}  // namespace
