// The router on CPUs: logits [tokens, experts] = x [tokens, in] times the router's map [experts, in], in float32.
//
// A few microseconds next to the linear that follows, so plain: four experts at a time share the loads of a token's x. A logit is
// summed in one order whatever the batch, so which tokens come along never decides where a token goes.

#pragma once

#include <type_traits>

#include "cpu_common.h"

namespace {

typedef float Eight __attribute__((vector_size(32), may_alias, aligned(4)));

template <class V> inline Eight eight(const V* p) {
#if defined(__AVX2__) && defined(__F16C__)
    if constexpr (sizeof(V) == 4) return *(const Eight*)p;
    const __m128i bits = _mm_loadu_si128((const __m128i*)p);
    if constexpr (std::is_same_v<V, Fp16>) return (Eight)_mm256_cvtph_ps(bits);
    return (Eight)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
    Eight v;
    for (int i = 0; i < 8; ++i) v[i] = to_float(p[i]);
    return v;
#endif
}

template <int N, class X, class W> void some_logits(const X* x, const W* weight, int64_t in, float* y) {
    Eight acc[N] = {};
    int64_t column = 0;
    for (; column + 8 <= in; column += 8) {
        const Eight v = eight(x + column);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[n] += eight(weight + n * in + column) * v;
    }
    for (int n = 0; n < N; ++n) {
        float rest = 0;
        for (int64_t c = column; c < in; ++c) rest += to_float(weight[n * in + c]) * to_float(x[c]);
        const Eight& a = acc[n];
        y[n] = ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7])) + rest;
    }
}

template <class X, class W>
void logits(const void* x, const void* weight, int64_t tokens, int64_t in, int64_t experts, float* y, int threads) {
    constexpr int64_t SHARED = 1 << 19;  // multiplications below which waking the other threads takes longer than the work
    const int64_t quads = (experts + 3) / 4;
#pragma omp parallel for num_threads(tokens * experts * in < SHARED ? 1 : threads)
    for (int64_t item = 0; item < tokens * quads; ++item) {
        const int64_t token = item / quads, expert = item % quads * 4;
        const X* from = (const X*)x + token * in;
        const W* map = (const W*)weight + expert * in;
        float* to = y + token * experts + expert;
        if (experts - expert >= 4) some_logits<4>(from, map, in, to);
        else for (int64_t e = 0; e < experts - expert; ++e) some_logits<1>(from, map + e * in, in, to + e);
    }
}

}  // namespace
