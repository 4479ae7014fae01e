// headrace::linear for CPUs: products of dense matrices as they are stored, without packing.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "checks.h"
#include "headrace/cpu/linear_sums.h"
#include "headrace/cpu/tape.h"

namespace headrace::cpu {
namespace {

constexpr int64_t CHUNK_COLUMNS = 64;
constexpr int64_t BLOCK_ROWS = 24;
constexpr int64_t K_BLOCK = 2048;
constexpr int64_t L1_BYTES = 32 << 10;
// Weights of a chunk: enough to make claiming it cheap, and few enough to stay in the L2 cache for
// the next rows.
constexpr int64_t CHUNK_BYTES = 64 << 10, CHUNK_BYTES_OF_MANY_ROWS = 256 << 10;
constexpr int64_t CHUNKS_PER_THREAD = 8;
// Fewer products than this take less time than a second thread needs to wake.
constexpr int64_t PRODUCTS_WORTH_A_THREAD = 1 << 16;

// out[rows, columns] = x[rows, size] @ weight[columns, size].T + bias. Strides count elements.
template <class T, class Out>
struct Product {
    const T* x;
    const T* weight;
    const T* bias;  // null: none
    Out* out;
    int64_t rows, columns, size, x_stride, weight_stride, out_stride;
};

}  // namespace
}  // namespace headrace::cpu

#define HEADRACE_KERNELS "headrace/cpu/linear.h"
#include "headrace/cpu/foreach_isa.h"
#include "headrace/cpu/linear_pairs.h"

namespace headrace::cpu {
namespace {

template <class T, class Out>
void multiply(const Product<T, Out>& p) {
    if (p.rows == 0 || p.columns == 0) return;
    const int64_t bytes = p.rows > BLOCK_ROWS ? CHUNK_BYTES_OF_MANY_ROWS : CHUNK_BYTES;
    const int64_t row_bytes = std::max<int64_t>(1, p.size) * static_cast<int64_t>(sizeof(T));
    const int64_t share = p.columns / (CHUNKS_PER_THREAD * num_threads());
    const int64_t some = std::min({CHUNK_COLUMNS, bytes / row_bytes, share}) / 4 * 4;
    const int64_t step = std::max<int64_t>(4, some);
    const auto multiply_some = [&](int64_t chunk) {
        const int64_t begin = chunk * step, end = std::min(p.columns, begin + step);
        HEADRACE_DISPATCH(linear::multiply_chunk, p, begin, end);
    };
    const int64_t chunks = (p.columns + step - 1) / step;
    if (p.rows * p.columns * p.size < PRODUCTS_WORTH_A_THREAD) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) multiply_some(chunk);
    } else {
        parallel_for(chunks, multiply_some);
    }
}

void linear_op(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out) {
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x and weight must have 2 dimensions");
    const int64_t rows = x.size(0), size = x.size(1), columns = weight.size(0);
    check_matrix("x", x, rows, size);
    check_matrix("weight", weight, columns, size);
    check_matrix("out", out, rows, columns);
    check_type("weight", weight, x.scalar_type());
    if (bias) check_vector("bias", *bias, x.scalar_type(), columns);
    with_float_type("x", x, [&](auto in) {
        with_float_type("out", out, [&](auto result) {
            using T = decltype(in);
            using Out = decltype(result);
            launch<multiply<T, Out>>(Product<T, Out>{
                .x = data<const T>(x),
                .weight = data<const T>(weight),
                .bias = bias ? data<const T>(*bias) : nullptr,
                .out = data<Out>(out),
                .rows = rows,
                .columns = columns,
                .size = size,
                .x_stride = x.stride(0),
                .weight_stride = weight.stride(0),
                .out_stride = out.stride(0),
            });
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) { m.impl("linear", TORCH_BOX(&linear_op)); }

}  // namespace headrace::cpu
