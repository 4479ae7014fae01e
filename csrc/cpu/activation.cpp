#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "headrace/cpu/tape.h"

#define HEADRACE_KERNELS "headrace/cpu/activation.h"
#include "headrace/cpu/foreach_isa.h"

namespace headrace::cpu {
namespace {

// Strides count elements.
template <class T>
struct Gate {
    const T* gate_up;
    T* out;
    int64_t rows, size, gate_up_stride, out_stride;
};

template <class T>
void silu_and_mul_rows(const Gate<T>& g) {
    for_each_row(g.rows, 2 * g.size, [&](int64_t row) {
        const T* const gate = g.gate_up + row * g.gate_up_stride;
        HEADRACE_DISPATCH(silu_and_mul_row, gate, gate + g.size, g.size,
                          g.out + row * g.out_stride);
    });
}

void silu_and_mul(const Tensor& gate_up, const Tensor& out) {
    STD_TORCH_CHECK(out.dim() == 2, "out must have 2 dimensions");
    const int64_t rows = out.size(0), size = out.size(1);
    check_matrix("out", out, rows, size);
    check_matrix("gate_up", gate_up, rows, 2 * size);
    check_type("out", out, gate_up.scalar_type());
    with_float_type("gate_up", gate_up, [&](auto type) {
        using T = decltype(type);
        launch<silu_and_mul_rows<T>>(Gate<T>{
            .gate_up = data<const T>(gate_up),
            .out = data<T>(out),
            .rows = rows,
            .size = size,
            .gate_up_stride = gate_up.stride(0),
            .out_stride = out.stride(0),
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def("silu_and_mul(Tensor gate_up, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) { m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul)); }

}  // namespace headrace::cpu
