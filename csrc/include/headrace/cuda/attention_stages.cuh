// How a warp of the decode attention gets its tokens: by asynchronous copies, some tiles ahead.
#pragma once

#include "headrace/cuda/attention_plan.cuh"

namespace headrace::cuda {

constexpr int WARPS = 4, ATTENTION_THREADS = 32 * WARPS;
constexpr int WARP_TOKENS = TILE / WARPS;
constexpr int MAX_GROUP = 16;
constexpr float LOG2_E = 1.4426950408889634F;

// Strides of q and out count elements, those of the cache bytes.
template <class T>
struct Decode {
    const T* q;  // [rows, heads, D]
    T* out;
    const uint8_t* cache;
    const int* block_table;
    const int* counts;
    const Item* items;
    float* partials;  // [capacity, heads, D]
    Sum* sums;        // [capacity, heads]
    int64_t q_stride, out_stride, block_stride, kv_stride, head_stride, table_stride;
    int kv_heads, group, page_size;
    float scale;     // times log2 e
    float soft_cap;  // 0: none
};

template <int D, class C>
struct Stage {
    static constexpr bool SCALED = sizeof(C) == 1;
    static constexpr int ROW = D * static_cast<int>(sizeof(C));
    static constexpr int VECTORS = ROW / 16;
    static constexpr int VALUES = WARP_TOKENS * ROW;
    static constexpr int SCALES = SCALED ? WARP_TOKENS * 4 : 0;
    // Keys, values, scales of keys, scales of values.
    static constexpr int BYTES = 2 * (VALUES + SCALES);
    // A warp keeps 16 to 24 KB under way.
    static constexpr int COUNT = ROW == 256 ? 3 : ROW == 128 ? 5 : 8;
    static_assert(ROW >= 64 && ROW <= 256 && (ROW & (ROW - 1)) == 0);

    // Where vector `column` of a token's row is: eight rows of one column, as a matrix is read,
    // are in different banks.
    static HEADRACE_HOST_DEVICE int offset(int row, int column) {
        const int swap = ROW >= 128 ? row % 8 : row / 2 % 4;
        return row * ROW + (column ^ swap) * 16;
    }
};

// Walks the tiles that this warp copies, over all items of its block.
template <int D, class T, class C>
struct Loader {
    using S = Stage<D, C>;
    const Decode<T>& p;
    uint8_t* const stages;
    const int works, lane, first_token;
    int work, head = 0, token = 0, end = 0, lowest = 0, stage = 0, block = 0, first_page = 0;
    const int* table = nullptr;

    HEADRACE_DEVICE Loader(const Decode<T>& params, uint8_t* memory, int count, int warp)
        : p(params),
          stages(memory),
          works(count),
          lane(static_cast<int>(threadIdx.x) % 32),
          first_token(warp * WARP_TOKENS),
          work(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

    HEADRACE_DEVICE bool advance() {
        token += TILE;
        if (token < end) {
            if (token % CHUNK == 0) find_blocks();
            return true;
        }
        work += static_cast<int>(gridDim.x);
        if (work >= works) {
            work = works;  // It stays behind the end, and so does the token.
            return false;
        }
        const Item item = p.items[work / p.kv_heads];
        head = work % p.kv_heads;
        token = item.begin;
        end = item.end;
        lowest = item.lowest;
        table = p.block_table + item.request * p.table_stride;
        find_blocks();
        return true;
    }

    // Lane i reads the number of page i of this chunk, of which there are at most 32.
    HEADRACE_DEVICE void find_blocks() {
        first_page = token / CHUNK * CHUNK / p.page_size;
        const int page = first_page + lane;
        const bool exists = int64_t{page} * p.page_size < end;
        block = exists ? table[page] : 0;
    }

    // Starts the copy of the next tile, if there is one; it is a group of its own in any case.
    HEADRACE_DEVICE void start_next() {
        if (advance()) copy_tile();
        copy_async_commit();
    }

    HEADRACE_DEVICE void copy_tile() {
        const int begin = token + first_token, page = begin / p.page_size;
        const int slot = begin - page * p.page_size;
        // Behind the end there may be no page; nothing is read then.
        const int64_t number = shuffle(block, (page - first_page) & 31);
        const uint8_t* const keys = p.cache + number * p.block_stride + head * p.head_stride;
        uint8_t* const to = stages + stage * S::BYTES;
        stage = stage + 1 == S::COUNT ? 0 : stage + 1;
        HEADRACE_UNROLL
        for (int i = 0; i < S::VECTORS * WARP_TOKENS / 32; ++i) {
            const int vector = i * 32 + lane, row = vector / S::VECTORS,
                      column = vector % S::VECTORS;
            const bool exists = begin + row < end && begin + row >= lowest;
            const uint8_t* const from = keys + (slot + row) * S::ROW + column * 16;
            copy_async_16(to + S::offset(row, column), from, exists);
            copy_async_16(to + S::VALUES + S::offset(row, column), from + p.kv_stride, exists);
        }
        if constexpr (S::SCALED) {
            // Four scales of keys each, lanes 0 to 3, and of values, lanes 4 to 7.
            if (lane < 8) {
                const int four = lane % 4 * 4;
                const uint8_t* const from =
                    keys + (lane / 4) * p.kv_stride + p.page_size * S::ROW + (slot + four) * 4;
                copy_async_16(to + 2 * S::VALUES + lane * 16, from, begin + four < end);
            }
        }
    }
};

}  // namespace headrace::cuda
