// Vectors and how weights meet inputs in them. A kind of products, Floats or Pairs, gives
//
//   Vec            a vector of LANES sums, float32
//   Packed, Op     what inputs are packed as, and a vector of COLUMNS of them
//   Weights        so many weights: an Op, or more
//   load(x)        an Op; aligned
//   add(sum, w, x) each lane's products to its sum
//   broadcast(w)   one weight, or two of neighbouring columns, in every lane

#pragma once

#include "cpu_common.h"

namespace {

#if defined(__AVX512VBMI2__) && defined(__AVX512VBMI__) && defined(__AVX512VL__) && \
    defined(__AVX512BW__) && defined(__AVX512DQ__)
#define WEXPAND_AVX512
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define WEXPAND_AVX2
#endif
#endif

typedef float Vec __attribute__((vector_size(4 * LANES), may_alias));
typedef float UnalignedVec __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));

// to[r] = the sum over the lanes of the r-th vector.
#if defined(WEXPAND_AVX512)
inline void store_lane_sums(const Vec (&v)[2], float* to) {
    const auto half = [](__m512 all) {
        return _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    };
    const __m256 a = half((__m512)v[0]), b = half((__m512)v[1]);
    const __m256 both = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    _mm_storel_pi((__m64*)to, _mm_add_ps(four, _mm_movehl_ps(four, four)));
}
#else
inline void store_lane_sums(const Vec (&v)[1], float* to) {
    const Vec a = v[0];
    *to = ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
}
#endif

// Keeps the compiler from folding the load of v into each instruction that uses it.
template <class V> inline void keep_in_register(V& v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
}

struct Floats {
    using Packed = float;
    using Op = Vec;
    using Weights = Op;
    static constexpr int COLUMNS = LANES, PER_LANE = 1;

    static Op load(const Packed* x) { return *(const Op*)x; }
    static void add(Vec& sum, Op w, Op x) { sum += w * x; }
    static Op broadcast(const Packed* w) { return *w - Vec{}; }
    static Packed convert(X v) { return to_float(v); }
};

#if defined(WEXPAND_AVX512) && defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = std::is_same_v<X, Bf16>;

// One instruction adds the products of two neighbouring columns, exact in float32, to a lane.
struct Pairs {
    using Packed = Bf16;
    using Op = __m512i;
    using Weights = Op;
    static constexpr int COLUMNS = 32, PER_LANE = 2;

    static Op load(const Packed* x) { return _mm512_load_si512(x); }
    static void add(Vec& sum, Op w, Op x) {
        sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
    }
    static Op broadcast(const Packed* w) { return _mm512_set1_epi32(load_bits<int32_t>(w)); }
    template <class V> static Packed convert(V v) { return v; }
};

// Pairs of weights that are sums of two bfloat16: twice the products, where that is less work than
// to put the two together.
struct Sums : Pairs {
    struct Weights {
        Op of[2];
    };
    static void add(Vec& sum, Weights w, Op x) {
        Pairs::add(sum, w.of[0], x);
        Pairs::add(sum, w.of[1], x);
    }
};
#else
constexpr bool HAS_PAIRS = false;
using Pairs = Floats;
using Sums = Floats;
#endif

}  // namespace
