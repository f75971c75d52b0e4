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
    // There is room for whole `dot`s, which may multiply what lies there.
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

    // Rows that will be needed, fetched a step at a time: they are too short for the hardware to
    // learn their stream before it ends.
    template <int R> struct Later {
        const uint8_t* at[R];
        int64_t bytes;  // of a step

        void fetch(int64_t step) {
            constexpr int64_t BYTES = (MASKED ? 40 : D::STEP) * BITS<V> / 8;
            constexpr int64_t LINES = divide_up(BYTES, 64), STEPS = BYTES <= 32 ? 2 : 1;
            if (step % STEPS != 0) return;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int64_t line = 0; line < LINES; ++line) __builtin_prefetch(at[r] + 64 * line);
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
                later.fetch(step);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
                    weights[r].template start<HALF>(MASKED ? rows[r].mask[step] : 0);
#pragma GCC unroll 8
                for (int k = 0; k < D::VECTORS; ++k) {
                    typename Products::Op w[R];
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
#pragma GCC unroll 2
                for (int i = 0; i < GROUP; ++i) one_step();
            } else {
                const int64_t end = WAY == BY_STEP    ? step + 1
                                    : WAY == BY_GROUP ? min(last, (number + 1) * group)
                                                      : last;
                do one_step();
                while (step < end);
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

    // sums[t][r] = row versions times tokens: a few rows, T tokens of packed x.
    template <int T> void dot(const int32_t* versions, const int32_t* later_versions,
                              const Packed* x, float* numbers, float* sums) const {
        constexpr int R = ROWS;
        Pool& pool = call.pool;
        const int64_t steps = width / D::STEP, size = Scales<D>::size(pool);
        const int64_t half = D::HALVES == 1 ? steps : min(pool.half / D::STEP, steps);
        Row rows[R];
        Scales<D> scales[R];
        Later<R> later{{}, step_bytes};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            rows[r] = pool.row(versions[r]);
            later.at[r] = pool.record(later_versions[r]);
            scales[r] = Scales<D>(pool, numbers + r * size);
            if constexpr (D::FACTOR != 0) Scales<D>::fill(pool, rows[r], numbers + r * size);
        }
        Vec totals[T][R] = {};
        const auto all = [&](auto way, auto group) {
            constexpr Way WAY = decltype(way)::value;
            constexpr int GROUP = decltype(group)::value;
            add<0, R, T, WAY, GROUP>(rows, 0, half, scales, x, width, later, totals);
            if constexpr (D::HALVES == 2)
                add<1, R, T, WAY, GROUP>(rows, half, steps, scales, x, width, later, totals);
        };
        using Any = std::integral_constant<int, 0>;
        using Usual = std::integral_constant<int, FULL_COLUMNS / D::STEP>;  // groups of 128
        if constexpr (D::FACTOR == 0) {
            all(std::integral_constant<Way, NOT>(), Any());
        } else {
            constexpr Way SMALL = D::LANEWISE ? BY_STEP : BY_WEIGHT;
            std::integral_constant<Way, BY_GROUP> by_group;
            if (!scales[0].group) all(std::integral_constant<Way, SMALL>(), Any());
            else if (T == 1 && scales[0].group == Usual::value) all(by_group, Usual());
            else all(by_group, Any());
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[t * R + r] = sum(totals[t][r]);
    }

    // A range of output rows for all of the expert's tokens.
    [[gnu::noinline]] void multiply(int64_t expert, int64_t first, int64_t last,
                                    const uint8_t* packed) const {
        // by the number of tokens; some are done as one more
        constexpr decltype(&Few::dot<1>) DOT[] = {nullptr,      &Few::dot<1>, &Few::dot<2>,
                                                  &Few::dot<4>, &Few::dot<4>, &Few::dot<6>,
                                                  &Few::dot<6>, &Few::dot<8>, &Few::dot<8>};
        thread_local Buffer numbers_buffer, sums_buffer;
        Pool& pool = call.pool;
        float* const numbers = numbers_buffer.get<float>(ROWS * Scales<D>::size(pool));
        const int64_t rows = last - first, stride = rows + ROWS - 1;
        float* const sums = sums_buffer.get<float>(stride * SHARING);
        for (int64_t t = 0; t < call.count(expert); t += SHARING) {
            const int64_t tokens = min(SHARING, call.count(expert) - t);
            for (int64_t row = 0; row < rows; row += ROWS) {
                int32_t versions[ROWS], later[ROWS];
                for (int r = 0; r < ROWS; ++r) {  // the last row again where there is none
                    versions[r] = pool.version(expert, min(first + row + r, last - 1));
                    later[r] =
                        pool.version(expert, min(first + row + r + rows_ahead, pool.out - 1));
                }
                float of_rows[SHARING * ROWS];
                (this->*DOT[tokens])(versions, later, (const Packed*)packed + t * width, numbers,
                                     of_rows);
                for (int64_t i = 0; i < tokens; ++i)
                    for (int r = 0; r < ROWS; ++r)
                        sums[i * stride + row + r] = of_rows[i * ROWS + r];
            }
            for (int64_t i = 0; i < tokens; ++i)
                call.store_sums(call.tokens(expert)[t + i], first, rows, sums + i * stride, 1);
        }
    }
};

}  // namespace
