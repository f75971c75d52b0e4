// Many tokens of one expert: vectors lie along the tokens, so each weight is broadcast and
// multiplied with its column of x for all of them, and zeros can be skipped.
//
// x is packed for it once per call, in panels of up to 64 tokens, [columns][tokens]. There are two
// ways through a panel: cpu_lists.h multiplies with the weights that are kept, cpu_tiles.h with all
// of a row's, decoded, in blocks of rows that share what they load.

#pragma once

#include <array>
#include <utility>

#include "cpu_call.h"
#include "cpu_vectors.h"

namespace {

constexpr int64_t PANEL = 64;          // tokens
constexpr int64_t PANEL_ROWS = 128;    // the most of an item of work: they share x in the caches
constexpr int64_t PANEL_TOKENS = 512;  // whose sums stay in L2
constexpr int64_t ROWS_AHEAD = 8;      // that are fetched while one is read

// The hardware does not foresee a part of a row, and less where the row lies that comes next.
inline void fetch(const void* from, int64_t lines) {
    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch((const char*)from + 64 * line);
}

// How panels are packed and unpacked. `Way` derives from it and gives
//   WIDE            tokens of the shortest panel
//   convert(v)      v as Packed       token(slot)  the token in a slot of a panel
//   column(place)   the column in a place of the panel, over the whole row
//   offset(place, slot, tokens)  where that is in a panel of so many tokens
template <class Way, class Packed> struct Panels {
    static constexpr int64_t MOST_ROWS = PANEL_ROWS;
    Call& call;
    const int64_t width;  // places: columns, rounded up

    Panels(Call& call, int64_t width) : call(call), width(width) {}

    static int64_t whole(int64_t tokens) { return round_up(tokens, Way::WIDE); }
    // Tokens of the first panel of so many.
    static int64_t panel(int64_t tokens) { return min(PANEL, whole(tokens)); }

    // Inputs are packed STRETCH places of a panel at a time, which hold as many columns.
    static constexpr int64_t STRETCH = 128;
    int64_t parts(int64_t expert) const {
        return divide_up(call.count(expert), PANEL) * divide_up(width, STRETCH);
    }
    int64_t packed_bytes(int64_t expert) const {
        return width * whole(call.count(expert)) * sizeof(Packed);
    }
    [[gnu::noinline]] void pack(int64_t expert, int64_t part, uint8_t* packed) const {
        const int64_t parts = divide_up(width, STRETCH), first = part / parts * PANEL;
        const int64_t count = call.count(expert), tokens = panel(count - first);
        const int64_t begin = part % parts * STRETCH, end = min(begin + STRETCH, width);
        auto* const to = (Packed*)packed + first * width;
        // Copied first: rows that lie a power of two apart would share few lines of the cache.
        X x[PANEL][STRETCH + 64 / sizeof(X)];
        for (int64_t slot = 0; slot < tokens; ++slot) {
            // the last token again where there is none: nobody stores its sums
            const int64_t token = min(first + Way::token(slot), count - 1);
            const X* const from = call.x + call.tokens(expert)[token] * call.pool.in + begin;
            const int64_t valid = max(0, min(STRETCH, call.pool.in - begin));
            std::memcpy(x[slot], from, valid * sizeof(X));
            std::memset(x[slot] + valid, 0, (STRETCH - valid) * sizeof(X));
        }
        for (int64_t place = begin; place < end; ++place) {
            const int64_t c = Way::column(place) - begin;
            for (int64_t slot = 0; slot < tokens; ++slot)
                to[Way::offset(place, slot, tokens)] = Way::convert(x[slot][c]);
        }
    }

    // Sums are [panel][row][token], of `rows` rows.
    void unpack(int64_t expert, int64_t token, int64_t count, int64_t first, int64_t last,
                const float* sums, int64_t rows) const {
        for (int64_t t = 0; t < count; ++t) {
            const int64_t begin = t / PANEL * PANEL;
            call.store_sums(call.tokens(expert)[token + t], first, last - first,
                            sums + begin * rows + t % PANEL, panel(count - begin));
        }
    }
};

}  // namespace
