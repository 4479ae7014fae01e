#include "headrace/cuda/quantization.cuh"

#include "checks.cuh"

namespace headrace::cuda {
namespace {

template <class X, class Out>
void launch(const Quantize<X, Out>& q, cudaStream_t stream) {
    with_quantize_team(q.group_size, [&](auto team) {
        constexpr int TEAM = decltype(team)::value, TEAMS = QUANTIZE_THREADS / TEAM;
        const int64_t blocks = (q.rows * q.groups + TEAMS - 1) / TEAMS;
        constexpr int SHARED = TEAM > 32 ? QUANTIZE_THREADS / 32 * 4 : 0;
        quantize_groups<TEAM><<<grid_size(blocks), QUANTIZE_THREADS, SHARED, stream>>>(q);
    });
    check_cuda(cudaGetLastError());
}

void quantize_rows(const Tensor& x, const Tensor& out, const Tensor& scale) {
    STD_TORCH_CHECK(x.dim() == 2 && scale.dim() == 2, "x and scale must have 2 dimensions");
    const int64_t rows = x.size(0), size = x.size(1), groups = scale.size(1);
    check_matrix("x", x, rows, size);
    check_matrix("out", out, rows, size);
    check_matrix("scale", scale, rows, groups);
    STD_TORCH_CHECK(scale.is_contiguous() && scale.scalar_type() == ScalarType::Float,
                    "scale must be contiguous float32");
    STD_TORCH_CHECK(groups > 0 && size % (groups * QUANTIZE_VECTOR) == 0 && size < (1 << 30),
                    "groups must be of multiples of ", QUANTIZE_VECTOR, " values");
    check_aligned("x", x, x.stride(0), 16);
    check_aligned("out", out, out.stride(0), QUANTIZE_VECTOR);
    if (rows == 0) return;
    const DeviceGuard guard(x.get_device_index());
    with_float_type("x", x, [&](auto in) {
        with_eight_bit_type("out", out, [&](auto result) {
            using X = decltype(in);
            using Out = decltype(result);
            launch(
                Quantize<X, Out>{
                    .x = data<const X>(x),
                    .out = data<Out>(out),
                    .scale = data<float>(scale),
                    .x_stride = x.stride(0),
                    .out_stride = out.stride(0),
                    .rows = rows,
                    .groups = static_cast<int>(groups),
                    .group_size = static_cast<int>(size / groups),
                },
                stream_of(x));
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace_cuda, m) {
    m.def("quantize_rows(Tensor x, Tensor(a!) out, Tensor(b!) scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace_cuda, CUDA, m) {
    m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
}

}  // namespace headrace::cuda
