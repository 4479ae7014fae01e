// What the files of the attention kernel share: its arguments and its sizes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

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
    const void* kv_cache;  // [B, 2, kv_heads, page_size, dim], a page contiguous
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

    int64_t group() const { return heads / kv_heads; }
    // Rows of a block, and of the largest one of a request.
    int64_t block_rows() const { return std::min<int64_t>(MAX_ROWS, MAX_ROW_ELEMENTS / dim); }
    int64_t block_rows_of(int64_t request) const {
        const int64_t queries = query_start_loc[request + 1] - query_start_loc[request];
        return std::min(block_rows(), queries * group());
    }
};

// Scores, maxima and weighted values of some rows over some tokens: values / sum is the result.
struct Partial {
    float* values;  // [rows, dim]
    float* max;     // [rows]
    float* sum;     // [rows]
};

}  // namespace headrace::cpu::attention
