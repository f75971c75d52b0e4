// y = W[expert of the token] x over a row pool, on CPUs. Plain C++17 and OpenMP, no torch headers; called through ctypes.
//
// The row pool (see rowpool.py; padding and row starts are added by cpu.py): kept values, row after row; one bit per weight;
// where each row starts; which row each (expert, neuron) uses. Reading fewer bytes is the gain, so the work per weight must
// stay below the time memory takes to deliver it:
//
//   few tokens    Four rows at a time, expanded in registers: load the next values (unaligned, always a full vector), spread
//                 them to the places of the mask's set bits with one instruction, multiply with the tokens' x. All tokens of
//                 an expert share the expansion. The dense weight never exists, not even in cache.
//   many tokens   A tile of rows is expanded once into a buffer that fits the L2 cache, then multiplied with all of the
//                 expert's tokens in blocks whose x fits L1.
//
// Both run the same inner loop (`block`): 4 rows x T tokens of accumulators, lanes along the input columns, summed across
// lanes at the end. What a vector is and how one expands is said by a `Lanes` struct per instruction set and value type,
// chosen by the compiler's predefined macros.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

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
    y->bits = v != v ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);  // nearest, ties to even
}
inline void store(Fp16* y, float v) {
    const uint32_t u = bit_cast<uint32_t>(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) half = 0x7e00;
    else if (magnitude >= 0x477ff000) half = 0x7c00;  // 65520 and above round to infinity
    else if (magnitude < 0x38800000)  // subnormal: adding 0.5 lines the half's last bit up with the float's
        half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    else half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    y->bits = uint16_t(sign | half);
}

// ---- One vector of weights. Each Lanes<V> gives:
//   Acc, Op          accumulator and operand vectors        STEP    columns per operand
//   Bits             unsigned integer of STEP bits          TOKENS  tokens per block that fit the registers
//   expand(p, bits)  values p[0..popcount) spread to the set bits, zero elsewhere; may read a full vector from p
//   load(x), load(x, n)   all STEP columns of x, or the first n and zeros
//   in_register(v)   keeps the compiler from folding the load of v into each instruction that uses it: loads are what the
//                    inner loop runs out of, and the memory form of expand is the slower one (both seen on Zen 4)
//   fma(acc, w, x), sum4(acc of 4 rows, out)      out[0..3] += the sum of each accumulator's lanes

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

struct Wide {
    using Acc = __m512;
    static constexpr int TOKENS = 6;
    static Acc zero() { return _mm512_setzero_ps(); }
    template <class Vector> static Vector in_register(Vector v) {
        asm("" : "+v"(v));
        return v;
    }
    static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) {
        const Acc ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const Acc cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const Acc all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), quarter));
    }
};

struct WideFloat : Wide {
    using Op = __m512;
    using Bits = uint16_t;
    static constexpr int STEP = 16;
    static void fma(Acc& acc, Op w, Op x) { acc = _mm512_fmadd_ps(w, x, acc); }
};

template <class V> struct Lanes;

template <> struct Lanes<float> : WideFloat {
    static Op expand(const float* p, Bits bits) { return _mm512_maskz_expand_ps(bits, in_register(_mm512_loadu_ps(p))); }
    static Op load(const float* x) { return _mm512_loadu_ps(x); }
    static Op load(const float* x, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), x); }
};

#define FLOAT_LANES
#endif

#if defined(FLOAT_LANES) && defined(__AVX512VBMI2__)

template <> struct Lanes<Fp16> : WideFloat {
    static Op expand(const Fp16* p, Bits bits) {
        return _mm512_cvtph_ps(_mm256_maskz_expand_epi16(bits, in_register(_mm256_loadu_si256((const __m256i*)p))));
    }
    static Op load(const Fp16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
    static Op load(const Fp16* x, int n) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), x));
    }
};

#if defined(__AVX512BF16__)
template <> struct Lanes<Bf16> : Wide {
    using Op = __m512i;
    using Bits = uint32_t;
    static constexpr int STEP = 32;
    static Op expand(const Bf16* p, Bits bits) {
        return _mm512_maskz_expand_epi16(bits, in_register(_mm512_loadu_si512(p)));
    }
    static Op load(const Bf16* x) { return _mm512_loadu_si512(x); }
    static Op load(const Bf16* x, int n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, x); }
    static void fma(Acc& acc, Op w, Op x) { acc = _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
};
#else
template <> struct Lanes<Bf16> : WideFloat {
    static Op widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
    static Op expand(const Bf16* p, Bits bits) {
        return widen(_mm256_maskz_expand_epi16(bits, in_register(_mm256_loadu_si256((const __m256i*)p))));
    }
    static Op load(const Bf16* x) { return widen(_mm256_loadu_si256((const __m256i*)x)); }
    static Op load(const Bf16* x, int n) { return widen(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), x)); }
};
#endif

#define HALF_LANES
constexpr const char* INSTRUCTIONS =
#if defined(__AVX512BF16__)
    "avx512-vbmi2-bf16";
#else
    "avx512-vbmi2";
#endif

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// AVX2 has no expand: a table turns a mask byte into a shuffle, 8 columns at a time.
struct Shuffles {
    int8_t dwords[256][8] = {};   // for vpermps; negative where the column is pruned
    int8_t bytes[256][16] = {};   // for pshufb on 16-bit values; negative clears
    constexpr Shuffles() {
        for (int bits = 0; bits < 256; ++bits) {
            int next = 0;
            for (int lane = 0; lane < 8; ++lane) {
                const bool kept = bits >> lane & 1;
                dwords[bits][lane] = int8_t(kept ? next : -128);
                bytes[bits][2 * lane] = int8_t(kept ? 2 * next : -128);
                bytes[bits][2 * lane + 1] = int8_t(kept ? 2 * next + 1 : -128);
                next += kept;
            }
        }
    }
};
alignas(64) constexpr Shuffles SHUFFLES;

struct Narrow {
    using Acc = __m256;
    using Op = __m256;
    using Bits = uint8_t;
    static constexpr int STEP = 8, TOKENS = 2;
    static Acc zero() { return _mm256_setzero_ps(); }
    static Op in_register(Op v) { return v; }
    static void fma(Acc& acc, Op w, Op x) { acc = _mm256_fmadd_ps(w, x, acc); }
    static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) {
        const Acc all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        const __m128 half = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), half));
    }
    template <class V> static __m128i eight(const V* x, int n) {
        __m128i v = _mm_setzero_si128();
        std::memcpy(&v, x, n * sizeof(V));
        return v;
    }
    template <class V> static __m128i shuffled(const V* p, Bits bits) {
        return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p),
                                _mm_loadu_si128((const __m128i*)SHUFFLES.bytes[bits]));
    }
};

template <class V> struct Lanes;

#if !defined(FLOAT_LANES)
template <> struct Lanes<float> : Narrow {
    static Op expand(const float* p, Bits bits) {
        const __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)SHUFFLES.dwords[bits]));
        const Op spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), place);
        return _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(place));
    }
    static Op load(const float* x) { return _mm256_loadu_ps(x); }
    static Op load(const float* x, int n) {
        Op v = _mm256_setzero_ps();
        std::memcpy(&v, x, n * sizeof(float));
        return v;
    }
};
#define FLOAT_LANES
#endif

template <> struct Lanes<Bf16> : Narrow {
    static Op widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
    static Op expand(const Bf16* p, Bits bits) { return widen(shuffled(p, bits)); }
    static Op load(const Bf16* x) { return widen(_mm_loadu_si128((const __m128i*)x)); }
    static Op load(const Bf16* x, int n) { return widen(eight(x, n)); }
};

template <> struct Lanes<Fp16> : Narrow {
    static Op expand(const Fp16* p, Bits bits) { return _mm256_cvtph_ps(shuffled(p, bits)); }
    static Op load(const Fp16* x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }
    static Op load(const Fp16* x, int n) { return _mm256_cvtph_ps(eight(x, n)); }
};

#define HALF_LANES
constexpr const char* INSTRUCTIONS = "avx2";

#else

constexpr const char* INSTRUCTIONS = "plain";

#endif

#if !defined(HALF_LANES)
#if !defined(FLOAT_LANES)
template <class V> struct Lanes;
#endif

struct Plain {
    struct Acc { float lane[8]; };
    using Op = Acc;
    using Bits = uint8_t;
    static constexpr int STEP = 8, TOKENS = 2;
    static Acc zero() { return {}; }
    static const Op& in_register(const Op& v) { return v; }
    static void fma(Acc& acc, Op w, Op x) {
        for (int i = 0; i < 8; ++i) acc.lane[i] += w.lane[i] * x.lane[i];
    }
    static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) {
        for (int i = 0; i < 8; ++i) {
            out[0] += a.lane[i];
            out[1] += b.lane[i];
            out[2] += c.lane[i];
            out[3] += d.lane[i];
        }
    }
    template <class V> [[gnu::noinline]] static Op expand(const V* p, Bits bits) {  // inlined, it takes seconds to compile
        Op w;
        for (int i = 0; i < 8; ++i) {
            const bool kept = bits >> i & 1;
            w.lane[i] = kept ? to_float(*p) : 0.0f;
            p += kept;
        }
        return w;
    }
    template <class V> static Op load(const V* x, int n = 8) {
        Op v{};
        for (int i = 0; i < n; ++i) v.lane[i] = to_float(x[i]);
        return v;
    }
};

#if !defined(FLOAT_LANES)
template <> struct Lanes<float> : Plain {};
#endif
template <> struct Lanes<Bf16> : Plain {};
template <> struct Lanes<Fp16> : Plain {};
#endif

// ---- Where the inner loop takes its next vectors of weights from.

constexpr int ROWS = 4;

// Straight from the row pool: expanded in registers. Rows are too short for the hardware to learn their stream before it ends,
// so while a group of rows is read the group after it is fetched: `ahead` values further on.
template <class V> struct Packed {
    using L = Lanes<V>;
    const V* values[ROWS];
    const uint8_t* mask[ROWS];
    int64_t ahead[ROWS];

    void prefetch() const {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(values[r] + ahead[r]);
    }

    typename L::Op next(int row, typename L::Bits valid) {
        const auto bits = typename L::Bits(load_bits<typename L::Bits>(mask[row]) & valid);
        const auto w = L::expand(values[row], bits);
        values[row] += __builtin_popcount(bits);
        mask[row] += sizeof bits;
        return w;
    }
};

// From rows already expanded into a tile, `stride` vectors apart.
template <class V> struct Expanded {
    using L = Lanes<V>;
    const typename L::Op* row[ROWS];

    void prefetch() const {}
    typename L::Op next(int r, typename L::Bits) { return L::in_register(*row[r]++); }
};

// sums[t * stride + row] += dot products of ROWS rows and T tokens over `columns` columns that start at `column` of x.
template <class V, int T, class Weights>
inline void block(Weights weights, const V* const* x, int64_t column, int64_t columns, float* sums, int64_t stride) {
    using L = Lanes<V>;
    typename L::Acc acc[T][ROWS];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) acc[t][r] = L::zero();

    const int64_t end = column + columns / L::STEP * L::STEP;
    const int rest = int(columns % L::STEP);
    constexpr auto ALL = typename L::Bits(~typename L::Bits(0));
    for (; column < end; column += L::STEP) {
        if (column & L::STEP) weights.prefetch();  // two steps of a half full row are about one cache line
        typename L::Op w[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) w[r] = weights.next(r, ALL);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const auto xt = L::in_register(L::load(x[t] + column));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) L::fma(acc[t][r], w[r], xt);
        }
    }
    if (rest) {
        const auto valid = typename L::Bits((uint64_t(1) << rest) - 1);
        typename L::Op w[ROWS];
        for (int r = 0; r < ROWS; ++r) w[r] = weights.next(r, valid);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const auto xt = L::load(x[t] + column, rest);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) L::fma(acc[t][r], w[r], xt);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) L::sum4(acc[t][0], acc[t][1], acc[t][2], acc[t][3], sums + t * stride);
}

template <class V, class Weights>
void block(int tokens, Weights weights, const V* const* x, int64_t column, int64_t columns, float* sums,
           int64_t stride) {
    if constexpr (Lanes<V>::TOKENS > 2) {
        switch (tokens) {
            case 3: return block<V, 3>(weights, x, column, columns, sums, stride);
            case 4: return block<V, 4>(weights, x, column, columns, sums, stride);
            case 5: return block<V, 5>(weights, x, column, columns, sums, stride);
            case 6: return block<V, 6>(weights, x, column, columns, sums, stride);
        }
    }
    if (tokens == 1) return block<V, 1>(weights, x, column, columns, sums, stride);
    return block<V, 2>(weights, x, column, columns, sums, stride);
}

// ---- One call.

constexpr int64_t MAX_ROWS = 64;       // rows per work item
constexpr int64_t MAX_TOKENS = 512;    // tokens that share one expanded tile: their sums stay in L2
constexpr int64_t X_BYTES = 24 << 10;  // x of a block of tokens, as held in registers: most of a 32 KiB L1
constexpr int64_t DIRECT_TOKENS = 12;  // more tokens of one expert than this pay for a tile

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

template <class V> struct Call {
    using L = Lanes<V>;
    using Op = typename L::Op;

    const V* x;
    int64_t in, out;
    const V* values;
    const uint8_t* mask;
    const uint32_t* starts;
    const int32_t* row_map;
    V* y;

    int64_t mask_bytes() const { return (in + 7) / 8; }
    // ROWS rows of an expert from `row`; past the last row the last one again, whose sums nobody stores.
    Packed<V> packed(const int32_t* map, int64_t row) const {
        Packed<V> weights;
        for (int r = 0; r < ROWS; ++r) {
            const int64_t version = map[row + r < out ? row + r : out - 1];
            const int64_t next = map[row + r + ROWS < out ? row + r + ROWS : out - 1];
            weights.values[r] = values + starts[version];
            weights.ahead[r] = int64_t(starts[next]) - int64_t(starts[version]);
            weights.mask[r] = mask + version * mask_bytes();
        }
        return weights;
    }

    void direct(const int32_t* map, const int32_t* tokens, int64_t count, int64_t first, int64_t last) const {
        for (int64_t t0 = 0; t0 < count; t0 += L::TOKENS) {
            const int n = int(count - t0 < L::TOKENS ? count - t0 : L::TOKENS);
            const V* xs[L::TOKENS];
            for (int t = 0; t < n; ++t) xs[t] = x + tokens[t0 + t] * in;
            for (int64_t row = first; row < last; row += ROWS) {
                float sums[L::TOKENS * ROWS] = {};
                block<V>(n, packed(map, row), xs, 0, in, sums, ROWS);
                for (int t = 0; t < n; ++t)
                    for (int64_t r = 0; r < ROWS && row + r < last; ++r)
                        store(y + tokens[t0 + t] * out + row + r, sums[t * ROWS + r]);
            }
        }
    }

    // Column chunk by column chunk: expand it for all rows, multiply it with all tokens, add to the sums.
    void tiled(const int32_t* map, const int32_t* tokens, int64_t count, int64_t first, int64_t last) const {
        thread_local Buffer tile_buffer, sums_buffer;
        const int64_t groups = (last - first + ROWS - 1) / ROWS, rows = groups * ROWS;
        const int64_t chunk = X_BYTES / (L::TOKENS * int64_t(sizeof(Op))) * L::STEP;
        const int64_t width = chunk / L::STEP + 1;  // one vector apart, or equal columns of all rows share a cache set
        Op* tile = (Op*)tile_buffer.get(rows * width * sizeof(Op));
        float* sums = (float*)sums_buffer.get(count * rows * sizeof(float));
        std::memset(sums, 0, count * rows * sizeof(float));
        Packed<V> weights[MAX_ROWS / ROWS];
        for (int64_t g = 0; g < groups; ++g) weights[g] = packed(map, first + g * ROWS);

        for (int64_t column = 0; column < in; column += chunk) {
            const int64_t columns = in - column < chunk ? in - column : chunk;
            for (int64_t g = 0; g < groups; ++g) expand(weights[g], columns, tile + g * ROWS * width, width);
            for (int64_t t0 = 0; t0 < count; t0 += L::TOKENS) {
                const int n = int(count - t0 < L::TOKENS ? count - t0 : L::TOKENS);
                const V* xs[L::TOKENS];
                for (int t = 0; t < n; ++t) xs[t] = x + tokens[t0 + t] * in;
                for (int64_t g = 0; g < groups; ++g) {
                    const Op* at = tile + g * ROWS * width;
                    const Expanded<V> expanded{{at, at + width, at + 2 * width, at + 3 * width}};
                    block<V>(n, expanded, xs, column, columns, sums + t0 * rows + g * ROWS, rows);
                }
            }
        }
        for (int64_t t = 0; t < count; ++t)
            for (int64_t r = 0; r < last - first; ++r) store(y + tokens[t] * out + first + r, sums[t * rows + r]);
    }

    static void expand(Packed<V>& weights, int64_t columns, Op* tile, int64_t width) {
        for (int64_t s = 0; columns > 0; ++s, columns -= L::STEP) {
            const auto valid = typename L::Bits(columns < L::STEP ? (uint64_t(1) << columns) - 1 : ~uint64_t(0));
            if (s & 1) weights.prefetch();
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) tile[r * width + s] = weights.next(r, valid);
        }
    }

    // `order` lists the tokens expert by expert; `begins` [experts + 1] says where each expert's begin.
    void run(const int32_t* order, const int64_t* begins, int64_t experts, int threads) const {
        int64_t rows = out / (4 * threads) / ROWS * ROWS;  // some items for each thread
        rows = rows < ROWS ? ROWS : rows > MAX_ROWS ? MAX_ROWS : rows;
        const int64_t chunks = (out + rows - 1) / rows;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t item = 0; item < experts * chunks; ++item) {
            const int64_t expert = item / chunks, first = item % chunks * rows;
            const int64_t last = first + rows < out ? first + rows : out;
            const int64_t count = begins[expert + 1] - begins[expert];
            if (count == 0) continue;
            const int32_t *map = row_map + expert * out, *tokens = order + begins[expert];
            if (count <= DIRECT_TOKENS) direct(map, tokens, count, first, last);
            else
                for (int64_t t = 0; t < count; t += MAX_TOKENS)
                    tiled(map, tokens + t, count - t < MAX_TOKENS ? count - t : MAX_TOKENS, first, last);
        }
    }
};

template <class V>
void linear(const void* x, void* y, int64_t in, int64_t out, const void* values, const uint8_t* mask,
            const uint32_t* starts, const int32_t* row_map, const int32_t* order, const int64_t* begins,
            int64_t experts, int threads) {
    Call<V>{(const V*)x, in, out, (const V*)values, mask, starts, row_map, (V*)y}
        .run(order, begins, experts, threads);
}

}  // namespace

extern "C" {

const char* wexpand_instructions() { return INSTRUCTIONS; }

// y [tokens, out] = x [tokens, in] times the rows of each token's expert. `chosen` [tokens], or null for one expert.
// type: 0 float32, 1 bfloat16, 2 float16. Returns 0, or 1 if a chosen expert does not exist (y is then not written).
int wexpand_linear(int type, const void* x, const int64_t* chosen, int64_t tokens, int64_t in, int64_t out,
                   int64_t experts, const void* values, const uint8_t* mask, const uint32_t* starts,
                   const int32_t* row_map, void* y, int threads) {
    thread_local std::vector<int32_t> order;
    thread_local std::vector<int64_t> begins;
    order.resize(tokens);
    begins.assign(experts + 1, 0);
    if (chosen == nullptr) {
        experts = 1;
        begins[1] = tokens;
        for (int64_t t = 0; t < tokens; ++t) order[t] = int32_t(t);
    } else {  // counting sort: counts, running sums, then placing moves each begin to the next one's place
        for (int64_t t = 0; t < tokens; ++t) {
            if (chosen[t] < 0 || chosen[t] >= experts) return 1;
            ++begins[chosen[t]];
        }
        for (int64_t e = 0, sum = 0; e <= experts; ++e) {
            sum += begins[e];
            begins[e] = sum;
        }
        for (int64_t t = tokens - 1; t >= 0; --t) order[--begins[chosen[t]]] = int32_t(t);
    }
    const auto call = type == 0 ? linear<float> : type == 1 ? linear<Bf16> : linear<Fp16>;
    call(x, y, in, out, values, mask, starts, row_map, order.data(), begins.data(), experts, threads);
    return 0;
}

}  // extern "C"
