// What the CUDA ops ask of their tensors, in messages that name them, and how they launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "headrace/cuda/numbers.cuh"

namespace headrace::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline void check_cuda(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

// torch's current stream of the tensor's device, which must be the current device.
inline cudaStream_t stream_of(const Tensor& tensor) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

template <class T>
T* data(const Tensor& tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

inline void check_vector(const char* name, const Tensor& tensor, ScalarType type, int64_t size) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.dim() == 1 && tensor.size(0) == size &&
                        tensor.scalar_type() == type && (tensor.is_contiguous() || size == 0),
                    name, " must be a contiguous CUDA tensor [", size, "] of its type");
}

// Rows that vectors of 16 bytes of them can be read from.
inline void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.dim() == 2 && tensor.size(0) == rows &&
                        tensor.size(1) == columns && (tensor.stride(1) == 1 || columns == 1),
                    name, " must be a CUDA tensor [", rows, ", ", columns, "] of contiguous rows");
}

inline void check_aligned(const char* name, const Tensor& tensor, int64_t stride, int64_t bytes) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes == 0 &&
                        stride * tensor.element_size() % bytes == 0,
                    name, " must have rows aligned to ", bytes, " bytes");
}

// The grid's first dimension.
inline unsigned grid_size(int64_t blocks) {
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "the grid is too large");
    return static_cast<unsigned>(blocks);
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check_cuda(cudaGetDevice(&device));
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

// Raises a kernel's limit on dynamic shared memory where it must be.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
    constexpr int WITHOUT_ASKING = 48 << 10;
    if (bytes <= WITHOUT_ASKING) return;
    const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    STD_TORCH_CHECK(bytes <= limit, "this GPU has ", limit, " bytes of shared memory a block, not ",
                    bytes);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Calls f with a value of the C++ type of the tensor's elements.
template <class F>
void with_half_type(const char* name, const Tensor& tensor, F&& f) {
    switch (tensor.scalar_type()) {
        case ScalarType::BFloat16:
            f(bf16{});
            break;
        case ScalarType::Half:
            f(fp16{});
            break;
        default:
            STD_TORCH_CHECK(false, name, " must be bfloat16 or float16");
    }
}
template <class F>
void with_float_type(const char* name, const Tensor& tensor, F&& f) {
    if (tensor.scalar_type() == ScalarType::Float)
        f(float{});
    else
        with_half_type(name, tensor, f);
}
template <class F>
void with_eight_bit_type(const char* name, const Tensor& tensor, F&& f) {
    switch (tensor.scalar_type()) {
        case ScalarType::Char:
            f(int8_t{});
            break;
        case ScalarType::Float8_e4m3fn:
            f(e4m3{});
            break;
        default:
            STD_TORCH_CHECK(false, name, " must be int8 or float8_e4m3fn");
    }
}

}  // namespace headrace::cuda
