// Random cases of the CPU kernel for a build with sanitizers, against sums in double: `make
// sanitize`. Every array has exactly the size that it should have, so that a read or write past
// one of them is found. No torch, no Python.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "../../wexpand_plugin/kernels/cpu.cpp"

namespace {

constexpr const char* TYPES[] = {"float32", "bfloat16", "float16", "int8", "int4", "int3", "int2"};
std::mt19937 bits;

int64_t below(int64_t end) { return int64_t(bits() % uint32_t(end)); }
template <size_t N> int64_t one_of(const int64_t (&numbers)[N]) { return numbers[below(N)]; }
float normal() { return std::normal_distribution<float>()(bits); }

// Exactly so many, where the sanitizer can see the end; of 64 bytes' alignment.
template <class T> struct Exact {
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> data;
    explicit Exact(int64_t count) {
        void* p = nullptr;
        if (posix_memalign(&p, 64, count * sizeof(T))) std::abort();
        std::memset(p, 0, count * sizeof(T));
        data.reset((T*)p);
    }
    T* get() const { return data.get(); }
    T& operator[](int64_t i) const { return data.get()[i]; }
};

// A row pool as the checkpoint has it, its weights, tokens, and what the kernel makes of them.
struct Case {
    Pool sizes{};
    int64_t tokens = one_of({0, 1, 1, 1, 2, 3, 4, 5, 6, 8, 9, 15, 17, 33, 70, 150, 530, 1030});
    int threads = int(1 + below(2));
    bool routed;
    std::vector<double> weights;  // [versions, in]

    Case() {
        sizes.type = one_of({TYPE_OF_X, INT8, INT4, INT4, INT3, INT2});
        sizes.in = one_of({1, 2, 7, 8, 15, 31, 63, 64, 65, 127, 128, 129, 172, 385, 640, 1100});
        sizes.out = one_of({1, 2, 3, 5, 16, 31, 70, 140});
        sizes.experts = one_of({1, 1, 2, 5, 16});
        if (sizes.type >= INT8) sizes.group = one_of({8, 16, 32, 64, 128, 128, 256, 384});
        sizes.masked = sizes.type < INT3 && (sizes.type <= FLOAT16 || below(3));
        routed = sizes.experts > 1 || below(2);
    }

    std::vector<int32_t> firsts;
    std::vector<uint8_t> map;
    void draw_rows() {
        for (int64_t n = 0; n < sizes.out; ++n) {
            firsts.push_back(int32_t(sizes.versions));
            sizes.versions += 1 + below(std::min<int64_t>(sizes.experts, 3));
        }
        for (int64_t e = 0; e < sizes.experts; ++e)
            for (int64_t n = 0; n < sizes.out; ++n) {
                const int64_t end = n + 1 < sizes.out ? firsts[n + 1] : sizes.versions;
                map.push_back(uint8_t(below(end - firsts[n])));
            }
    }

    // A weight, and its bytes or bits at the end of a row's.
    double draw(std::vector<uint8_t>& row, int64_t place) {
        if (sizes.type >= INT4) {
            const int few = sizes.type == INT4 ? 4 : sizes.type == INT3 ? 3 : 2;
            const int q = int(below(1 << few)) - (1 << few >> 1);
            for (int b = 0; b < few; ++b) {
                if ((place * few + b) % 8 == 0) row.push_back(0);
                row.back() |= uint8_t((q >> b & 1) << (place * few + b) % 8);
            }
            return few < 4 ? 2 * q + 1 : q;
        }
        if (sizes.type == INT8) {
            row.push_back(uint8_t(below(256)));
            return int8_t(row.back());
        }
        X value;
        store(&value, normal());
        row.resize(row.size() + sizeof(X));
        std::memcpy(&*row.end() - sizeof(X), &value, sizeof(X));
        return to_float(value);
    }

    double run(int number) {
        draw_rows();
        const int64_t in = sizes.in, scales = sizes.group ? divide_up(in, sizes.group) : 0;
        const int64_t mask_bytes = sizes.masked ? divide_up(in, 8) : 0;
        const int64_t density = one_of({0, 10, 20, 50, 90, 100});
        Exact<uint8_t> mask(mask_bytes * sizes.versions);
        Exact<uint16_t> scale(scales * sizes.versions);
        std::vector<uint8_t> all;
        weights.assign(sizes.versions * in, 0.0);
        for (int64_t v = 0; v < sizes.versions; ++v) {
            std::vector<uint8_t> row;
            const int64_t share = v % 5 == 0 ? 0 : v % 5 == 1 ? 100 : density;  // empty, full, some
            for (int64_t g = 0; g < scales; ++g)
                store((Fp16*)&scale[v * scales + g], below(9) ? std::abs(normal()) / 8 : 0.0f);
            for (int64_t c = 0, place = 0; c < in; ++c) {
                if (sizes.masked && below(100) >= share) continue;
                if (sizes.masked) mask[v * mask_bytes + c / 8] |= uint8_t(1 << c % 8);
                const double q = draw(row, place++);
                const double by =
                    scales ? to_float(*(Fp16*)&scale[v * scales + c / sizes.group]) : 1.0;
                weights[v * in + c] = q * by;
            }
            all.insert(all.end(), row.begin(), row.end());
        }
        Exact<uint8_t> values(int64_t(all.size()));
        std::copy(all.begin(), all.end(), values.get());

        Pool measured = sizes;
        Exact<uint8_t> block(wexpand_pool_bytes(&measured, sizes.masked ? mask.get() : nullptr));
        Pool* const pool = (Pool*)block.get();
        *pool = sizes;
        wexpand_pool_fill(pool, values.get(), sizes.masked ? mask.get() : nullptr,
                          scales ? scale.get() : nullptr, firsts.data(), map.data());
        return compare(pool, number);
    }

    // The largest difference, of the largest y.
    double compare(Pool* pool, int number) {
        const int64_t in = sizes.in, out = sizes.out;
        Exact<X> x(tokens * in), y(tokens * out);
        Exact<int64_t> chosen(tokens);
        for (int64_t i = 0; i < tokens * in; ++i) store(&x[i], normal());
        for (int64_t t = 0; t < tokens && routed; ++t) chosen[t] = below(sizes.experts);
        const int64_t* const experts = routed ? chosen.get() : nullptr;

        const int64_t clusters = one_of({0, 1, 7});  // 0: no biases of clusters
        Exact<int8_t> biases(clusters * out);
        Exact<Fp16> scale(out);
        Exact<X> bias(out);
        Exact<int64_t> cluster(tokens);
        const bool has_bias = below(2);
        for (int64_t i = 0; i < clusters * out; ++i) biases[i] = int8_t(below(256));
        for (int64_t n = 0; n < out; ++n) store(&scale[n], normal() / 64);
        for (int64_t n = 0; n < out && has_bias; ++n) store(&bias[n], normal());
        for (int64_t t = 0; t < tokens && clusters; ++t) cluster[t] = below(clusters);
        const int problem = wexpand_linear(
            pool, x.get(), experts, tokens, in, out, has_bias ? bias.get() : nullptr,
            clusters ? biases.get() : nullptr, clusters ? scale.get() : nullptr,
            clusters > 1 ? cluster.get() : nullptr, clusters, y.get(), threads);
        double largest = 1e-30, difference = 0;
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t n = 0; n < out; ++n) {
                const int64_t v = firsts[n] + map[chosen[t] * out + n];
                double sum = to_float(bias[n]);
                if (clusters) sum += to_float(scale[n]) * biases[cluster[t] * out + n];
                for (int64_t c = 0; c < in; ++c)
                    sum += weights[v * in + c] * to_float(x[t * in + c]);
                largest = std::max(largest, std::abs(sum));
                const double error = std::abs(to_float(y[t * out + n]) - sum);
                difference = std::max(difference, std::isnan(error) ? HUGE_VAL : error);
            }
        if (problem || difference > TOLERANCE * largest) {
            std::printf(
                "case %d: returned %d, differs by %g of %g\n  %s, %s rows, groups of %d, "
                "%d x %d, %d experts, %d tokens, %d threads\n",
                number, problem, difference, largest, TYPES[sizes.type],
                sizes.masked ? "masked" : "full", int(sizes.group), int(out), int(in),
                int(sizes.experts), int(tokens), threads);
            std::exit(1);
        }
        return difference / largest;
    }
    static constexpr double TOLERANCE = TYPE_OF_X == FLOAT32    ? 1e-5
                                        : TYPE_OF_X == BFLOAT16 ? 1e-2
                                                                : 2e-3;
};

// The router, on exact arrays: what it computes is tested elsewhere.
void route() {
    const int64_t tokens = below(6), in = one_of({1, 5, 8, 63, 256});
    const int64_t clusters = 1 + below(40), parents = below(2) ? 1 + below(clusters) : 0;
    const int64_t rows = parents + clusters;
    Exact<X> x(tokens * in);
    Exact<float> wide(rows * in), bias(rows), y(tokens * rows);
    Exact<Fp16> narrow(rows * in);
    Exact<int64_t> chosen(tokens);
    for (int64_t i = 0; i < tokens * in; ++i) store(&x[i], normal());
    for (int64_t i = 0; i < rows * in; ++i) wide[i] = normal(), store(&narrow[i], normal());
    wexpand_logits(0, x.get(), wide.get(), tokens, in, rows, y.get(), 2);
    wexpand_logits(1, x.get(), narrow.get(), tokens, in, rows, y.get(), 2);
    for (int is_float16 = 0; is_float16 < 2; ++is_float16)
        wexpand_route(is_float16, x.get(), is_float16 ? (void*)narrow.get() : wide.get(),
                      bias.get(), tokens, in, parents, clusters, chosen.get(), 2);
    for (int64_t t = 0; t < tokens; ++t)
        if (chosen[t] < 0 || chosen[t] >= clusters) std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
    const int cases = count > 1 ? std::atoi(arguments[1]) : 120;
    double worst = 0;
    for (int number = 0; number < cases; ++number) {
        bits.seed(uint32_t(number));
        worst = std::max(worst, Case().run(number));
        route();
    }
    std::printf("%s, x in %s: %d cases, at most %.1e from the reference\n", INSTRUCTIONS,
                TYPES[TYPE_OF_X], cases, worst);
}
