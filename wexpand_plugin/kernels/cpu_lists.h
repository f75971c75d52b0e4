// Many tokens of one expert, and rows of which few weights are kept: nothing is expanded and zeros
// cost nothing. The columns that a row keeps are listed, and each kept weight is multiplied with
// its column of a panel for up to 64 tokens at once, whose sums stay in registers.

#pragma once

#include "cpu_panels.h"

namespace {

// list_kept(mask, first, end, columns): where a row keeps weights between two columns, counted from
// `first`, which begins a word. Returns how many; may write up to LISTED behind them.

#if defined(WEXPAND_AVX512)

constexpr int LISTED = 32;

inline int64_t list_kept(const uint64_t* mask, int64_t first, int64_t end, uint16_t* columns) {
    alignas(64) static constexpr uint16_t COUNT[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                       11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                       22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    uint16_t* to = columns;
    __m512i places = _mm512_load_si512(COUNT);
    for (int64_t c = first; c < end; c += 32) {
        const uint32_t bits = load_bits<uint32_t>((const uint8_t*)mask + c / 8);
        // to memory it is slower
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(bits, places));
        places = _mm512_add_epi16(places, _mm512_set1_epi16(32));
        to += __builtin_popcount(bits);
    }
    return to - columns;
}

#else

constexpr int LISTED = 8;

struct Places {
    uint16_t of[256][8] = {};  // the places of a byte's set bits, then zeros
    constexpr Places() {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, next = 0; lane < 8; ++lane)
                if (bits >> lane & 1) of[bits][next++] = uint16_t(lane);
    }
};
alignas(64) constexpr Places PLACES;

inline int64_t list_kept(const uint64_t* mask, int64_t first, int64_t end, uint16_t* columns) {
    uint16_t* to = columns;
    for (int64_t c = first; c < end; c += 8) {
        const int bits = ((const uint8_t*)mask)[c / 8];
        uint16_t places[8];  // local, or the compiler must fear that a store changes the next load
        for (int i = 0; i < 8; ++i) places[i] = uint16_t(c - first + PLACES.of[bits][i]);
        std::memcpy(to, places, sizeof places);
        to += __builtin_popcount(bits);
    }
    return to - columns;
}

#endif

// Kept weights of a row from one column to another; both are in one word, or begin words.
inline int64_t count_bits(const uint64_t* mask, int64_t first, int64_t end) {
    if (end - first < WORD)
        return __builtin_popcountll(mask[first / WORD] >> first % WORD &
                                    ((uint64_t(1) << (end - first)) - 1));
    int64_t kept = 0;
    for (int64_t word = first / WORD; word < divide_up(end, WORD); ++word)
        kept += __builtin_popcountll(mask[word]);
    return kept;
}

// `kept` integers as floats; a row stores 8 bits of each or, in one half of its bytes, 4.
template <class V, int HALF>
void convert(const uint8_t* from, int64_t kept, float scale, float* to) {
    typedef uint8_t Bytes __attribute__((vector_size(LANES), may_alias, aligned(1)));
    typedef int32_t Lanes __attribute__((vector_size(4 * LANES)));
    constexpr int LEFT = BITS<V> == 4 && !HALF ? 28 : 24;  // to the top of 32 bits
    scale *= BITS<V> == 4 ? 0x1p-28f : 0x1p-24f;
    for (int64_t k = 0; k < kept; k += LANES) {
        const Lanes q = __builtin_convertvector(*(const Bytes*)(from + k), Lanes) << LEFT;
        const Lanes valid = HALF ? q & int32_t(0xf0000000) : q;
        *(UnalignedVec*)(to + k) = __builtin_convertvector(valid, Vec) * scale;
    }
}

// The ways in which weights V are multiplied with a panel.
//   W              what weights are read as          token, convert: see Panels
//   add<N>(columns, weights, kept, panel, sums)
//                  sums[0 .. WIDE * N) += the weights times their columns of N vectors

template <class V> struct ListProducts {
    using Packed = float;
    using W = float;
    static constexpr int64_t WIDE = LANES;

    static int64_t token(int64_t slot) { return slot; }
    static Packed convert(X v) { return to_float(v); }

    template <int N> static void add(const uint16_t* columns, const W* weights, int64_t kept,
                                     const Packed* panel, float* sums) {
        // a multiply-add waits for the one before it in the same sum
        constexpr int CHAINS = N >= 4 ? 1 : N >= 2 ? 2 : 4;
        Vec acc[CHAINS][N] = {};
        const auto one = [&](Vec* sum, int64_t k) {
            const Vec* x = (const Vec*)(panel + columns[k] * (WIDE * N));
            const float w = weights[k];
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) sum[i] += w * x[i];
        };
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) acc[0][i] = ((const Vec*)sums)[i];
        int64_t k = 0;
        for (; k + CHAINS <= kept; k += CHAINS)
#pragma GCC unroll 4
            for (int chain = 0; chain < CHAINS; ++chain) one(acc[chain], k + chain);
        for (; k < kept; ++k) one(acc[0], k);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            for (int chain = 1; chain < CHAINS; ++chain) acc[0][i] += acc[chain][i];
            ((Vec*)sums)[i] = acc[0][i];
        }
    }
};

#if defined(WEXPAND_AVX512) && defined(__AVX512BF16__)

// One instruction multiplies pairs of bfloat16, so two weights are taken at a time and the tokens
// of their columns interleaved.
template <> struct ListProducts<Bf16> {
    using Packed = Bf16;
    using W = Bf16;
    static constexpr int64_t WIDE = 32;

    // Interleaving takes 4 slots of every 8 to the first sum and 4 to the second.
    static int64_t token(int64_t slot) {
        return slot / 32 * 32 + slot % 8 / 4 * 16 + slot % 32 / 8 * 4 + slot % 4;
    }
    template <class From> static Packed convert(From v) { return v; }

    template <int N> static void add(const uint16_t* columns, const W* weights, int64_t kept,
                                     const Packed* panel, float* sums) {
        constexpr int CHAINS = N == 1 ? 2 : 1;
        alignas(64) static constexpr Packed NOTHING[WIDE * N] = {};
        __m512 acc[CHAINS][2 * N] = {};
        const auto two = [&](__m512* sum, const Packed* a, const Packed* b, uint32_t pair) {
            const auto w = (__m512bh)_mm512_set1_epi32(int(pair));
#pragma GCC unroll 2
            for (int i = 0; i < N; ++i) {
                const __m512i first = _mm512_load_si512(a + i * WIDE);
                const __m512i second = _mm512_load_si512(b + i * WIDE);
                const auto low = (__m512bh)_mm512_unpacklo_epi16(first, second);
                const auto high = (__m512bh)_mm512_unpackhi_epi16(first, second);
                sum[2 * i] = _mm512_dpbf16_ps(sum[2 * i], low, w);
                sum[2 * i + 1] = _mm512_dpbf16_ps(sum[2 * i + 1], high, w);
            }
        };
        const auto column = [&](int64_t k) { return panel + columns[k] * (WIDE * N); };
#pragma GCC unroll 8
        for (int i = 0; i < 2 * N; ++i) acc[0][i] = _mm512_load_ps(sums + 16 * i);
        int64_t k = 0;
        for (; k + 2 * CHAINS <= kept; k += 2 * CHAINS)
#pragma GCC unroll 2
            for (int64_t c = 0; c < 2 * CHAINS; c += 2)
                two(acc[c / 2], column(k + c), column(k + c + 1),
                    load_bits<uint32_t>(weights + k + c));
        for (; k + 2 <= kept; k += 2)
            two(acc[0], column(k), column(k + 1), load_bits<uint32_t>(weights + k));
        if (k < kept) two(acc[0], column(k), NOTHING, weights[k].bits);
#pragma GCC unroll 8
        for (int i = 0; i < 2 * N; ++i) {
            if constexpr (CHAINS == 2) acc[0][i] = _mm512_add_ps(acc[0][i], acc[1][i]);
            _mm512_store_ps(sums + 16 * i, acc[0][i]);
        }
    }
};

#endif

template <class V> struct Lists : Panels<Lists<V>, typename ListProducts<V>::Packed> {
    using P = ListProducts<V>;
    using Packed = typename P::Packed;
    using W = typename P::W;
    using Base = Panels<Lists, Packed>;
    using Base::call;
    static constexpr int64_t WIDE = P::WIDE;
    static constexpr size_t MOST = PANEL / WIDE;  // vectors of a panel

    explicit Lists(Call& call) : Base(call, round_up(call.pool.in, WORD)) {}

    static int64_t token(int64_t slot) { return P::token(slot); }
    static int64_t column(int64_t place) { return place; }
    static int64_t offset(int64_t place, int64_t slot, int64_t tokens) {
        return place * tokens + slot;
    }
    static Packed convert(X v) { return P::convert(v); }

    // Columns of a panel whose x stays in cache while the rows go by (evals/LOG.md of 2026-11-26).
    // One panel waits for the rows, and reads them best in long parts; the sparser they are, the
    // longer. With more panels the time goes into multiplying, out of a cache nearby.
    int64_t columns_at_once(int64_t count) const {
        const double density = call.pool.density();
        const int64_t kib = count > PANEL ? 48 : min(192, int64_t(20 / (density + 0.01)));
        // half of it where vectors are half as wide
        const int64_t bytes = kib * 64 * LANES;
        return max(WORD, bytes / (this->panel(count) * int64_t(sizeof(Packed))) / WORD * WORD);
    }

    // `kept` weights of a row from `column` on, of which `from` is the first; perhaps in `to`.
    const W* weights(const Row& row, const uint8_t* from, int64_t column, int64_t end, int64_t kept,
                     W* to) const {
        if constexpr (std::is_same_v<V, W>) return (const W*)from;
        else if constexpr (!IS_INTEGER<V>) {
            for (int64_t k = 0; k < kept; k += 8) *(Float8*)(to + k) = load8((const V*)from + k);
        } else {
            const int64_t group = call.pool.group;
            W* at = to;
            for (int64_t c = column; c < end; c = (c / group + 1) * group) {
                const int64_t next = min(end, (c / group + 1) * group);
                const int64_t some = count_bits(row.mask, c, next);
                const float scale = to_float(((const Fp16*)row.scales)[c / group]);
                if (std::is_same_v<V, Int4> && column >= call.pool.half)
                    ::convert<V, 1>(from, some, scale, at);
                else ::convert<V, 0>(from, some, scale, at);
                from += some, at += some;
            }
        }
        return to;
    }

    using Add = void (*)(const uint16_t*, const W*, int64_t, const Packed*, float*);
    template <size_t... N>
    static constexpr std::array<Add, sizeof...(N) + 1> adds(std::index_sequence<N...>) {
        return {nullptr, P::template add<N + 1>...};
    }

    [[gnu::noinline]] void multiply(int64_t expert, int64_t first, int64_t last,
                                    const uint8_t* packed) const {
        for (int64_t t = 0; t < call.count(expert); t += PANEL_TOKENS)
            multiply(expert, t, first, last, (const Packed*)packed + t * this->width);
    }

    // Columns whose x fits the cache at a time: list the kept weights of all rows, multiply them
    // with panel after panel.
    void multiply(int64_t expert, int64_t token, int64_t first, int64_t last,
                  const Packed* x) const {
        static constexpr auto ADD = adds(std::make_index_sequence<MOST>());  // by vectors
        thread_local Buffer columns_buffer, weights_buffer, sums_buffer;
        Pool& pool = call.pool;
        const int64_t count = min(PANEL_TOKENS, call.count(expert) - token), rows = last - first;
        const int64_t chunk = columns_at_once(count), row_bytes = pool.bytes / pool.versions;
        auto* const columns = columns_buffer.get<uint16_t>(rows * chunk + LISTED);
        auto* const converted = weights_buffer.get<W>(rows * chunk + LANES);
        auto* const sums = sums_buffer.get<float>(rows * this->whole(count));
        std::memset(sums, 0, rows * this->whole(count) * sizeof(float));
        const uint8_t* values[PANEL_ROWS];
        const W* of_row[PANEL_ROWS];

        for (int64_t column = 0, end; column < pool.in; column = end) {
            end = min(pool.in, column + chunk);
            if (std::is_same_v<V, Int4> && column < pool.half) end = min(end, pool.half);
            const bool begins = column == 0 || (std::is_same_v<V, Int4> && column == pool.half);
            int64_t begin[PANEL_ROWS + 1] = {0};
            for (int64_t r = 0; r < rows; ++r) {
                const Row row = pool.row(pool.version(expert, first + r));
                if (begins) values[r] = row.values;
                const int32_t later = pool.version(expert, first + min(r + ROWS_AHEAD, rows - 1));
                fetch(pool.record(later) + row_bytes * column / pool.in,
                      row_bytes * (end - column) / pool.in / 64 + 1);
                const int64_t kept = list_kept(row.mask, column, end, columns + begin[r]);
                of_row[r] = weights(row, values[r], column, end, kept, converted + begin[r]);
                values[r] += kept * sizeof(V);
                begin[r + 1] = begin[r] + kept;
            }
            for (int64_t t = 0; t < count; t += PANEL) {
                const int64_t tokens = this->panel(count - t);
                for (int64_t r = 0; r < rows; ++r)
                    ADD[tokens / WIDE](columns + begin[r], of_row[r], begin[r + 1] - begin[r],
                                       x + t * this->width + column * tokens,
                                       sums + t * rows + r * tokens);
            }
        }
        this->unpack(expert, token, count, first, last, sums, rows);
    }
};

}  // namespace
