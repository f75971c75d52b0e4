// Many tokens of one expert: nothing is expanded and zeros cost nothing.
//
// Vectors lie along the tokens: each kept weight is broadcast and multiplied with its column of x,
// for up to 64 tokens at once, whose sums stay in registers. x is packed for it once per call:
// panels of 64 tokens, [columns][tokens].

#pragma once

#include <array>
#include <utility>
#include <vector>

#include "cpu_common.h"
#include "cpu_products.h"

namespace {

constexpr int64_t WORD = 64;           // columns that are packed at a time
constexpr int64_t PANEL_ROWS = 128;    // the most of one call: they share each visit of x to L1
constexpr int64_t PANEL_TOKENS = 512;  // whose sums stay in L2
constexpr int64_t ROWS_AHEAD = 8;      // that are fetched while one is read

template <class V> struct Panels {
    using P = Products<V>;
    using X = typename P::X;
    using W = typename P::W;
    static constexpr int64_t WIDE = P::WIDE, PANEL = WIDE * P::MOST;  // tokens

    const Call<V>& call;
    const int64_t min_tokens, width;  // columns, rounded up to words
    const X* packed;
    const int64_t* begin;  // of each expert's panels in `packed`

    // For the experts that have at least `tokens` tokens: packs their x.
    Panels(const Call<V>& call, int64_t tokens)
        : call(call), min_tokens(tokens), width((call.in + WORD - 1) / WORD * WORD) {
        thread_local Buffer buffer;
        thread_local std::vector<int64_t> begins;
        const int64_t size = call.place(
            begins, [&](int64_t e) { return take(e) ? width * whole(call.count(e)) : 0; });
        X* const to = (X*)buffer.get(size * sizeof(X));
        packed = to, begin = begins.data();
        pack(to);
    }

    bool take(int64_t expert) const { return call.count(expert) >= min_tokens; }

    static int64_t whole(int64_t tokens) { return (tokens + WIDE - 1) / WIDE * WIDE; }
    // Tokens of the first panel of so many.
    static int64_t panel(int64_t tokens) { return min(PANEL, whole(tokens)); }

    void pack(X* to) const {
        struct Item {  // a panel: an expert, and which of its tokens is the first
            int64_t expert, first;
        };
        thread_local std::vector<Item> items;
        items.clear();
        for (int64_t e = 0; e < call.experts; ++e)
            for (int64_t first = 0; take(e) && first < call.count(e); first += PANEL)
                items.push_back({e, first});
        const Item* const item = items.data();  // of this thread
        const int64_t words = width / WORD, work = int64_t(items.size()) * words;
#pragma omp parallel for num_threads(call.threads) if (work > 64)
        for (int64_t i = 0; i < work; ++i) {
            const auto [expert, first] = item[i / words];
            const int64_t column = i % words * WORD,
                          tokens_wide = panel(call.count(expert) - first);
            const int32_t* tokens = call.order + call.begins[expert];
            X* at = to + begin[expert] + first * width + column * tokens_wide;
            for (int64_t slot = 0; slot < tokens_wide; ++slot) {
                const int64_t token = first + slot / WIDE * WIDE + P::token(slot % WIDE);
                // the last token again where there is none: nobody stores its sums
                const V* x = call.x + tokens[min(token, call.count(expert) - 1)] * call.in + column;
                for (int64_t c = 0; c < min(WORD, call.in - column); ++c)
                    at[c * tokens_wide + slot] = P::x(x[c]);
            }
        }
    }

    // Columns of a panel whose x stays in cache while the rows go by (evals/LOG.md of 2026-11-26).
    // One panel waits for the rows, and reads them best in long parts; the sparser they are, the
    // longer. With more panels the time goes into multiplying, out of a cache nearby.
    int64_t columns_at_once(int64_t count) const {
        const int64_t kib = count > PANEL ? 48 : min(192, int64_t(20 / (call.density + 0.01)));
        const int64_t bytes =
            kib * 16 * sizeof(X) * WIDE;  // half of it where vectors are half as wide
        return bytes / (panel(count) * int64_t(sizeof(X))) / 8 * 8;
    }

    // The hardware does not foresee a part of a row, and less where the row lies that comes next.
    static void fetch(const void* from, int64_t lines) {
        for (int64_t line = 0; line < lines; ++line)
            __builtin_prefetch((const char*)from + 64 * line);
    }

    using Add = void (*)(const uint16_t*, const W*, int64_t, const X*, float*);
    template <size_t... N>
    static constexpr std::array<Add, sizeof...(N) + 1> adds(std::index_sequence<N...>) {
        return {nullptr, P::template add<N + 1>...};
    }
    static constexpr auto ADD =
        adds(std::make_index_sequence<P::MOST>());  // by the number of vectors

    // A range of output rows for all of the expert's tokens.
    void multiply(int64_t expert, int64_t first, int64_t last) const {
        for (int64_t t = 0; t < call.count(expert); t += PANEL_TOKENS)
            multiply(expert, t, first, last);
    }

    // Columns whose x fits the cache at a time: list the kept weights of all rows, multiply them
    // with panel after panel.
    void multiply(int64_t expert, int64_t token, int64_t first, int64_t last) const {
        const X* const x = packed + begin[expert] + token * width;
        thread_local Buffer columns_buffer, weights_buffer, sums_buffer;
        const int32_t *map = call.row_map + expert * call.out,
                      *tokens = call.order + call.begins[expert] + token;
        const int64_t rows = last - first, count = min(PANEL_TOKENS, call.count(expert) - token);
        const int64_t chunk = columns_at_once(count),
                      lines = int64_t(call.density * chunk) * sizeof(V) / 64 + 1;
        auto* columns = (uint16_t*)columns_buffer.get((rows * chunk + LISTED) * sizeof(uint16_t));
        auto* converted = (W*)weights_buffer.get((rows * chunk + 8) * sizeof(W));
        auto* sums =
            (float*)sums_buffer.get(rows * whole(count) * sizeof(float));  // [panel][row][token]
        std::memset(sums, 0, rows * whole(count) * sizeof(float));
        const V* values[PANEL_ROWS];
        const W* weights[PANEL_ROWS];
        for (int64_t r = 0; r < rows; ++r) values[r] = call.values + call.starts[map[first + r]];

        for (int64_t column = 0; column < call.in; column += chunk) {
            const int64_t end = min(call.in, column + chunk);
            int64_t begin[PANEL_ROWS + 1] = {0};
            for (int64_t r = 0; r < rows; ++r) {
                fetch(values[min(r + ROWS_AHEAD, rows - 1)], lines);
                fetch(call.mask + map[min(first + r + ROWS_AHEAD, last - 1)] * call.mask_bytes() +
                          column / 8,
                      chunk / 512 + 1);
                const uint8_t* mask = call.mask + map[first + r] * call.mask_bytes();
                const int64_t kept = list_kept(mask, column, end, columns + begin[r]);
                weights[r] = P::weights(values[r], kept, converted + begin[r]);
                values[r] += kept;
                begin[r + 1] = begin[r] + kept;
            }
            for (int64_t t = 0; t < count; t += PANEL) {
                const int64_t tokens_wide = panel(count - t);
                for (int64_t r = 0; r < rows; ++r)
                    ADD[tokens_wide / WIDE](columns + begin[r], weights[r], begin[r + 1] - begin[r],
                                            x + t * width + column * tokens_wide,
                                            sums + t * rows + r * tokens_wide);
            }
        }
        for (int64_t t = 0; t < count; ++t) {
            const int64_t begin = t / PANEL * PANEL, tokens_wide = panel(count - begin);
            const float* from = sums + begin * rows + t % PANEL;
            for (int64_t r = 0; r < rows; ++r)
                store(call.y + tokens[t] * call.out + first + r, from[r * tokens_wide]);
        }
    }
};

}  // namespace
