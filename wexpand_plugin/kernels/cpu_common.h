// What all parts of the CPU kernel share: number types and their conversions, and buffers.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

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
struct Int8 {  // q, see format/values.py
    int8_t q;
};
struct Int4 {  // two q
    uint8_t pair;
};
struct Int3 {  // full rows only: a byte of a stream of bits
    uint8_t part;
};
struct Int2 {  // the same
    uint8_t four;
};

// Of values, as cpu.py numbers them.
enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, INT3, INT2 };

// Of x and y: the library is compiled for one.
#if !defined(WEXPAND_X)
#define WEXPAND_X Bf16
#endif
using X = WEXPAND_X;

template <class V> constexpr int64_t BITS = 8 * sizeof(V);
template <> constexpr int64_t BITS<Int4> = 4;
template <> constexpr int64_t BITS<Int3> = 3;
template <> constexpr int64_t BITS<Int2> = 2;
template <class V> constexpr bool IS_INTEGER = BITS<V> <= 8;
template <class V> constexpr bool IS_ODD = BITS<V> < 4;  // 2 q + 1 is the weight

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

template <class To, class From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class Bits> Bits load_bits(const void* from) {
    Bits bits;
    std::memcpy(&bits, from, sizeof bits);
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
    // nearest, ties to even
    y->bits = v != v ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void store(Fp16* y, float v) {
    const uint32_t u = bit_cast<uint32_t>(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) half = 0x7e00;
    else if (magnitude >= 0x477ff000) half = 0x7c00;  // 65520 and above round to infinity
    else if (magnitude < 0x38800000)  // subnormal: adding 0.5 lines the half's last bit up
        half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    else half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    y->bits = uint16_t(sign | half);
}

// Eight values as floats.
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
    template <class T> T* get(int64_t count) {
        const size_t bytes = count * sizeof(T);
        if (bytes > size) {
            std::free(data);
            size = round_up(bytes, 64);
            data = std::aligned_alloc(64, size);
        }
        return (T*)data;
    }
};

}  // namespace
