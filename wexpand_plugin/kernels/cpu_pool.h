// The row pool in memory: one block that begins with a `Pool`, filled once when a layer is loaded.
//
// A row version is a record, so that one stream of memory feeds a row:
//
//   scales   float16 [scales], then up to a multiple of 8 bytes      integer values only
//   mask     a bit a column, in words of 64                          none where rows are full
//   values   the kept ones; of full rows all columns, and zeros up to a multiple of FULL_COLUMNS
//
// Sparse int4 are not in the checkpoint's order. The low halves of the bytes hold what is kept of
// the row's first columns, up to `Pool::half`, the high halves what is kept of the others: so the
// values of 64 columns begin at a byte, and nothing but a shift makes bytes of them. Where one half
// of the row keeps more weights than the other, that many half bytes stay empty. Sparse rows of
// fewer bits come as int4, which hold the same numbers (cpu.py).
//
// Full rows are in the checkpoint's order. Eight columns of b bits are b bytes of a stream, which a
// vector's 32-bit lane, or four columns a 16-bit lane, takes whole: one shuffle, or widening, for
// 128 columns, and then as with int4.

#pragma once

#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu_common.h"

namespace {

constexpr int64_t WORD = 64;           // columns of a word of the mask
constexpr int64_t FULL_COLUMNS = 128;  // the longest step over a full row
constexpr int64_t PADDING = 128;       // bytes behind the last record that may be read

struct Row {
    const uint16_t* scales;
    const uint64_t* mask;
    const uint8_t* values;
};

struct Pool {
    // written by cpu.py
    int64_t type;    // of the values
    int64_t masked;  // or full rows
    int64_t group;   // columns that share a scale, 0 without scales; divides FULL_COLUMNS or is
                     // a multiple of it
    int64_t in, out, experts, versions;
    // written by `measure`
    int64_t bytes;  // of the block
    int64_t kept, scales, half;
    int64_t firsts_at, map_at, starts_at, records_at;  // bytes from here
    int64_t mask_at, values_at;                        // bytes from a record's begin

    int32_t* firsts() { return (int32_t*)((uint8_t*)this + firsts_at); }    // [out]
    uint8_t* map() { return (uint8_t*)this + map_at; }                      // [experts, out]
    uint32_t* starts() { return (uint32_t*)((uint8_t*)this + starts_at); }  // [versions], 8 bytes
    // The row version that an expert uses for a neuron.
    int32_t version(int64_t expert, int64_t neuron) {
        return firsts()[neuron] + map()[expert * out + neuron];
    }
    uint8_t* record(int64_t version) {
        return (uint8_t*)this + records_at + 8 * int64_t(starts()[version]);
    }
    Row row_at(const uint8_t* at) const {
        return {(const uint16_t*)at, (const uint64_t*)(at + mask_at), at + values_at};
    }
    Row row(int64_t version) { return row_at(record(version)); }
    double density() const { return double(kept) / (double(versions) * double(in)); }
};

// ---- Making one.

struct Source {  // the tensors of a format.RowPool, with its first_versions
    const uint8_t* values;
    const uint8_t* mask;
    const uint16_t* scales;
    const int32_t* firsts;
    const uint8_t* map;  // null: zeros
};

// Kept weights of one row from a column, that begins a byte of the mask, to another.
inline int64_t count_kept(const uint8_t* mask, int64_t first, int64_t end) {
    int64_t kept = 0;
    for (int64_t c = first; c < end; c += 8) {
        const int valid = end - c < 8 ? (1 << (end - c)) - 1 : 255;
        kept += __builtin_popcount(mask[c / 8] & valid);
    }
    return kept;
}

struct Sizes {               // of one row version
    int64_t low, kept;       // weights: before Pool::half, and all
    int64_t stored, record;  // bytes: of the values in the checkpoint, and of the record

    Sizes(const Pool& pool, const Source& source, int64_t version) {
        constexpr int64_t BITS[] = {32, 16, 16, 8, 4, 3, 2};
        const int64_t bits = BITS[pool.type], half = min(pool.half, pool.in);
        int64_t values;
        if (pool.masked) {
            const uint8_t* const mask = source.mask + version * divide_up(pool.in, 8);
            low = count_kept(mask, 0, half);
            kept = low + count_kept(mask, half, pool.in);
            values = pool.type == INT4 ? max(low, kept - low) : kept * bits / 8;
        } else {
            low = half, kept = pool.in;
            values = round_up(pool.in, FULL_COLUMNS) * bits / 8;
        }
        stored = divide_up(kept * bits, 8);
        record = round_up(pool.values_at + values, 8);
    }
};

// Writes the sizes that follow from those that cpu.py wrote.
inline void measure(Pool& pool, const Source& source) {
    pool.scales = pool.group ? divide_up(pool.in, pool.group) : 0;
    pool.half = round_up(divide_up(pool.in, 2), WORD);
    pool.firsts_at = round_up(sizeof(Pool), 64);
    pool.map_at = pool.firsts_at + round_up(4 * pool.out, 64);
    pool.starts_at = pool.map_at + round_up(pool.experts * pool.out, 64);
    pool.records_at = pool.starts_at + round_up(4 * pool.versions, 64);
    pool.mask_at = round_up(2 * pool.scales, 8);
    pool.values_at = pool.mask_at + (pool.masked ? 8 * divide_up(pool.in, WORD) : 0);
    pool.kept = 0;
    pool.bytes = pool.records_at + PADDING;
    for (int64_t v = 0; v < pool.versions; ++v) {
        const Sizes sizes(pool, source, v);
        pool.kept += sizes.kept;
        pool.bytes += sizes.record;
    }
}

// Asks for large pages, before anything is written: each row and each part of it that is fetched
// ahead lies on another page of 4 KiB, whose address has to be looked up.
inline void prefer_large_pages(uint8_t* block, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 1 << 16;  // or less
    const uintptr_t begin = (uintptr_t(block) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (uintptr_t(block) + bytes) / PAGE * PAGE;
    if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // or does not matter
#endif
}

// Writes everything that follows a measured Pool.
inline void fill(Pool& pool, const Source& source) {
    prefer_large_pages((uint8_t*)&pool, pool.bytes);
    std::memset((uint8_t*)&pool + sizeof(Pool), 0, pool.bytes - sizeof(Pool));
    std::memcpy(pool.firsts(), source.firsts, 4 * pool.out);
    if (source.map) std::memcpy(pool.map(), source.map, pool.experts * pool.out);
    std::vector<int64_t> from(pool.versions);
    for (int64_t v = 0, values = 0, at = 0; v < pool.versions; ++v) {
        const Sizes sizes(pool, source, v);
        from[v] = values;
        pool.starts()[v] = uint32_t(at / 8);
        values += sizes.stored;
        at += sizes.record;
    }
#pragma omp parallel for
    for (int64_t v = 0; v < pool.versions; ++v) {
        const Sizes sizes(pool, source, v);
        const Row row = pool.row(v);
        const uint8_t* const values = source.values + from[v];
        auto* const to = (uint8_t*)row.values;
        if (pool.scales)
            std::memcpy((void*)row.scales, source.scales + v * pool.scales, 2 * pool.scales);
        if (pool.masked) {
            const int64_t bytes = divide_up(pool.in, 8);
            std::memcpy((void*)row.mask, source.mask + v * bytes, bytes);
        }
        if (!pool.masked || pool.type != INT4) {
            if (sizes.stored) std::memcpy(to, values, sizes.stored);
            continue;
        }
        for (int64_t k = 0; k < sizes.kept; ++k) {
            const int q = values[k / 2] >> 4 * (k % 2) & 15;
            to[k < sizes.low ? k : k - sizes.low] |= k < sizes.low ? q : q << 4;
        }
    }
}

}  // namespace
