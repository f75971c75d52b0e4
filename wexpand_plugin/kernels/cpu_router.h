// The router on CPUs: logits [tokens, experts] = x [tokens, in] times the router's map [experts,
// in], in float32.
//
// A few microseconds next to the linear that follows, so plain: two tokens and four experts at a
// time share their loads. A logit is summed in one order whatever the batch, so which tokens come
// along never decides where a token goes.

#pragma once

#include "cpu_common.h"

namespace {

inline void multiply_add(Float8& sum, Float8 a, Float8 b) {
#if defined(__FMA__)
    sum = (Float8)_mm256_fmadd_ps((__m256)a, (__m256)b,
                                  (__m256)sum);  // left to itself, gcc fuses in some instances only
#elif defined(__aarch64__)
    for (int i = 0; i < 8; ++i) sum[i] = __builtin_fmaf(a[i], b[i], sum[i]);
#else
    sum += a * b;
#endif
}

// The last columns of a row, and zeros.
template <class V> struct Rest {
    int64_t columns;
    Float8 operator()(const V* p) const {
        V columns_left[8] = {};
        std::memcpy(columns_left, p, columns * sizeof(V));
        return load8(columns_left);
    }
};

// y[t * stride + n] = token t's x times expert n's row of the map; both are `in` long.
template <int T, int N, class W>
void logits_block(const X* x, const W* weight, int64_t in, float* y, int64_t stride) {
    Float8 acc[T][N] = {};
    const auto step = [&](int64_t column, auto of_x, auto of_weight) {
        Float8 v[T];
        for (int t = 0; t < T; ++t) v[t] = of_x(x + t * in + column);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const Float8 w = of_weight(weight + n * in + column);
            for (int t = 0; t < T; ++t) multiply_add(acc[t][n], w, v[t]);
        }
    };
    int64_t column = 0;
    for (; column + 8 <= in; column += 8) step(column, load8<X>, load8<W>);
    if (column < in) step(column, Rest<X>{in - column}, Rest<W>{in - column});
    for (int t = 0; t < T; ++t)
        for (int n = 0; n < N; ++n) {
            const Float8& a = acc[t][n];
            y[t * stride + n] = ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
        }
}

// Multiplications below which waking the other threads takes longer than the work.
constexpr int64_t SHARED = 1 << 19;

template <class W> void logits(const X* x, const W* weight, int64_t tokens, int64_t in,
                               int64_t experts, float* y, int threads) {
#pragma omp parallel for num_threads(tokens * experts * in < SHARED ? 1 : threads)
    for (int64_t token = 0; token < tokens; token += 2) {
        const X* const from = x + token * in;
        const bool two = token + 1 < tokens;
        for (int64_t expert = 0; expert < experts;) {
            const bool four = experts - expert >= 4;
            const auto block = two ? (four ? logits_block<2, 4, W> : logits_block<2, 1, W>)
                                   : (four ? logits_block<1, 4, W> : logits_block<1, 1, W>);
            block(from, weight + expert * in, in, y + token * experts + expert, experts);
            expert += four ? 4 : 1;
        }
    }
}

}  // namespace
