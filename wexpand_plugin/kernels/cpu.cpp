// y = W[expert of the token] x over a row pool, on CPUs. Plain C++17 and OpenMP, no torch headers;
// called through ctypes.
//
// Reading fewer bytes is the gain, so the work per weight must stay below the time memory takes to
// deliver it. In the order in which one reads it:
//
//   cpu_common.h    number types                cpu_pool.h      the row pool in memory
//   cpu_vectors.h   vectors, their products     cpu_decoders.h  from a record to vectors of
//   weights:
//                                               cpu_avx512.h, cpu_avx2.h
//   cpu_few.h       few tokens of one expert: decode in registers
//   cpu_panels.h    many tokens: panels of x;   cpu_lists.h     ... times what is kept
//                                               cpu_tiles.h     ... times decoded rows
//   cpu_call.h      tokens by expert, threads   cpu_biases.h    what is added at the end
//   cpu_router.h    the router
//
// The compiler's predefined macros choose the instructions, and WEXPAND_X the type of x and y.

#include <utility>
#include <vector>

#include "cpu_avx2.h"
#include "cpu_avx512.h"
#include "cpu_few.h"
#include "cpu_lists.h"
#include "cpu_router.h"
#include "cpu_tiles.h"

namespace {

constexpr const char* INSTRUCTIONS =
#if defined(WEXPAND_AVX512) && defined(__AVX512BF16__)
    "avx512-vbmi2-bf16";
#elif defined(WEXPAND_AVX512)
    "avx512-vbmi2";
#elif defined(WEXPAND_AVX2)
    "avx2";
#else
    "plain";
#endif
constexpr Type TYPE_OF_X = std::is_same_v<X, float>  ? FLOAT32
                           : std::is_same_v<X, Bf16> ? BFLOAT16
                                                     : FLOAT16;

// Tokens of one expert from which lists, and tiles, are faster than what is faster for fewer. From
// measurements on Zen 5, that of AVX2 with its code on the same machine (evals/LOG.md of
// 2026-11-27).
constexpr int64_t NEVER = int64_t(1) << 62;

template <class V, bool PAIRS> int64_t lists_from(double density) {
    if (LANES == 8)
        return density > 0.75 ? NEVER : int64_t((IS_INTEGER<V> ? 10 : 5) + 19 * density);
    if (PAIRS && IS_INTEGER<V>) return density > 0.25 ? NEVER : int64_t(600 * density);
    if (PAIRS) return density > 0.38 ? NEVER : int64_t(16 + 20 * density);
    if (IS_INTEGER<V>) return density > 0.45 ? NEVER : int64_t(10 + 90 * density);
    return density > 0.6 ? NEVER : int64_t(4 + 12 * density + 90 * density * density);
}
template <class V, bool PAIRS> int64_t tiles_from(bool masked) {
    if (LANES == 8) return masked ? 17 : 8;
    return PAIRS ? 20 : 15;
}

template <class V, bool MASKED, class FewProducts, class TileProducts> void multiply(Call& call) {
    // int8 take longer to make pairs of, which pays for several tokens
    constexpr bool SUMS = HAS_PAIRS && std::is_same_v<V, Int8>;
    using FewestProducts = std::conditional_t<SUMS, Sums, FewProducts>;
    constexpr int64_t FEWEST = 4;
    const Few<V, MASKED, FewestProducts> fewest(call);
    const Few<V, MASKED, FewProducts> few(call);
    const Lists<std::conditional_t<MASKED, V, X>> lists(call);
    const Tiles<V, MASKED, TileProducts> tiles(call);
    const int64_t few_lists = lists_from<V, HAS_PAIRS>(call.pool.density());
    const int64_t few_tiles = tiles_from<V, HAS_PAIRS>(MASKED);
    // work(way) with the way that suits an expert's tokens
    const auto with_way = [&](int64_t expert, auto work) {
        const int64_t count = call.count(expert);
        if (MASKED && count >= few_lists) work(lists);
        else if (count >= few_tiles) work(tiles);
        else if (count > FEWEST) work(few);
        else work(fewest);
    };

    struct Part {
        int64_t expert, number;
    };
    thread_local std::vector<Part> parts;
    thread_local std::vector<int64_t> begins;
    thread_local Buffer buffer;
    parts.clear();
    begins.assign(call.experts, 0);
    int64_t bytes = 0, most = PANEL_ROWS;
    if (call.experts == 1) with_way(0, [&](const auto& way) { most = way.MOST_ROWS; });
    for (int64_t e = 0; e < call.experts; ++e)
        with_way(e, [&](const auto& way) {
            begins[e] = bytes;
            bytes += round_up(way.packed_bytes(e), 64);
            for (int64_t i = 0; i < way.parts(e); ++i) parts.push_back({e, i});
        });
    uint8_t* const packed = buffer.get<uint8_t>(bytes);
    const Part* const part = parts.data();  // of this thread: another would see its own
    const int64_t* const begin = begins.data();
    const int64_t number = int64_t(parts.size());
    const auto pack = [&](int64_t i) {
        with_way(part[i].expert, [&](const auto& way) {
            way.pack(part[i].expert, part[i].number, packed + begin[part[i].expert]);
        });
    };
    if (bytes > 1 << 16) {
#pragma omp parallel for num_threads(call.threads)
        for (int64_t i = 0; i < number; ++i) pack(i);
    } else {
        for (int64_t i = 0; i < number; ++i) pack(i);
    }
    call.share(most, [&](int64_t expert, int64_t first, int64_t last) {
        with_way(expert, [&](const auto& way) {
            way.multiply(expert, first, last, packed + begin[expert]);
        });
    });
}

template <class V, bool MASKED> void multiply(Call& call) {
    if constexpr (!HAS_PAIRS) {
        multiply<V, MASKED, Floats, Floats>(call);
    } else if constexpr (!IS_INTEGER<V>) {
        multiply<V, MASKED, Pairs, Pairs>(call);
    } else {
        // tiles of pairs scale sums over whole steps
        const bool whole_steps = call.pool.group >= Decoder<V, MASKED, Pairs>::STEP;
        if (whole_steps) multiply<V, MASKED, Pairs, Pairs>(call);
        else multiply<V, MASKED, Pairs, Floats>(call);
    }
}

template <class V> void multiply(Call& call) {
    if constexpr (!IS_ODD<V>)
        if (call.pool.masked) return multiply<V, true>(call);
    multiply<V, false>(call);
}

}  // namespace

extern "C" {

const char* wexpand_instructions() { return INSTRUCTIONS; }

// Bytes of the block that begins with `pool`, see cpu_pool.h, of which cpu.py wrote the sizes.
int64_t wexpand_pool_bytes(Pool* pool, const uint8_t* mask) {
    measure(*pool, {nullptr, mask, nullptr, nullptr, nullptr});
    return pool->bytes;
}

// Fills that block, behind its sizes, from the tensors of the checkpoint.
void wexpand_pool_fill(Pool* pool, const uint8_t* values, const uint8_t* mask,
                       const uint16_t* scales, const int32_t* firsts, const uint8_t* map) {
    const Source source{values, mask, scales, firsts, map};
    measure(*pool, source);
    fill(*pool, source);
}

// y [tokens, out] = x [tokens, in] times the rows of each token's expert, plus biases (see
// cpu_biases.h; each may be null). `chosen` [tokens], or null for the first expert. Returns what
// does not fit, and then writes nothing: 1 in, 2 out, 3 type of the values, 4 chosen, 5 cluster.
int wexpand_linear(Pool* pool, const X* x, const int64_t* chosen, int64_t tokens, int64_t in,
                   int64_t out, const X* bias, const int8_t* cluster_bias, const Fp16* scale,
                   const int64_t* cluster, int64_t clusters, X* y, int threads) {
    if (in != pool->in) return 1;
    if (out != pool->out) return 2;
    if (pool->type <= FLOAT16 && pool->type != TYPE_OF_X) return 3;
    for (int64_t t = 0; chosen && t < tokens; ++t)
        if (chosen[t] < 0 || chosen[t] >= pool->experts) return 4;
    for (int64_t t = 0; cluster && t < tokens; ++t)
        if (cluster[t] < 0 || cluster[t] >= clusters) return 5;
    const Biases biases{bias, cluster_bias, scale, cluster, out};
    constexpr int64_t BATCH = 1024;  // bounds the packed x, which is kept
    for (int64_t t = 0; t < tokens; t += BATCH) {
        Call call(*pool, x + t * in, y + t * out, biases.from(t), threads,
                  chosen ? chosen + t : nullptr, min(BATCH, tokens - t));
        if (pool->type == INT8) multiply<Int8>(call);
        else if (pool->type == INT4) multiply<Int4>(call);
        else if (pool->type == INT3) multiply<Int3>(call);
        else if (pool->type == INT2) multiply<Int2>(call);
        else multiply<X>(call);
    }
    return 0;
}

// logits [tokens, rows] = x [tokens, in] times weight [rows, in], float16 or else float32.
void wexpand_logits(int is_float16, const X* x, const void* weight, int64_t tokens, int64_t in,
                    int64_t rows, float* y, int threads) {
    if (is_float16) logits(x, (const Fp16*)weight, tokens, in, rows, y, threads);
    else logits(x, (const float*)weight, tokens, in, rows, y, threads);
}

// chosen [tokens] = cluster of each token of x [tokens, in], by a router of weight [parents +
// clusters, in], as above, and bias [parents + clusters].
void wexpand_route(int is_float16, const X* x, const void* weight, const float* bias,
                   int64_t tokens, int64_t in, int64_t parents, int64_t clusters, int64_t* chosen,
                   int threads) {
    constexpr int64_t BATCH = 1024;  // bounds the logits, which are kept
    const auto by = [&](auto* rows) {
        for (int64_t t = 0; t < tokens; t += BATCH)
            route(x + t * in, rows, bias, min(BATCH, tokens - t), in, parents, clusters,
                  chosen + t, threads);
    };
    if (is_float16) by((const Fp16*)weight);
    else by((const float*)weight);
}

}  // extern "C"
