// Rounds groups of inputs to 8 bits, each with its own scale: ops/quantization.py.
//
// A group is read twice, the second time from the cache: its maximum must be known before any of
// it is written. The result is exact: a maximum has no order, and every other step is one rounding.
#pragma once

#include "headrace/cuda/simt.cuh"

namespace headrace::cuda {

template <class Out>
constexpr float EIGHT_BIT_LIMIT = std::is_same_v<Out, int8_t> ? 127.0F : 448.0F;

// Of the largest magnitude of a group, NaN if there is one.
template <class Out>
HEADRACE_HOST_DEVICE float quantization_factor(float largest) {
    return largest > 0 ? EIGHT_BIT_LIMIT<Out> / largest : 0.0F;
}
template <class Out>
HEADRACE_HOST_DEVICE float quantization_scale(float largest) {
    return largest < HEADRACE_INFINITY ? largest / EIGHT_BIT_LIMIT<Out>
                                       : bit_cast<float>(0x7fc00000U);
}
template <class Out>
HEADRACE_HOST_DEVICE Out quantized(float x, float factor) {
    constexpr float LIMIT = EIGHT_BIT_LIMIT<Out>;
    const float value = x * factor;
    if (value != value) return from_float<Out>(0.0F);
    return from_float<Out>(value > LIMIT ? LIMIT : value < -LIMIT ? -LIMIT : value);
}

// Eight values, 16 or 32 bytes of input and 8 of output.
constexpr int QUANTIZE_VECTOR = 8;
template <class T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Values {
    T values[QUANTIZE_VECTOR];
};

// Strides count elements; x, out and their strides are multiples of a vector, and so is group_size.
template <class X, class Out>
struct Quantize {
    const X* x;
    Out* out;
    float* scale;  // [rows, groups]
    int64_t x_stride, out_stride, rows;
    int groups, group_size;
};

constexpr int QUANTIZE_THREADS = 256;

// The bits of a magnitude: as integers they are in the order of the numbers, NaN above all.
HEADRACE_HOST_DEVICE uint32_t magnitude_bits(float x) {
    return bit_cast<uint32_t>(x) & 0x7fffffffU;
}

HEADRACE_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// TEAM threads a group, 32 or all of the block; grid: [ceil(rows * groups / (256 / TEAM))].
template <int TEAM, class X, class Out>
HEADRACE_KERNEL void quantize_groups(Quantize<X, Out> q) {
    constexpr int TEAMS = QUANTIZE_THREADS / TEAM, WARPS = TEAM / 32;
    const int member = static_cast<int>(threadIdx.x) % TEAM;
    const int64_t number = int64_t{blockIdx.x} * TEAMS + threadIdx.x / TEAM;
    // All threads of a warp, or of a block, leave together.
    if (number >= q.rows * q.groups) return;
    const int64_t row = number / q.groups, begin = number % q.groups * q.group_size;
    const auto* const x = reinterpret_cast<const Values<X>*>(q.x + row * q.x_stride + begin);
    auto* const out = reinterpret_cast<Values<Out>*>(q.out + row * q.out_stride + begin);
    const int vectors = q.group_size / QUANTIZE_VECTOR;

    uint32_t largest = 0;
    HEADRACE_UNROLL_BY(4)
    for (int i = member; i < vectors; i += TEAM) {
        const Values<X> in = x[i];
        HEADRACE_UNROLL
        for (int k = 0; k < QUANTIZE_VECTOR; ++k)
            largest = larger(largest, magnitude_bits(to_float(in.values[k])));
    }
    HEADRACE_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) largest = larger(largest, shuffle_xor(largest, mask));
    if constexpr (WARPS > 1) {
        auto* const of_warps = reinterpret_cast<uint32_t*>(shared_memory());
        if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
        sync_threads();
        HEADRACE_UNROLL
        for (int warp = 0; warp < WARPS; ++warp) largest = larger(largest, of_warps[warp]);
    }

    const float extent = bit_cast<float>(largest);
    if (member == 0) q.scale[number] = quantization_scale<Out>(extent);
    const float factor = quantization_factor<Out>(extent);
    HEADRACE_UNROLL_BY(4)
    for (int i = member; i < vectors; i += TEAM) {
        const Values<X> in = x[i];
        Values<Out> result;
        HEADRACE_UNROLL
        for (int k = 0; k < QUANTIZE_VECTOR; ++k)
            result.values[k] = quantized<Out>(to_float(in.values[k]), factor);
        out[i] = result;
    }
}

// A group of one warp's vectors has no use for more threads.
template <class F>
void with_quantize_team(int group_size, F&& f) {
    if (group_size <= 4 * 32 * QUANTIZE_VECTOR)
        f(std::integral_constant<int, 32>{});
    else
        f(std::integral_constant<int, QUANTIZE_THREADS>{});
}

}  // namespace headrace::cuda
