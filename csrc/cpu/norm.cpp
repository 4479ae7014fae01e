#include <torch/csrc/stable/library.h>

#include <cmath>

#include "checks.h"
#include "headrace/cpu/tape.h"

#define HEADRACE_KERNELS "headrace/cpu/norm.h"
#include "headrace/cpu/foreach_isa.h"

namespace headrace::cpu {
namespace {

// Strides count elements.
template <class X, class Out>
struct Norm {
    const X* x;
    float* residual;  // null: x is normalised as it is
    const float* weight;
    Out* out;
    int64_t rows, size, x_stride, residual_stride, out_stride;
    float eps;
};

template <class X, class Out>
void normalise(const Norm<X, Out>& n) {
    for_each_row(n.rows, n.size, [&](int64_t row) {
        const X* const x = n.x + row * n.x_stride;
        Out* const out = n.out + row * n.out_stride;
        if (n.residual) {
            HEADRACE_DISPATCH(add_rms_norm_row, x, n.residual + row * n.residual_stride, n.weight,
                              n.size, n.eps, out);
        } else {
            HEADRACE_DISPATCH(rms_norm_row, x, n.weight, n.size, n.eps, out);
        }
    });
}

void launch_norm(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps,
                 const Tensor& out) {
    STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions");
    const int64_t rows = x.size(0), size = x.size(1);
    check_matrix("x", x, rows, size);
    check_matrix("out", out, rows, size);
    check_vector("weight", weight, ScalarType::Float, size);
    if (residual) {
        check_matrix("residual", *residual, rows, size);
        check_type("residual", *residual, ScalarType::Float);
    }
    with_float_type("x", x, [&](auto in) {
        with_float_type("out", out, [&](auto result) {
            using In = decltype(in);
            using Out = decltype(result);
            launch<normalise<In, Out>>(Norm<In, Out>{
                .x = data<const In>(x),
                .residual = residual ? data<float>(*residual) : nullptr,
                .weight = data<const float>(weight),
                .out = data<Out>(out),
                .rows = rows,
                .size = size,
                .x_stride = x.stride(0),
                .residual_stride = residual ? residual->stride(0) : 0,
                .out_stride = out.stride(0),
                .eps = static_cast<float>(eps),
            });
        });
    });
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
    launch_norm(x, nullptr, weight, eps, out);
}

void add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                  const Tensor& out) {
    launch_norm(x, &residual, weight, eps, out);
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
