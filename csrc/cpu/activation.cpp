#include <torch/csrc/stable/library.h>

#include "checks.h"

#define HEADRACE_KERNELS "headrace/cpu/activation.h"
#include "headrace/cpu/foreach_isa.h"

namespace headrace::cpu {
namespace {

void silu_and_mul(Tensor gate_up, Tensor out) {
    STD_TORCH_CHECK(out.dim() == 2, "out must have 2 dimensions");
    const int64_t rows = out.size(0), size = out.size(1);
    check_matrix("out", out, rows, size);
    check_matrix("gate_up", gate_up, rows, 2 * size);
    check_type("out", out, gate_up.scalar_type());
    with_float_type("gate_up", gate_up, [&](auto type) {
        using T = decltype(type);
        const T* const gate = data<const T>(gate_up);
        T* const to = data<T>(out);
        const int64_t from_stride = gate_up.stride(0), to_stride = out.stride(0);
        for_each_row(rows, 2 * size, [&](int64_t row) {
            const T* const from = gate + row * from_stride;
            HEADRACE_DISPATCH(silu_and_mul_row, from, from + size, size, to + row * to_stride);
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def("silu_and_mul(Tensor gate_up, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) { m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul)); }

}  // namespace headrace::cpu
