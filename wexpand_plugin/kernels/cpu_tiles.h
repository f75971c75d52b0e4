// Many tokens of one expert, and rows that are full or nearly so: a tile of rows is decoded into a
// buffer that fits the L2 cache, a stretch of columns at a time, then multiplied with the panels.
//
// The inner loop keeps the sums of R rows and N vectors of tokens in registers: a column's N
// vectors of x serve R rows, and each weight, broadcast, N vectors.

#pragma once

#include "cpu_decoders.h"
#include "cpu_panels.h"

namespace {

constexpr int64_t TILE_X = 24 << 10;  // bytes of x that stay in L1 while the rows go by

template <class V, bool MASKED, class Products> struct Tiles
    : Panels<Tiles<V, MASKED, Products>, typename Products::Packed> {
    using D = Decoder<V, MASKED, Products>;
    using Packed = typename Products::Packed;
    using Base = Panels<Tiles, Packed>;
    using Base::call;
    static constexpr int64_t WIDE = LANES, PER_LANE = Products::PER_LANE;
    static constexpr int MOST = LANES == 16 ? 4 : 2;  // vectors of tokens at a time
    static constexpr int ROWS = 6;  // with so many vectors; twice as many with half of them
    // Sums, not weights, are scaled where an instruction adds pairs.
    static constexpr bool SCALED_SUMS = PER_LANE == 2 && D::FACTOR != 0;

    explicit Tiles(Call& call) : Base(call, padded_width<D>(call.pool)) {}

    static int64_t token(int64_t slot) { return slot; }
    static int64_t column(int64_t place) {
        return place / D::STEP * D::STEP + column_at<D>(place % D::STEP);
    }
    static int64_t offset(int64_t place, int64_t slot, int64_t tokens) {
        return place / PER_LANE * PER_LANE * tokens + slot * PER_LANE + place % PER_LANE;
    }
    static Packed convert(X v) { return Products::convert(v); }

    // sums[r][n] += R rows of weights, `stride` apart, times N vectors of the panel, `tokens`
    // apart, over `places`; times scale[r] if SCALED_SUMS.
    template <int R, int N>
    static void multiply_block(const Packed* weights, int64_t stride, const Packed* x,
                               int64_t tokens, int64_t places, float* sums, const float* scale) {
        Vec sum[R][N] = {};
        for (int64_t place = 0; place < places; place += PER_LANE, x += tokens * PER_LANE) {
            typename Products::Op xs[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) xs[n] = Products::load(x + n * LANES * PER_LANE);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const auto w = Products::broadcast(weights + r * stride + place);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) Products::add(sum[r][n], w, xs[n]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            Vec* const to = (Vec*)(sums + r * tokens);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) to[n] += SCALED_SUMS ? sum[r][n] * scale[r] : sum[r][n];
        }
    }
    static constexpr int block_rows(int vectors) { return 2 * vectors > MOST ? ROWS : 2 * ROWS; }
    using Block = decltype(&multiply_block<1, 1>);
    template <size_t... N>
    static constexpr std::array<Block, MOST + 1> blocks(std::index_sequence<N...>) {
        return {nullptr, multiply_block<block_rows(N + 1), N + 1>...};
    }

    // A row's weights of the steps from `step` to `last`, in the decoder's order.
    template <int HALF> static void decode(D& weights, const Row& row, int64_t step, int64_t last,
                                           const Scales<D>& scales, Packed* to) {
        for (; step < last; ++step) {
            weights.template start<HALF>(MASKED ? row.mask[step] : 0);
#pragma GCC unroll 8
            for (int k = 0; k < D::VECTORS; ++k, to += Products::COLUMNS) {
                auto w = weights.vector(k);
                if constexpr (D::FACTOR != 0 && !SCALED_SUMS) w *= scales.of_weights(step, k);
                *(typename Products::Op*)to = w;
            }
        }
    }

    [[gnu::noinline]] void multiply(int64_t expert, int64_t first, int64_t last,
                                    const uint8_t* packed) const {
        for (int64_t t = 0; t < call.count(expert); t += PANEL_TOKENS)
            multiply(expert, t, first, last, (const Packed*)packed + t * this->width);
    }

    void multiply(int64_t expert, int64_t token, int64_t first, int64_t last,
                  const Packed* x) const {
        static constexpr auto BLOCKS = blocks(std::make_index_sequence<MOST>());
        thread_local Buffer tile_buffer, sums_buffer, numbers_buffer, decoders_buffer;
        Pool& pool = call.pool;
        const int64_t count = min(PANEL_TOKENS, call.count(expert) - token), rows = last - first;
        const int64_t padded = round_up(rows, 2 * ROWS), steps = this->width / D::STEP;
        const int64_t half = D::HALVES == 1 ? steps : min(pool.half / D::STEP, steps);
        const int64_t group = SCALED_SUMS ? pool.group / D::STEP : steps;
        const int64_t bytes = D::STEP * this->panel(count) * sizeof(Packed);
        const int64_t most = max(1, TILE_X / bytes), stride = most * D::STEP + 64 / sizeof(Packed);
        Packed* const tile = tile_buffer.get<Packed>(padded * stride);
        float* const sums = sums_buffer.get<float>(padded * this->whole(count));
        std::memset(sums, 0, padded * this->whole(count) * sizeof(float));
        const int64_t size = Scales<D>::size(pool);
        float* const numbers = numbers_buffer.get<float>(rows * size);
        auto* const weights = decoders_buffer.get<D>(rows);
        if constexpr (D::FACTOR != 0)
            for (int64_t r = 0; r < rows; ++r)
                Scales<D>::fill(pool, pool.row(pool.version(expert, first + r)),
                                numbers + r * size);

        for (int64_t step = 0; step < steps;) {
            int64_t end = min(steps, min(step + most, (step / group + 1) * group));
            if (step < half) end = min(end, half);
            for (int64_t r = 0; r < rows; ++r) {
                const Row row = pool.row(pool.version(expert, first + r));
                if (step == 0 || step == half) weights[r] = D(row.values);
                const int32_t later = pool.version(expert, first + min(r + ROWS_AHEAD, rows - 1));
                fetch(pool.record(later) + pool.bytes / pool.versions * step / steps,
                      pool.bytes / pool.versions * (end - step) / steps / 64 + 1);
                const Scales<D> scales = Scales<D>(pool, numbers + r * size);
                if (step < half) decode<0>(weights[r], row, step, end, scales, tile + r * stride);
                else if constexpr (D::HALVES == 2)
                    decode<1>(weights[r], row, step, end, scales, tile + r * stride);
            }
            float scale[PANEL_ROWS + 2 * ROWS] = {};
            for (int64_t r = 0; SCALED_SUMS && r < rows; ++r)
                scale[r] = numbers[r * size + step / group];
            for (int64_t t = 0; t < count; t += PANEL) {
                const int64_t tokens = this->panel(count - t);
                const Packed* const panel = x + t * this->width + step * D::STEP * tokens;
                for (int64_t n = 0; n < tokens / LANES; n += MOST) {
                    const int64_t vectors = min(MOST, tokens / LANES - n);
                    for (int64_t r = 0; r < rows; r += block_rows(vectors))
                        BLOCKS[vectors](tile + r * stride, stride, panel + n * LANES * PER_LANE,
                                        tokens, (end - step) * D::STEP,
                                        sums + t * padded + r * tokens + n * LANES, scale + r);
                }
            }
            step = end;
        }
        this->unpack(expert, token, count, first, last, sums, padded);
    }
};

}  // namespace
