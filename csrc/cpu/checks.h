// What the CPU ops ask of their tensors, in messages that name them, and their loop over rows.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "headrace/cpu/pool.h"
#include "headrace/cpu/vec.h"

namespace headrace::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == rows &&
                        tensor.size(1) == columns && (tensor.stride(1) == 1 || columns == 1),
                    name, " must be a CPU tensor [", rows, ", ", columns, "] of contiguous rows");
}

inline void check_vector(const char* name, const Tensor& tensor, ScalarType type, int64_t size) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == size &&
                        tensor.scalar_type() == type && tensor.is_contiguous(),
                    name, " must be a contiguous CPU tensor [", size, "] of its type");
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType type) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong type");
}

// Calls f with a value of the C++ type of the tensor's elements, float or bf16.
template <class F>
void with_float_type(const char* name, const Tensor& tensor, F&& f) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            f(float{});
            break;
        case ScalarType::BFloat16:
            f(bf16{});
            break;
        default:
            STD_TORCH_CHECK(false, name, " must be float32 or bfloat16");
    }
}

// Calls f(begin, end) for runs of rows on the pool, each some microseconds of work.
template <class F>
void for_each_run(int64_t rows, int64_t row_size, F&& f) {
    constexpr int64_t VALUES_PER_CHUNK = 16384;
    const int64_t step = std::max<int64_t>(1, VALUES_PER_CHUNK / std::max<int64_t>(1, row_size));
    parallel_for((rows + step - 1) / step, [&](int64_t chunk) {
        f(chunk * step, std::min(rows, (chunk + 1) * step));
    });
}

// Calls f(row) for each row, as for_each_run.
template <class F>
void for_each_row(int64_t rows, int64_t row_size, F&& f) {
    for_each_run(rows, row_size, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) f(row);
    });
}

template <class T>
T* data(const Tensor& tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

}  // namespace headrace::cpu
