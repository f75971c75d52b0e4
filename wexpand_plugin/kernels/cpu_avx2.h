// Decoders for CPUs without AVX-512: AVX2, and any other through the compiler's vectors of 8
// floats. 64 columns a step, 8 a vector; all arithmetic is in float32.
//
// A table turns each byte of the mask into a shuffle that spreads the next values to 8 columns.

#pragma once

#include "cpu_decoders.h"

#if !defined(WEXPAND_AVX512)

namespace {

// ---- 8 columns: values from p[0] on spread to the set bits of a mask byte, zero elsewhere. The
// byte comes as `row`, moved SHIFT bits to the left: where its row of a table begins.

#if defined(WEXPAND_AVX2)

// Bytes of a table's row. float32: 8 x 1, for vpermps; negative where the column is pruned.
template <class V> constexpr int WIDTH = 32;  // 8 x 4, for pshufb on two copies of 8 values: to the
                                              // upper bytes of 32 bits
template <> constexpr int WIDTH<float> = 8;
template <> constexpr int WIDTH<Fp16> = 16;  // 8 x 2, for pshufb; negative clears
// Addresses scale by 8 at no cost.
template <class V> constexpr int SHIFT = WIDTH<V> == 32 ? 5 : WIDTH<V> == 16 ? 4 : 0;

template <class V> struct Shuffles {
    int8_t table[256 * WIDTH<V>] = {};
    constexpr Shuffles() {
        // bytes of a place, and of it those that hold a value
        constexpr int size = WIDTH<V> / 8, used = size == 1 ? 1 : sizeof(V);
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

inline Vec expand(const float* p, uint64_t row) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)SHUFFLES<float>[row]);
    const __m256i place = _mm256_cvtepi8_epi32(bytes);
    __m256 values = _mm256_loadu_ps(p);
    asm("" : "+x"(values));  // vpermps takes twice as long with its values in memory (Zen 3)
    const __m256 spread = _mm256_permutevar8x32_ps(values, place);
    return (Vec)_mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(place));
}
inline Vec expand(const Fp16* p, uint64_t row) {
    const __m128i place = _mm_load_si128((const __m128i*)SHUFFLES<Fp16>[row]);
    return (Vec)_mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), place));
}
// To the upper bytes of 32 bits.
inline __m256i expand_high(__m128i values, const int8_t* row) {
    const __m256i twice = _mm256_broadcastsi128_si256(values);
    return _mm256_shuffle_epi8(twice, _mm256_load_si256((const __m256i*)row));
}
inline Vec expand(const Bf16* p, uint64_t row) {
    return (Vec)expand_high(_mm_loadu_si128((const __m128i*)p), SHUFFLES<Bf16>[row]);
}
inline Vec convert(__m256i v) { return (Vec)_mm256_cvtepi32_ps(v); }
inline Vec expand(const Int8* p, uint64_t row) {
    return convert(expand_high(_mm_loadl_epi64((const __m128i*)p), SHUFFLES<Int8>[row]));
}
template <int HALF> Vec expand_half(const uint8_t* p, uint64_t row) {
    const __m256i bytes = expand_high(_mm_loadl_epi64((const __m128i*)p), SHUFFLES<Int8>[row]);
    if (HALF) return convert(_mm256_and_si256(bytes, _mm256_set1_epi32(0xf0000000)));
    return convert(_mm256_slli_epi32(bytes, 4));
}
inline Vec load_full(const Int8* p) {
    return convert(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
constexpr float FACTOR8 = 0x1p-24, FACTOR4 = 0x1p-28;  // q is read from the top of 32 bits

#else

template <class V> constexpr int SHIFT = 0;

inline float number(const Int8* p) { return p->q; }
template <class V> float number(const V* p) { return to_float(*p); }

// Inlined it takes seconds to compile.
template <class V> [[gnu::noinline]] Vec expand(const V* p, uint64_t bits) {
    Vec w;
    for (int lane = 0; lane < 8; ++lane) {
        const bool kept = bits >> lane & 1;
        w[lane] = kept ? number(p) : 0.0f;
        p += kept;
    }
    return w;
}
template <int HALF> [[gnu::noinline]] Vec expand_half(const uint8_t* p, uint64_t bits) {
    Vec w;
    for (int lane = 0; lane < 8; ++lane) {
        const bool kept = bits >> lane & 1;
        w[lane] = kept ? float(int8_t(HALF ? *p & 0xf0 : *p << 4)) : 0.0f;
        p += kept;
    }
    return w;
}
inline Vec load_full(const Int8* p) {
    Vec w;
    for (int lane = 0; lane < 8; ++lane) w[lane] = p[lane].q;
    return w;
}
constexpr float FACTOR8 = 1, FACTOR4 = 0x1p-4;

#endif

template <class V> inline Vec load_full(const V* p) { return (Vec)load8(p); }

// ---- The decoders.

struct InOrder : Natural {
    static constexpr int STEP = 64, VECTORS = 8;
};

template <class V> struct Decoder<V, false, Floats> : InOrder, Unscaled {
    static constexpr float FACTOR = std::is_same_v<V, Int8> ? 1 : 0;
    const V* values;

    explicit Decoder(const uint8_t* values = nullptr) : values((const V*)values) {}
    template <int HALF> void start(uint64_t) {}
    Vec vector(int) { return load_full(std::exchange(values, values + 8)); }
};

struct MaskBytes : InOrder {
    uint64_t word = 0;

    // The k-th byte, moved SHIFT bits to the left.
    template <int LEFT> uint64_t row(int k) const {
        const int right = 8 * k - LEFT;
        return (right < 0 ? word << -right : word >> right) & uint64_t(255) << LEFT;
    }
};

template <class V> struct Decoder<V, true, Floats> : MaskBytes, Unscaled {
    static constexpr float FACTOR = std::is_same_v<V, Int8> ? FACTOR8 : 0;
    const V* values;

    explicit Decoder(const uint8_t* values = nullptr) : values((const V*)values) {}
    template <int HALF> void start(uint64_t bits) { word = bits; }
    Vec vector(int k) {
        const uint64_t byte = row<SHIFT<V>>(k);
        const Vec w = expand(values, byte);
        values += __builtin_popcountll(byte);
        return w;
    }
};

template <> struct Decoder<Int4, true, Floats> : MaskBytes {
    static constexpr int HALVES = 2;
    static constexpr float FACTOR = FACTOR4;
    const uint8_t* values;
    int half = 0;

    explicit Decoder(const uint8_t* values = nullptr) : values(values) {}
    template <int HALF> void start(uint64_t bits) { word = bits, half = HALF; }
    Vec vector(int k) {
        const uint64_t byte = row<SHIFT<Int8>>(k);
        const Vec w = half ? expand_half<1>(values, byte) : expand_half<0>(values, byte);
        values += __builtin_popcountll(byte);
        return w;
    }
};

// Full rows of few bits: a lane gets the stream's bits of eight columns, see cpu_pool.h, and each
// vector moves those of one column to its top.
typedef int32_t Lanes __attribute__((vector_size(32)));

template <class V> inline Lanes lanes_of(const uint8_t* stream) {
    if constexpr (BITS<V> == 4) return load_bits<Lanes>(stream);
#if defined(WEXPAND_AVX2)
    const auto bytes = [&](int first) { return _mm_loadu_si128((const __m128i*)(stream + first)); };
    if constexpr (BITS<V> == 2) return (Lanes)_mm256_cvtepu16_epi32(bytes(0));
    const __m256i threes = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes(0)), bytes(12), 1);
    return (Lanes)_mm256_shuffle_epi8(both, threes);
#else
    Lanes lanes;
    for (int i = 0; i < 8; ++i) lanes[i] = load_bits<int32_t>(stream + BITS<V> * i);
    return lanes;
#endif
}

template <class V> struct Full : Interleaved<8> {
    static constexpr int STEP = 64, VECTORS = 8, HALVES = 1, B = BITS<V>;
    static constexpr float FACTOR = B == 2 ? 0x1p-29f : 0x1p-28f;
    const uint8_t* values;
    Lanes lanes;

    explicit Full(const uint8_t* values = nullptr) : values(values) {}
    template <int HALF> void start(uint64_t) {
        lanes = lanes_of<V>(values);
        values += STEP * B / 8;
    }
    Vec vector(int k) const {
        Lanes top = lanes << (32 - B - B * k) & int32_t(~0u << (32 - B));
        if constexpr (IS_ODD<V>) top |= 1 << (31 - B);  // 2 q + 1
        return __builtin_convertvector(top, Vec);
    }
};
template <> struct Decoder<Int4, false, Floats> : Full<Int4> {
    using Full::Full;
};
template <> struct Decoder<Int3, false, Floats> : Full<Int3> {
    using Full::Full;
};
template <> struct Decoder<Int2, false, Floats> : Full<Int2> {
    using Full::Full;
};

}  // namespace

#endif
