// What is added to sums before they are rounded and written: the linear's bias, and that of the
// token's cluster, which is stored as integers with a scale for each neuron (format/clusters.py).

#pragma once

#include "cpu_common.h"

namespace {

typedef int8_t Integers8 __attribute__((vector_size(8)));

struct Biases {
    const X* bias;            // [out], or null
    const int8_t* values;     // [clusters, out], or null
    const Fp16* scale;        // [out], with values
    const int64_t* clusters;  // of each token; null: all tokens have the first
    int64_t out;

    explicit operator bool() const { return bias || values; }

    Biases from(int64_t token) const {
        Biases later = *this;
        if (clusters) later.clusters += token;
        return later;
    }

    // sums[r] of neurons first + r of a token, for a multiple of 8 of them that exist.
    void of(int64_t token, int64_t first, int64_t count, float* sums) const {
        const int8_t* const q =
            values ? values + (clusters ? clusters[token] * out : 0) + first : nullptr;
        for (int64_t r = 0; r < count; r += 8) {
            Float8 sum = {};
            if (bias) sum = load8(bias + first + r);
            if (q)
                sum += __builtin_convertvector(load_bits<Integers8>(q + r), Float8) *
                       load8(scale + first + r);
            *(Float8*)(sums + r) = sum;
        }
    }
    // The same for one neuron.
    float of(int64_t token, int64_t neuron) const {
        float sum = bias ? to_float(bias[neuron]) : 0;
        if (values)
            sum += float(values[(clusters ? clusters[token] * out : 0) + neuron]) *
                   to_float(scale[neuron]);
        return sum;
    }
};

}  // namespace
