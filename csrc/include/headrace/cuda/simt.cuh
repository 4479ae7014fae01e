// What the CUDA kernels use of the machine: threads, shared memory, asynchronous copies, matrix
// instructions. A kernel that keeps to it also compiles for the host, where simt_host.h runs it.
//
// The layouts of ldmatrix and mma.sync are those of the PTX ISA, sections "ldmatrix" and
// "Matrix Fragments for mma.m16n8k16".
#pragma once

#include <cstdint>

#include "headrace/cuda/numbers.cuh"

#if defined(__CUDACC__)

#define HEADRACE_KERNEL __global__
// At most so many threads a block, and room for so many blocks a multiprocessor.
#define HEADRACE_KERNEL_OF(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace headrace::cuda {

HEADRACE_DEVICE uint8_t* shared_memory() {
    extern __shared__ __align__(128) uint8_t memory[];
    return memory;
}

HEADRACE_DEVICE void sync_threads() { __syncthreads(); }
HEADRACE_DEVICE void sync_warp() { __syncwarp(); }

// All lanes of the warp call these together.
template <class T>
HEADRACE_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffU, value, lane);
}
template <class T>
HEADRACE_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffU, value, mask);
}

HEADRACE_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory, or writes zeros and reads nothing.
HEADRACE_DEVICE void copy_async_16(void* to, const void* from, bool exists) {
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
        "l"(from), "r"(exists ? 16 : 0)
        : "memory");
}
HEADRACE_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
HEADRACE_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16 bits: lane 8 i + r names row r (16 bytes) of matrix i; lane 4 g + t
// receives elements 2 t and 2 t + 1 of row g of each, or of column g (transposed).
HEADRACE_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}
HEADRACE_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b, of a [16, 16], b [16, 8], c [16, 8] in fp32. Lane 4 g + t has of a the pairs
// (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8), of b the pairs of rows 2 t and 2 t + 8
// of column g, of c (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
template <class T>
HEADRACE_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, bf16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// 2^x to about 2 units in the last place; 0 for minus infinity.
HEADRACE_DEVICE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace headrace::cuda

#else
#include "headrace/cuda/simt_host.h"
#endif
