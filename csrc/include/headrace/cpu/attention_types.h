// What the files of the attention kernel share: its arguments and its sizes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "headrace/cpu/isa.h"

namespace headrace::cpu::attention {

// The tokens of a tile; scores, running maximum and sums go from tile to tile.
constexpr int TILE = 64;
// The tokens of a split, whose result is one partial. Like TILE it decides in which order the sums
// of a row are added: what is computed never depends on how many splits a thread takes.
constexpr int SPLIT = 256;
constexpr int MAX_DIM = 256;
// Rows that share a tile: (query token, query head of the group) pairs.
constexpr int MAX_ROWS = 64;
constexpr int MAX_ROW_ELEMENTS = 8192;
constexpr float LOWEST = std::numeric_limits<float>::lowest();

// A ragged batch. Strides count elements.
struct Batch {
    const void* q;  // [T, heads, dim]
    int64_t q_stride;
    // [B, 2, kv_heads] pages: [page_size, dim] values, and behind int8 ones [page_size] floats, the
    // scales of their tokens.
    const void* kv_cache;
    int64_t block_stride, kv_stride, head_stride;
    const int32_t* query_start_loc;  // [requests + 1]
    const int32_t* seq_lens;         // [requests]
    const int32_t* block_table;      // [requests, at least what seq_lens needs]
    int64_t table_stride;
    int64_t requests, heads, kv_heads, page_size, dim;
    float scale;
    int32_t window;  // 0: none
    float soft_cap;  // 0: none
    std::byte* scratch;
    int64_t scratch_bytes;
    void* out;  // [T, heads, dim]
    int64_t out_stride;

    // Worked out once, because a division takes as long as a row of a tile: heads / kv_heads, and
    // the rows of a block.
    int64_t group, block_rows;

    static int64_t rows_that_fit(int64_t dim) {
        return std::min<int64_t>(MAX_ROWS, MAX_ROW_ELEMENTS / dim);
    }
    // Of the largest block of a request.
    int64_t block_rows_of(int64_t request) const {
        const int64_t queries = query_start_loc[request + 1] - query_start_loc[request];
        return std::min(block_rows, queries * group);
    }
};

// Tokens that are needed next: they are fetched bit by bit, among the work on others, because few
// lines can be on their way at a time.
struct Ahead {
    const void* const* tokens = nullptr;
    int64_t offset = 0;  // bytes from a pointer to what is fetched, and how many
    int64_t bytes = 0;
    int first = 0, last = 0;

    HEADRACE_INLINE void fetch(int begin, int end) const {
        for (int j = std::max(begin, first); j < std::min(end, last); ++j) {
            const char* const from = static_cast<const char*>(tokens[j]) + offset;
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
        }
    }
    // What step `step` of so many does.
    HEADRACE_INLINE void fetch_share(int step, int steps) const {
        const int share = (TILE + steps - 1) / steps;
        fetch(step * share, (step + 1) * share);
    }
    // Of several blocks of rows and columns the first does it.
    Ahead once(int64_t row, int64_t column) const { return row + column == 0 ? *this : Ahead{}; }
};

// Of the tokens of a tile in an int8 cache.
struct TokenScales {
    alignas(64) float keys[TILE];
    alignas(64) float values[TILE];
};

// Scores, maxima and weighted values of some rows over some tokens: values / sum is the result.
struct Partial {
    float* values;  // [rows, dim]
    float* max;     // [rows]
    float* sum;     // [rows]
};

}  // namespace headrace::cpu::attention
