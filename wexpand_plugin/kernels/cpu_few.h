// Few tokens of one expert: each row is decoded in registers and multiplied with all their inputs;
// the dense weight never exists, not even in cache. Lanes lie along the columns of a row and are
// summed up at its end.

#pragma once

#include "cpu_call.h"
#include "cpu_decoders.h"

namespace {

constexpr int SHARING = 8;           // tokens whose sums fit the registers: they share a decoding
constexpr int64_t AHEAD = 12 << 10;  // bytes, about, from what is read to what is fetched

template <class V, bool MASKED, class Products> struct Few {
    using D = Decoder<V, MASKED, Products>;
    using Packed = typename Products::Packed;
    static constexpr int ROWS = LANES == 16 ? 2 : 1;  // that share their loads of x
    static constexpr int64_t MOST_ROWS = 1024;        // of an item of work: a stream of memory
    Call& call;
    const int64_t width = padded_width<D>(call.pool);
    const int64_t row_bytes = call.pool.bytes / call.pool.versions;
    const int64_t rows_ahead = round_up(max(1, AHEAD / row_bytes), ROWS);
    const int64_t step_bytes = row_bytes * D::STEP / width;

    explicit Few(Call& call) : call(call) {}

    // Inputs are packed a token at a time: [token][column in the decoder's order], and zeros.
    int64_t parts(int64_t expert) const { return call.count(expert); }
    // There is room for whole `dots`, which may multiply what lies there.
    int64_t packed_bytes(int64_t expert) const {
        return width * round_up(parts(expert), 2) * sizeof(Packed);
    }
    [[gnu::noinline]] void pack(int64_t expert, int64_t token, uint8_t* packed) const {
        const int64_t in = call.pool.in, whole = in / D::STEP * D::STEP;
        const X* const x = call.x + call.tokens(expert)[token] * in;
        Packed* const __restrict to = (Packed*)packed + token * width;
        constexpr int64_t PARTS = D::INTERLEAVE, PART = D::STEP / PARTS, GRAIN = D::GRAIN;
        for (int64_t c = 0; c < whole; c += D::STEP)
            for (int64_t i = 0; i < PART; i += GRAIN)
#pragma GCC unroll 8
                for (int64_t k = 0; k < PARTS; ++k)
#pragma GCC unroll 2
                    for (int64_t g = 0; g < GRAIN; ++g)
                        to[c + k * PART + i + g] =
                            Products::convert(x[c + i * PARTS + k * GRAIN + g]);
        for (int64_t place = 0; place < width - whole; ++place) {
            const int64_t c = whole + column_at<D>(place);
            to[whole + place] = c < in ? Products::convert(x[c]) : Packed{};
        }
    }

    // Rows that will be needed, fetched as far as this one is read: they are too short for the
    // hardware to learn their stream before it ends.
    template <int R> struct Later {
        const uint8_t* at[R];
        int64_t bytes;  // of a step

        template <int STEPS> void fetch() {
            constexpr int64_t BYTES = STEPS * (MASKED ? 40 : D::STEP) * BITS<V> / 8;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int64_t line = 0; line < divide_up(BYTES, 64); ++line)
                    __builtin_prefetch(at[r] + 64 * line);
                at[r] += STEPS * bytes;
            }
        }
    };

    // How the sums of a row get their scales: not at all, each step's lanes by their own numbers,
    // sums over GROUP steps (0: any number) by one, or the weights, vector by vector.
    enum Way { NOT, BY_STEP, BY_GROUP, BY_WEIGHT };

    // totals[t][r] += the steps from `step` to `last`, scaled, of R rows and T tokens.
    template <int HALF, int R, int T, Way WAY, int GROUP>
    static inline __attribute__((always_inline)) void add(const Row* rows, int64_t step,
                                                          int64_t last, const Scales<D>* scales,
                                                          const Packed* x, int64_t width,
                                                          Later<R>& later, Vec (&totals)[T][R]) {
        // a multiply-add waits for the one before it in the same sum
        constexpr int CHAINS = min(D::VECTORS, T * R == 1 ? 4 : T * R <= 3 ? 2 : 1);
        const int64_t group = scales[0].group;
        D weights[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) weights[r] = D(rows[r].values);
        int64_t number = WAY == BY_STEP ? step : WAY == BY_GROUP ? step / group : 0;
        for (x += step * D::STEP; step < last; ++number) {
            Vec sums[T][R][CHAINS] = {};
            const auto one_step = [&] {
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
                    weights[r].template start<HALF>(MASKED ? rows[r].mask[step] : 0);
#pragma GCC unroll 8
                for (int k = 0; k < D::VECTORS; ++k) {
                    typename Products::Weights w[R];
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                        w[r] = weights[r].vector(k);
                        if constexpr (WAY == BY_WEIGHT) w[r] *= scales[r].of_weights(step, k);
                    }
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t) {
                        auto xt = Products::load(x + t * width + k * Products::COLUMNS);
                        if constexpr (R > 1) keep_in_register(xt);
#pragma GCC unroll 4
                        for (int r = 0; r < R; ++r) Products::add(sums[t][r][k % CHAINS], w[r], xt);
                    }
                }
                x += D::STEP;
                ++step;
            };
            if (GROUP && step % max(GROUP, 1) == 0 && step + GROUP <= last) {
                later.template fetch<GROUP>();
#pragma GCC unroll 2
                for (int i = 0; i < GROUP; ++i) one_step();
            } else {
                const int64_t end = WAY == BY_STEP    ? step + 1
                                    : WAY == BY_GROUP ? min(last, (number + 1) * group)
                                                      : last;
                do {
                    later.template fetch<1>();
                    one_step();
                } while (step < end);
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    Vec sum = sums[t][r][0];
                    for (int chain = 1; chain < CHAINS; ++chain) sum += sums[t][r][chain];
                    if constexpr (WAY == BY_STEP) sum *= scales[r].of_step(number);
                    if constexpr (WAY == BY_GROUP) sum *= scales[r].of_group(number);
                    totals[t][r] += sum;
                }
        }
    }

    // sums[t * stride + row] = the rows whose records these are times T tokens of packed x.
    template <int T, Way WAY, int GROUP>
    void dots(const uint8_t* const* records, int64_t number, const Packed* x, float* sums,
              int64_t stride) const {
        constexpr int R = ROWS;
        thread_local Buffer numbers_buffer;
        const Pool& pool = call.pool;
        const int64_t steps = width / D::STEP, size = Scales<D>::size(pool);
        const int64_t half = D::HALVES == 1 ? steps : min(pool.half / D::STEP, steps);
        float* const numbers = numbers_buffer.get<float>(R * size);
        for (int64_t row = 0; row < number; row += R) {
            Row rows[R];
            Scales<D> scales[R];
            Later<R> later{{}, step_bytes};
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                rows[r] = pool.row_at(records[row + r]);
                later.at[r] = records[row + r + rows_ahead];
                scales[r] = Scales<D>(pool, numbers + r * size);
                if constexpr (WAY != NOT) Scales<D>::fill(pool, rows[r], numbers + r * size);
            }
            Vec totals[T][R] = {};
            add<0, R, T, WAY, GROUP>(rows, 0, half, scales, x, width, later, totals);
            if constexpr (D::HALVES == 2)
                add<1, R, T, WAY, GROUP>(rows, half, steps, scales, x, width, later, totals);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) store_lane_sums(totals[t], sums + t * stride + row);
        }
    }
    template <int T> void dots(const uint8_t* const* records, int64_t number, const Packed* x,
                               float* sums, int64_t stride) const {
        constexpr int USUAL = T == 1 ? FULL_COLUMNS / D::STEP : 0;  // groups of 128
        constexpr Way SMALL = D::LANEWISE ? BY_STEP : BY_WEIGHT;
        const int64_t group = call.pool.group / D::STEP;
        if constexpr (D::FACTOR == 0) dots<T, NOT, 0>(records, number, x, sums, stride);
        else if (!group) dots<T, SMALL, 0>(records, number, x, sums, stride);
        else if (group == USUAL) dots<T, BY_GROUP, USUAL>(records, number, x, sums, stride);
        else dots<T, BY_GROUP, 0>(records, number, x, sums, stride);
    }

    // A range of output rows for all of the expert's tokens.
    [[gnu::noinline]] void multiply(int64_t expert, int64_t first, int64_t last,
                                    const uint8_t* packed) const {
        // by the number of tokens; some are done as one more
        using Dots = void (Few::*)(const uint8_t* const*, int64_t, const Packed*, float*, int64_t)
            const;
        static constexpr Dots DOTS[] = {nullptr,       &Few::dots<1>, &Few::dots<2>,
                                        &Few::dots<4>, &Few::dots<4>, &Few::dots<6>,
                                        &Few::dots<6>, &Few::dots<8>, &Few::dots<8>};
        thread_local Buffer records_buffer, sums_buffer;
        Pool& pool = call.pool;
        const int64_t rows = last - first, stride = round_up(rows, ROWS);
        auto* const records = records_buffer.get<const uint8_t*>(stride + rows_ahead);
        for (int64_t row = 0; row < stride + rows_ahead; ++row)
            records[row] = pool.record(pool.version(expert, min(first + row, pool.out - 1)));
        float* const sums = sums_buffer.get<float>(stride * SHARING);
        for (int64_t t = 0; t < call.count(expert); t += SHARING) {
            const int64_t tokens = min(SHARING, call.count(expert) - t);
            (this->*DOTS[tokens])(records, rows, (const Packed*)packed + t * width, sums, stride);
            for (int64_t i = 0; i < tokens; ++i)
                call.store_sums(call.tokens(expert)[t + i], first, rows, sums + i * stride, 1);
        }
    }
};

}  // namespace
