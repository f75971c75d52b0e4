// The router on CPUs: logits [tokens, rows] = x [tokens, in] times its weight [rows, in], in
// float32, and the cluster that they choose (format/router.py says how).
//
// A few microseconds next to the linear that follows, so plain: two tokens and four rows at a time
// share their loads. Of two levels a token's children are another's seldom, so there each token
// goes alone. A logit is summed in one order whatever the batch, so which tokens come along never
// decides where a token goes.

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
            // one token waits for memory: the rows that come next
            if (T == 1 && column * sizeof(W) % 64 == 0)
                __builtin_prefetch(weight + (n + N) * in + column);
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

// y[t * stride + n] = T tokens times some rows of the weight.
template <int T, class W> void logits_of(const X* x, const W* weight, int64_t in, int64_t rows,
                                         float* y, int64_t stride) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4)
        logits_block<T, 4>(x, weight + row * in, in, y + row, stride);
    for (; row < rows; ++row) logits_block<T, 1>(x, weight + row * in, in, y + row, stride);
}

constexpr int64_t ROWS_AT_ONCE = 8;  // of an item of work
// Multiplications below which waking the other threads takes longer than the work.
constexpr int64_t SHARED = 1 << 17;

template <class W> void logits(const X* x, const W* weight, int64_t tokens, int64_t in,
                               int64_t rows, float* y, int threads) {
    const int64_t chunks = divide_up(rows, ROWS_AT_ONCE), items = divide_up(tokens, 2) * chunks;
#pragma omp parallel for num_threads(tokens * rows * in < SHARED ? 1 : threads)
    for (int64_t item = 0; item < items; ++item) {
        const int64_t token = item / chunks * 2, row = item % chunks * ROWS_AT_ONCE;
        const int64_t count = min(ROWS_AT_ONCE, rows - row);
        float* const to = y + token * rows + row;
        const auto some = token + 1 < tokens ? logits_of<2, W> : logits_of<1, W>;
        some(x + token * in, weight + row * in, in, count, to, rows);
    }
}

// The first of the largest of logits + bias. A NaN counts as the largest, as in torch.
inline int64_t largest(const float* logits, const float* bias, int64_t count) {
    int64_t best = 0;
    float most = logits[0] + bias[0];
    for (int64_t i = 1; i < count; ++i) {
        const float logit = logits[i] + bias[i];
        if (logit > most || (logit != logit && most == most)) best = i, most = logit;
    }
    return best;
}

// Cluster of each token. The weight has `parents` rows of the first level, then the clusters'.
template <class W> void route(const X* x, const W* weight, const float* bias, int64_t tokens,
                              int64_t in, int64_t parents, int64_t clusters, int64_t* chosen,
                              int threads) {
    thread_local Buffer buffer;
    const int64_t rows = parents ? parents : clusters;
    const int64_t most = parents ? divide_up(clusters, parents) : 0;
    float* const first = buffer.get<float>(tokens * (rows + most));
    float* const second = first + tokens * rows;
    logits(x, weight, tokens, in, rows, first, threads);
    for (int64_t t = 0; t < tokens; ++t) chosen[t] = largest(first + t * rows, bias, rows);
    if (!parents) return;
    // those of token t, which has chosen a parent
    const auto begin = [&](int64_t t) { return chosen[t] * clusters / parents; };
    const auto end = [&](int64_t t) { return (chosen[t] + 1) * clusters / parents; };
    const int64_t chunks = divide_up(most, ROWS_AT_ONCE), items = tokens * chunks;
#pragma omp parallel for num_threads(tokens * most * in < SHARED ? 1 : threads)
    for (int64_t item = 0; item < items; ++item) {
        const int64_t t = item / chunks, child = item % chunks * ROWS_AT_ONCE;
        const int64_t row = begin(t) + child, count = min(ROWS_AT_ONCE, end(t) - row);
        logits_of<1>(x + t * in, weight + (parents + row) * in, in, count,
                     second + t * most + child, most);
    }
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t from = begin(t), count = end(t) - from;
        chosen[t] = from + largest(second + t * most, bias + parents + from, count);
    }
}

}  // namespace
