// The arguments of one call, its tokens in the order of their experts, and how threads share it.

#pragma once

#include <vector>

#include "cpu_biases.h"
#include "cpu_pool.h"

namespace {

struct Call {
    Pool& pool;
    const X* x;  // [tokens, in]
    X* y;        // [tokens, out]
    Biases biases;
    int threads;
    int64_t experts;              // 1 if none was chosen
    std::vector<int32_t> order;   // the tokens, expert by expert
    std::vector<int64_t> begins;  // [experts + 1] where each expert's tokens begin in `order`

    // Sorts the tokens: by counts, running sums, and placing backwards. `chosen` may be null.
    Call(Pool& pool, const X* x, X* y, Biases biases, int threads, const int64_t* chosen,
         int64_t tokens)
        : pool(pool), x(x), y(y), biases(biases), threads(threads) {
        experts = chosen ? pool.experts : 1;
        order.resize(tokens);
        begins.assign(experts + 1, 0);
        for (int64_t t = 0; t < tokens; ++t) ++begins[chosen ? chosen[t] : 0];
        for (int64_t e = 0, sum = 0; e <= experts; ++e) begins[e] = sum += begins[e];
        for (int64_t t = tokens - 1; t >= 0; --t)
            order[--begins[chosen ? chosen[t] : 0]] = int32_t(t);
    }

    int64_t count(int64_t expert) const { return begins[expert + 1] - begins[expert]; }
    const int32_t* tokens(int64_t expert) const { return order.data() + begins[expert]; }

    // y of a token and some neurons, from sums that are `stride` apart, and biases.
    void store_sums(int64_t token, int64_t first, int64_t count, const float* sums,
                    int64_t stride) const {
        X* const to = y + token * pool.out + first;
        if (!biases) {
            for (int64_t r = 0; r < count; ++r) store(to + r, sums[r * stride]);
            return;
        }
        constexpr int64_t SOME = 64;
        float some[SOME];
        int64_t r = 0;
        for (int64_t n; (n = min(SOME, (count - r) / 8 * 8)) > 0; r += n) {
            biases.of(token, first + r, n, some);
            for (int64_t i = 0; i < n; ++i) store(to + r + i, sums[(r + i) * stride] + some[i]);
        }
        for (; r < count; ++r) store(to + r, sums[r * stride] + biases.of(token, first + r));
    }

    // work(expert, first, last): every expert that has tokens, a range of at most `most` neurons at
    // a time, on all threads. While x fits the caches experts alternate over a range, as they share
    // row versions: what one reads from memory the next finds nearby. Of more tokens an expert's x
    // should stay near instead.
    template <class Work> void share(int64_t most, Work work) const {
        const int64_t some = pool.out / (4 * threads) / 4 * 4;  // a few items for each thread
        const int64_t rows = max(4, min(some, most)), chunks = divide_up(pool.out, rows);
        const bool alternate = int64_t(order.size()) * pool.in <= 1 << 20;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t item = 0; item < experts * chunks; ++item) {
            const int64_t expert = alternate ? item % experts : item / chunks;
            const int64_t first = (alternate ? item / experts : item % chunks) * rows;
            if (count(expert)) work(expert, first, min(first + rows, pool.out));
        }
    }
};

}  // namespace
