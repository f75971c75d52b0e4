// Decoders: what turns a row version's record into vectors of weights.
//
// A Decoder<V, MASKED, Products> goes through a row of values V in steps of STEP columns. It gives
//
//   start<HALF>(word)  begins the next step, whose columns `word` of the mask keeps; HALF says
//                      which half bytes are read where a row has HALVES of them (cpu_pool.h)
//   vector(k)          the k-th of the step's VECTORS vectors of weights, in this order, each once;
//                      zero where nothing is kept
//   FACTOR             by which integers are too large: their scales take it up
//   INTERLEAVE, GRAIN  how columns lie in a step, GRAIN of them always together: the first
//                      INTERLEAVE of such begin its INTERLEAVE parts, the next continue them, and
//                      so on (`column_at`). Inputs are packed in the same order.
//   LANEWISE           whether each lane of a step's vectors holds neighbouring columns
//
// Vectors may be read up to 64 bytes past what is kept.

#pragma once

#include "cpu_pool.h"
#include "cpu_vectors.h"

namespace {

template <class V, bool MASKED, class Products> struct Decoder;

struct Unscaled {
    static constexpr int HALVES = 1;
    static constexpr float FACTOR = 0;  // no scales
};
struct Natural {  // columns in their own order
    static constexpr int INTERLEAVE = 1, GRAIN = 1;
    static constexpr bool LANEWISE = false;
};
template <int PARTS, int COLUMNS = 1> struct Interleaved {
    static constexpr int INTERLEAVE = PARTS, GRAIN = COLUMNS;
    static constexpr bool LANEWISE = true;
};

// The column, within a step, of a place in its vectors.
template <class D> constexpr int64_t column_at(int64_t place) {
    constexpr int64_t part = D::STEP / D::INTERLEAVE;
    return place % part / D::GRAIN * D::GRAIN * D::INTERLEAVE + place / part * D::GRAIN +
           place % D::GRAIN;
}

template <class D> int64_t padded_width(const Pool& pool) { return round_up(pool.in, D::STEP); }

// The scales of one row as numbers that sums, or weights, are multiplied with.
//
// Where groups are whole steps there is a number for each group. Where a step has several groups
// there is a number for every UNIT columns: those of a lane, or those of a vector.
template <class D> struct Scales {
    static constexpr int64_t UNIT = D::LANEWISE ? D::STEP / LANES : D::STEP / D::VECTORS;
    const float* numbers;
    int64_t group;  // in steps; 0 where a step has several

    Scales() = default;
    Scales(const Pool& pool, const float* numbers)
        : numbers(numbers), group(pool.group / D::STEP) {}

    // The size of `numbers`, a multiple of what is aligned, and what writes them for a row.
    static int64_t size(const Pool& pool) {
        return D::FACTOR == 0 ? 0 : round_up(pool.in, FULL_COLUMNS) / UNIT + 2 * FULL_COLUMNS;
    }
    static void fill(const Pool& pool, const Row& row, float* numbers) {
        const int64_t scales = pool.scales;
        const auto eight = [&](int64_t g) {
            return load8((const Fp16*)row.scales + g) * D::FACTOR;
        };
        if (pool.group >= D::STEP) {
            for (int64_t g = 0; g < scales; g += 8) *(Float8*)(numbers + g) = eight(g);
            return;
        }
        const int64_t repeat = pool.group / UNIT;
        for (int64_t g = 0; g < scales; ++g)
            // what is written too much is written again
            for (int64_t at = 0; at < repeat; at += 8)
                *(Float8*)(numbers + g * repeat + at) = eight(g / 8 * 8)[g % 8] - Float8{};
        // the last step may go on after the last group
        std::memset(numbers + scales * repeat, 0, D::STEP / UNIT * sizeof(float));
    }

    // For the sums over one step of several groups, or over the steps of one group.
    Vec of_step(int64_t step) const { return *(const UnalignedVec*)(numbers + step * LANES); }
    Vec of_group(int64_t number) const { return numbers[number] - Vec{}; }
    // For the k-th vector of a step's weights.
    Vec of_weights(int64_t step, int k) const {
        if (group) return of_group(step / group);
        return D::LANEWISE ? of_step(step) : numbers[step * D::VECTORS + k] - Vec{};
    }
};

}  // namespace
