#include <torch/csrc/stable/library.h>

#include <cmath>

#include "checks.h"

#define HEADRACE_KERNELS "headrace/cpu/norm.h"
#include "headrace/cpu/foreach_isa.h"

namespace headrace::cpu {
namespace {

void rms_norm(Tensor x, Tensor weight, double eps, Tensor out) {
    STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions");
    const int64_t rows = x.size(0), size = x.size(1);
    check_matrix("x", x, rows, size);
    check_matrix("out", out, rows, size);
    check_vector("weight", weight, ScalarType::Float, size);
    with_float_type("x", x, [&](auto in) {
        with_float_type("out", out, [&](auto result) {
            const auto* from = data<const decltype(in)>(x);
            auto* to = data<decltype(result)>(out);
            const auto* scale = data<const float>(weight);
            const int64_t from_stride = x.stride(0), to_stride = out.stride(0);
            for_each_row(rows, size, [&](int64_t row) {
                HEADRACE_DISPATCH(rms_norm_row, from + row * from_stride, scale, size,
                                  static_cast<float>(eps), to + row * to_stride);
            });
        });
    });
}

void add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps, Tensor out) {
    STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions");
    const int64_t rows = x.size(0), size = x.size(1);
    check_matrix("x", x, rows, size);
    check_matrix("residual", residual, rows, size);
    check_type("residual", residual, ScalarType::Float);
    check_matrix("out", out, rows, size);
    check_vector("weight", weight, ScalarType::Float, size);
    with_float_type("x", x, [&](auto in) {
        with_float_type("out", out, [&](auto result) {
            const auto* from = data<const decltype(in)>(x);
            auto* sum = data<float>(residual);
            auto* to = data<decltype(result)>(out);
            const auto* scale = data<const float>(weight);
            const int64_t from_stride = x.stride(0), sum_stride = residual.stride(0),
                          to_stride = out.stride(0);
            for_each_row(rows, size, [&](int64_t row) {
                HEADRACE_DISPATCH(add_rms_norm_row, from + row * from_stride,
                                  sum + row * sum_stride, scale, size, static_cast<float>(eps),
                                  to + row * to_stride);
            });
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
    m.def(
        "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, Tensor(b!) out) "
        "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) {
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
    m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
}

}  // namespace headrace::cpu
