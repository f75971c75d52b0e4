// What both CPU kernels (cpu_avx512.h, cpu_avx2.h) share: number types, a buffer that is kept, the
// arguments of a call.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class To, class From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class Bits> Bits load_bits(const uint8_t* mask) {
    Bits bits;
    std::memcpy(&bits, mask, sizeof bits);
    return bits;
}

inline float to_float(float v) { return v; }
inline float to_float(Bf16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
inline float to_float(Fp16 v) {
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Moving the exponent by a multiplication gets subnormal halves right too: 2^112 = 2^(127-15).
    return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

inline void store(float* y, float v) { *y = v; }
inline void store(Bf16* y, float v) {
    const uint32_t u = bit_cast<uint32_t>(v);
    y->bits =
        v != v ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);  // nearest, ties to even
}
inline void store(Fp16* y, float v) {
    const uint32_t u = bit_cast<uint32_t>(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) half = 0x7e00;
    else if (magnitude >= 0x477ff000) half = 0x7c00;  // 65520 and above round to infinity
    else if (magnitude <
             0x38800000)  // subnormal: adding 0.5 lines the half's last bit up with the float's
        half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    else half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    y->bits = uint16_t(sign | half);
}

// Float8 values as floats.
typedef float Float8 __attribute__((vector_size(32), may_alias, aligned(4)));

template <class V> inline Float8 load8(const V* p) {
#if defined(__AVX2__) && defined(__F16C__)
    if constexpr (sizeof(V) == 4) return *(const Float8*)p;
    const __m128i bits = _mm_loadu_si128((const __m128i*)p);
    if constexpr (std::is_same_v<V, Fp16>) return (Float8)_mm256_cvtph_ps(bits);
    return (Float8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
    Float8 v;
    for (int i = 0; i < 8; ++i) v[i] = to_float(p[i]);
    return v;
#endif
}

struct Buffer {  // grows to the largest call seen and is kept: no allocation once warm
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
    void* get(size_t bytes) {
        if (bytes > size) {
            std::free(data);
            size = (bytes + 63) / 64 * 64;
            data = std::aligned_alloc(64, size);
        }
        return data;
    }
};

// The arguments of one call. See cpu.py for the row pool's layout: values end in 64 bytes of
// padding, the mask in 8.
template <class V> struct Call {
    const V* x;
    int64_t in, out;
    const V* values;
    const uint8_t* mask;
    const uint32_t* starts;
    const int32_t* row_map;
    V* y;
    const int32_t* order;   // the tokens, expert by expert
    const int64_t* begins;  // [experts + 1] where each expert's tokens begin in `order`
    int64_t experts;
    double density;  // kept weights over all
    int threads;

    int64_t mask_bytes() const { return (in + 7) / 8; }
    int64_t count(int64_t expert) const { return begins[expert + 1] - begins[expert]; }

    // Where each expert's part begins in a buffer that gives it size(expert); returns the size of
    // all.
    template <class Size> int64_t place(std::vector<int64_t>& places, Size size) const {
        int64_t all = 0;
        places.resize(experts);
        for (int64_t e = 0; e < experts; all += size(e++)) places[e] = all;
        return all;
    }

    // work(expert, first, last): every expert that has tokens, a range of at most `most` output
    // rows at a time, on all threads. While x fits the caches experts take alternate over a range,
    // as they share row versions: what one reads from memory the next finds nearby. Of more tokens
    // an expert's x should stay near instead.
    template <class Work> void share(int64_t most, Work work) const {
        int64_t rows = out / (4 * threads) / 4 * 4;  // some items for each thread
        rows = rows < 4 ? 4 : rows > most ? most : rows;
        const int64_t chunks = (out + rows - 1) / rows;
        const bool alternate = begins[experts] * in <= 1 << 20;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t item = 0; item < experts * chunks; ++item) {
            const int64_t expert = alternate ? item % experts : item / chunks;
            const int64_t first = (alternate ? item / experts : item % chunks) * rows;
            if (count(expert)) work(expert, first, min(first + rows, out));
        }
    }
};

}  // namespace
