// Decoders for CPUs with AVX-512 VBMI2, whose `vpexpand` spreads packed values to the places of a
// mask's set bits: 64 columns of a row at a time, or 128 of a full row in few bits.
//
// See cpu_decoders.h for what a decoder gives. Integers are spread as bytes. A lane then holds four
// neighbouring columns (of full rows in few bits eight), one of which each vector takes out of it.

#pragma once

#include "cpu_decoders.h"

#if defined(WEXPAND_AVX512)

namespace {

// In place: on Zen 5 the masked forms wait for whatever their target was computed from before, and
// the forms that read memory are slower (evals/LOG.md of 2026-11-27).
inline __m512i expand(__m512i v, uint64_t bits) {
    asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(__mmask64(bits)));
    return v;
}
inline __m512i expand(__m512i v, uint32_t bits) {
    asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(__mmask32(bits)));
    return v;
}
inline __m256i expand(__m256i v, uint16_t bits) {
    asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(__mmask16(bits)));
    return v;
}
inline __m512 expand(__m512 v, uint16_t bits) {
    asm("vexpandps %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(__mmask16(bits)));
    return v;
}

inline __m512 widen(__m256i v, Bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline __m512 widen(__m256i v, Fp16) { return _mm512_cvtph_ps(v); }

// Floats, 16 columns a vector.
template <class V, bool MASKED> struct Decoder<V, MASKED, Floats> : Unscaled, Natural {
    static constexpr int STEP = 64, VECTORS = 4;
    const V* values;
    uint64_t bits = 0;

    explicit Decoder(const uint8_t* values = nullptr) : values((const V*)values) {}
    template <int HALF> void start(uint64_t word) { bits = word; }
    Vec vector(int k) {
        const auto kept = uint16_t(bits >> 16 * k);
        Vec w;
        if constexpr (std::is_same_v<V, float>) {
            const __m512 packed = _mm512_loadu_ps(values);
            w = (Vec)(MASKED ? expand(packed, kept) : packed);
        } else {
            const __m256i packed = _mm256_loadu_si256((const __m256i*)values);
            w = (Vec)widen(MASKED ? expand(packed, kept) : packed, V());
        }
        values += MASKED ? __builtin_popcount(kept) : 16;
        return w;
    }
};

// Bytes of 64 columns: each vector takes one byte out of four.
template <class V, bool MASKED> struct Bytes {
    static constexpr int STEP = 64;
    const uint8_t* values;
    __m512i bytes;

    explicit Bytes(const uint8_t* values = nullptr) : values(values) {}
    template <int HALF> void start(uint64_t word) {
        bytes = _mm512_loadu_si512(values);
        if (HALF) bytes = _mm512_srli_epi16(bytes, 4);  // brings what is not looked at
        if (MASKED) bytes = expand(bytes, word);
        values += MASKED ? __builtin_popcountll(word) : STEP;
    }
};

// Shuffles that move the k-th byte of 32 bits to their top and clear the others.
struct ToTop {
    int8_t of[4][64] = {};
    constexpr ToTop() {
        for (int k = 0; k < 4; ++k)
            for (int i = 0; i < 64; ++i) of[k][i] = int8_t(i % 4 == 3 ? i % 16 - 3 + k : -128);
    }
};
alignas(64) constexpr ToTop TO_TOP;

// The k-th byte of every 32 bits, times 2^24.
inline __m512 from_byte(__m512i bytes, int k) {
    __m512i top;
    if (k == 0) top = _mm512_slli_epi32(bytes, 24);
    else if (k == 3) top = _mm512_and_si512(bytes, _mm512_set1_epi32(0xff000000));
    else top = _mm512_shuffle_epi8(bytes, _mm512_load_si512(TO_TOP.of[k]));
    return _mm512_cvtepi32_ps(top);
}

template <bool MASKED> struct Decoder<Int8, MASKED, Floats> : Bytes<Int8, MASKED>, Interleaved<4> {
    static constexpr int VECTORS = 4, HALVES = 1;
    static constexpr float FACTOR = 0x1p-24;
    using Bytes<Int8, MASKED>::Bytes;

    Vec vector(int k) const { return (Vec)from_byte(this->bytes, k); }
};

// Few bits are looked up in a table, whose index is the low bits of a lane: the rest may be
// anything.
template <class V> struct Levels {
    float floats[16];
    uint16_t words[32];  // bfloat16
    constexpr Levels() : floats(), words() {
        constexpr uint16_t MAGNITUDES[9] = {0,      0x3f80, 0x4000, 0x4040, 0x4080,
                                            0x40a0, 0x40c0, 0x40e0, 0x4100};
        constexpr int NUMBERS = 1 << BITS<V>;
        for (int i = 0; i < 32; ++i) {
            const int stored = i % NUMBERS < NUMBERS / 2 ? i % NUMBERS : i % NUMBERS - NUMBERS;
            const int q = IS_ODD<V> ? 2 * stored + 1 : stored;
            floats[i % 16] = float(q);
            words[i] = q < 0 ? MAGNITUDES[-q] | 0x8000 : MAGNITUDES[q];
        }
    }
    __m512 in_lanes(__m512i index) const {
        return _mm512_permutexvar_ps(index, _mm512_load_ps(floats));
    }
    __m512i in_words(__m512i index) const {
        return _mm512_permutexvar_epi16(index, _mm512_load_si512(words));
    }
};
template <class V> alignas(64) constexpr Levels<V> LEVELS;

// Full rows of few bits, 128 columns a step: the stream's bits of 8 columns in each lane of 32
// bits, of 4 in each of 16.
struct Spread {  // bytes that a lane takes of a stream of 3 bits
    int8_t lanes[64] = {}, words[64] = {};
    uint16_t shifts[32] = {};
    constexpr Spread() {
        for (int i = 0; i < 64; ++i) {
            lanes[i] = int8_t(i / 4 * 3 + (i % 4) % 3);
            words[i] = int8_t(i / 2 * 12 / 8 + i % 2);
            shifts[i / 2] = uint16_t(i / 2 * 12 % 8);
        }
    }
};
alignas(64) constexpr Spread SPREAD;

template <class V> inline __m512i lanes_of(const uint8_t* stream) {
    if constexpr (BITS<V> == 4) return _mm512_loadu_si512(stream);
    if constexpr (BITS<V> == 2)
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)stream));
    return _mm512_permutexvar_epi8(_mm512_load_si512(SPREAD.lanes), _mm512_loadu_si512(stream));
}
template <class V> inline __m512i words_of(const uint8_t* stream) {
    if constexpr (BITS<V> == 4) return _mm512_loadu_si512(stream);
    if constexpr (BITS<V> == 2)
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)stream));
    const __m512i words =
        _mm512_permutexvar_epi8(_mm512_load_si512(SPREAD.words), _mm512_loadu_si512(stream));
    return _mm512_srlv_epi16(words, _mm512_load_si512(SPREAD.shifts));
}

template <class V> struct FullFloats : Interleaved<8> {
    static constexpr int STEP = 128, VECTORS = 8, HALVES = 1;
    static constexpr float FACTOR = 1;
    const uint8_t* values;
    __m512i lanes;

    explicit FullFloats(const uint8_t* values = nullptr) : values(values) {}
    template <int HALF> void start(uint64_t) {
        lanes = lanes_of<V>(values);
        values += STEP * BITS<V> / 8;
    }
    Vec vector(int k) const {
        return (Vec)LEVELS<V>.in_lanes(_mm512_srli_epi32(lanes, int(BITS<V>) * k));
    }
};
template <> struct Decoder<Int4, false, Floats> : FullFloats<Int4> {
    using FullFloats::FullFloats;
};
template <> struct Decoder<Int3, false, Floats> : FullFloats<Int3> {
    using FullFloats::FullFloats;
};
template <> struct Decoder<Int2, false, Floats> : FullFloats<Int2> {
    using FullFloats::FullFloats;
};

template <> struct Decoder<Int4, true, Floats> : Bytes<Int4, true>, Interleaved<4> {
    static constexpr int VECTORS = 4, HALVES = 2;
    static constexpr float FACTOR = 1;
    using Bytes::Bytes;

    Vec vector(int k) const {
        return (Vec)LEVELS<Int4>.in_lanes(_mm512_srli_epi32(bytes, 8 * k));
    }
};

#if defined(WEXPAND_AVX512) && defined(__AVX512BF16__)

template <bool MASKED> struct Decoder<Bf16, MASKED, Pairs> : Unscaled, Natural {
    static constexpr int STEP = 64, VECTORS = 2;
    const Bf16* values;
    uint64_t bits = 0;

    explicit Decoder(const uint8_t* values = nullptr) : values((const Bf16*)values) {}
    template <int HALF> void start(uint64_t word) { bits = word; }
    __m512i vector(int k) {
        const auto kept = uint32_t(bits >> 32 * k);
        const __m512i packed = _mm512_loadu_si512(values);
        values += MASKED ? __builtin_popcount(kept) : 32;
        return MASKED ? expand(packed, kept) : packed;
    }
};

template <> struct Decoder<Int4, true, Pairs> : Bytes<Int4, true>, Interleaved<2> {
    static constexpr int VECTORS = 2, HALVES = 2;
    static constexpr float FACTOR = 1;
    using Bytes::Bytes;

    __m512i vector(int k) const {
        return LEVELS<Int4>.in_words(_mm512_srli_epi16(bytes, 8 * k));
    }
};

template <class V> struct FullPairs : Interleaved<4> {
    static constexpr int STEP = 128, VECTORS = 4, HALVES = 1;
    static constexpr float FACTOR = 1;
    const uint8_t* values;
    __m512i words;

    explicit FullPairs(const uint8_t* values = nullptr) : values(values) {}
    template <int HALF> void start(uint64_t) {
        words = words_of<V>(values);
        values += STEP * BITS<V> / 8;
    }
    __m512i vector(int k) const {
        return LEVELS<V>.in_words(_mm512_srli_epi16(words, int(BITS<V>) * k));
    }
};
template <> struct Decoder<Int4, false, Pairs> : FullPairs<Int4> {
    using FullPairs::FullPairs;
};
template <> struct Decoder<Int3, false, Pairs> : FullPairs<Int3> {
    using FullPairs::FullPairs;
};
template <> struct Decoder<Int2, false, Pairs> : FullPairs<Int2> {
    using FullPairs::FullPairs;
};

// Whole numbers up to 128 are bfloat16 already, in the upper half of a float.
template <bool MASKED> struct Decoder<Int8, MASKED, Pairs> : Bytes<Int8, MASKED>,
                                                             Interleaved<2, 2> {
    static constexpr int VECTORS = 2, HALVES = 1;
    static constexpr float FACTOR = 0x1p-24;
    using Bytes<Int8, MASKED>::Bytes;

    __m512i vector(int k) const {
        const __m512i even = (__m512i)from_byte(this->bytes, 2 * k);
        const __m512i odd = (__m512i)from_byte(this->bytes, 2 * k + 1);
        // odd's bits where the mask is set, even's moved elsewhere
        return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff0000), odd,
                                         _mm512_srli_epi32(even, 16), 0xca);
    }
};

// q = (128 + its low seven bits) - (128 or, if it is negative, 256): both are bfloat16 whose bits
// lie as q's do, one in the lowest bits of the fraction, one in the lowest of the exponent. What is
// summed is a few times larger than q, and loses that much of float32's 24 bits; an infinite x
// becomes NaN, as it does where weights are zero.
template <bool MASKED> struct Decoder<Int8, MASKED, Sums> : Bytes<Int8, MASKED>, Interleaved<2> {
    static constexpr int VECTORS = 2, HALVES = 1;
    static constexpr float FACTOR = 1;
    using Bytes<Int8, MASKED>::Bytes;

    Sums::Weights vector(int k) const {
        const __m512i q = k ? _mm512_srli_epi16(this->bytes, 8) : this->bytes;
        const auto part = [&](int bits, int one) {
            return _mm512_ternarylogic_epi32(q, _mm512_set1_epi16(int16_t(bits)),
                                             _mm512_set1_epi16(int16_t(one)), 0x6a);  // and, xor
        };
        return {part(0x7f, 0x4300), part(0x80, 0xc300)};  // 128, -128
    }
};

#endif

}  // namespace

#endif
