// y = W[expert of the token] x over a row pool, on CPUs. Plain C++17 and OpenMP, no torch headers;
// called through ctypes.
//
// The row pool (see format/rowpool.py; padding and row starts are added by cpu.py): kept values,
// row after row; one bit per weight; where each row starts; which row each (expert, neuron) uses.
// Reading fewer bytes is the gain, so the work per weight must stay below the time memory takes to
// deliver it. Two ways, chosen here by the compiler's predefined macros, for each type of values:
// cpu_avx512.h where the CPU expands packed values in one instruction, cpu_avx2.h elsewhere.

#include <vector>

#include "cpu_avx2.h"
#include "cpu_avx512.h"
#include "cpu_router.h"

namespace {

constexpr const char* INSTRUCTIONS =
#if defined(__AVX512VBMI2__) && defined(__AVX512BF16__)
    "avx512-vbmi2-bf16";
#elif defined(__AVX512VBMI2__)
    "avx512-vbmi2";
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    "avx2";
#else
    "plain";
#endif

// The tokens of a batch, expert by expert, and where each expert's begin; `chosen` is null if there
// is one expert.
struct Groups {
    std::vector<int32_t> order;
    std::vector<int64_t> begins;

    void sort(const int64_t* chosen, int64_t tokens,
              int64_t experts) {  // by counts, running sums, and placing backwards
        order.resize(tokens);
        begins.assign(experts + 1, 0);
        for (int64_t t = 0; t < tokens; ++t) ++begins[chosen ? chosen[t] : 0];
        for (int64_t e = 0, sum = 0; e <= experts; ++e) {
            sum += begins[e];
            begins[e] = sum;
        }
        for (int64_t t = tokens - 1; t >= 0; --t)
            order[--begins[chosen ? chosen[t] : 0]] = int32_t(t);
    }
};

template <class V> void linear(const void* x, const int64_t* chosen, int64_t tokens, int64_t in,
                               int64_t out, int64_t experts, const void* values,
                               const uint8_t* mask, const uint32_t* starts, const int32_t* row_map,
                               void* y, double density, int threads) {
    thread_local Groups groups;
    constexpr int64_t batch = 1024;  // bounds the packed x, which is kept
    for (int64_t t = 0; t < tokens; t += batch) {
        const int64_t count = tokens - t < batch ? tokens - t : batch;
        groups.sort(chosen ? chosen + t : nullptr, count, experts);
        const Call<V> call{(const V*)x + t * in,
                           in,
                           out,
                           (const V*)values,
                           mask,
                           starts,
                           row_map,
                           (V*)y + t * out,
                           groups.order.data(),
                           groups.begins.data(),
                           experts,
                           density,
                           threads};
        if constexpr (HAS_EXPAND<V>) Avx512<V>{call}.run();
        else Avx2<V>{call}.run();
    }
}

}  // namespace

extern "C" {

const char* wexpand_instructions() { return INSTRUCTIONS; }

// y [tokens, out] = x [tokens, in] times the rows of each token's expert. `chosen` [tokens], or
// null for the first expert. type: 0 float32, 1 bfloat16, 2 float16. density: kept weights over
// all, which decides the way only. Returns 0, or 1 if a chosen expert does not exist (y is then not
// written).
int wexpand_linear(int type, const void* x, const int64_t* chosen, int64_t tokens, int64_t in,
                   int64_t out, int64_t experts, const void* values, const uint8_t* mask,
                   const uint32_t* starts, const int32_t* row_map, void* y, double density,
                   int threads) {
    for (int64_t t = 0; chosen && t < tokens; ++t)
        if (chosen[t] < 0 || chosen[t] >= experts) return 1;
    const auto call = type == 0 ? linear<float> : type == 1 ? linear<Bf16> : linear<Fp16>;
    call(x, chosen, tokens, in, out, chosen ? experts : 1, values, mask, starts, row_map, y,
         density, threads);
    return 0;
}

// logits [tokens, experts] = x [tokens, in] times weight [experts, in]. x_type as above,
// weight_type 0 or 2.
void wexpand_logits(int x_type, int weight_type, const void* x, const void* weight, int64_t tokens,
                    int64_t in, int64_t experts, float* y, int threads) {
    const auto call = weight_type == 0 ? (x_type == 0   ? logits<float, float>
                                          : x_type == 1 ? logits<Bf16, float>
                                                        : logits<Fp16, float>)
                                       : (x_type == 0   ? logits<float, Fp16>
                                          : x_type == 1 ? logits<Bf16, Fp16>
                                                        : logits<Fp16, Fp16>);
    call(x, weight, tokens, in, experts, y, threads);
}

}  // extern "C"
