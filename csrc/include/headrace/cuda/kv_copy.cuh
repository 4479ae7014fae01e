// Copies blocks within a device's memory, or between it and pinned memory, in vectors of 16 bytes.
#pragma once

#include "headrace/cuda/simt.cuh"

namespace headrace::cuda {

struct alignas(16) Vector16 {
    uint32_t words[4];
};

// Strides and sizes are in vectors.
struct BlockCopy {
    const Vector16* src;
    Vector16* dst;
    const int64_t* pairs;  // [N, 2]: source and destination of each copy
    int64_t src_stride, dst_stride, src_blocks, dst_blocks, size;
};

constexpr int COPY_THREADS = 256;
// Loads in flight of a thread: 4 KB of a warp hide the latency with 8 warps a multiprocessor.
constexpr int COPY_UNROLL = 8;
constexpr int COPY_CHUNK = COPY_THREADS * COPY_UNROLL;

// grid: [N, ceil(size / COPY_CHUNK)]. A pair with a number that is no block copies nothing.
HEADRACE_KERNEL void copy_blocks(BlockCopy c) {
    const int64_t from = c.pairs[2 * int64_t{blockIdx.x}];
    const int64_t to = c.pairs[2 * int64_t{blockIdx.x} + 1];
    if (from < 0 || from >= c.src_blocks || to < 0 || to >= c.dst_blocks) return;
    const Vector16* const src = c.src + from * c.src_stride;
    Vector16* const dst = c.dst + to * c.dst_stride;
    const int64_t begin = int64_t{blockIdx.y} * COPY_CHUNK + threadIdx.x;
    Vector16 values[COPY_UNROLL];
    HEADRACE_UNROLL
    for (int i = 0; i < COPY_UNROLL; ++i) {
        if (begin + i * COPY_THREADS < c.size) values[i] = src[begin + i * COPY_THREADS];
    }
    HEADRACE_UNROLL
    for (int i = 0; i < COPY_UNROLL; ++i) {
        if (begin + i * COPY_THREADS < c.size) dst[begin + i * COPY_THREADS] = values[i];
    }
}

}  // namespace headrace::cuda
