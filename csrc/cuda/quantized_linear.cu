#include "headrace/cuda/quantized_linear.cuh"

#include <optional>

#include "checks.cuh"

namespace headrace::cuda {
namespace {

template <class Kernel>
void launch(Kernel* kernel, int shared_bytes, const Linear& p, int outputs, int tokens, int splits,
            cudaStream_t stream) {
    allow_shared_memory(kernel, shared_bytes);
    const int64_t token_blocks = (p.tokens + tokens - 1) / tokens;
    STD_TORCH_CHECK(token_blocks < 65536, "x has too many tokens");
    const dim3 grid(grid_size((p.outputs + outputs - 1) / outputs),
                    static_cast<unsigned>(token_blocks), static_cast<unsigned>(splits));
    kernel<<<grid, LINEAR_THREADS, shared_bytes, stream>>>(p);
    check_cuda(cudaGetLastError());
}

template <class F>
void multiply(const Linear& p, int splits, cudaStream_t stream) {
    constexpr int BYTES = LINEAR_MEMORY<F>;
    if (p.tokens <= TILE_TOKENS) {
        launch(packed_linear<F, 1>, BYTES, p, OUTPUTS, TILE_TOKENS, 1, stream);
    } else if (p.tokens <= FEW_TOKENS) {
        launch(packed_linear<F, 2>, BYTES, p, OUTPUTS, 2 * TILE_TOKENS, 1, stream);
    } else {
        launch(packed_linear_wide<F>, BYTES, p, OUTPUTS * LINEAR_WARPS, WIDE_TILES * TILE_TOKENS,
               splits, stream);
    }
}

// How many blocks share the lanes of a product of many tokens: so many that none of the GPU is
// idle, as long as they fit it at once.
int64_t linear_splits(int64_t tokens, int64_t outputs, int64_t multiprocessors) {
    constexpr int WIDE_OUTPUTS = OUTPUTS * LINEAR_WARPS, WIDE_TOKENS = WIDE_TILES * TILE_TOKENS;
    if (tokens <= FEW_TOKENS) return 1;
    const int64_t blocks =
        ((outputs + WIDE_OUTPUTS - 1) / WIDE_OUTPUTS) * ((tokens + WIDE_TOKENS - 1) / WIDE_TOKENS);
    int64_t splits = 1;
    while (splits < LANES && 2 * splits * blocks <= multiprocessors) splits *= 2;
    return splits;
}

bool is_bf16(const char* name, const Tensor& tensor) {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float, name,
                    " must be bfloat16 or float32");
    return type == ScalarType::BFloat16;
}

void quantized_linear(const Tensor& x, const Tensor& weight, int64_t format,
                      const std::optional<Tensor>& bias, int64_t splits, const Tensor& partials,
                      const Tensor& out) {
    STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && weight.dim() == 3,
                    "x and out must have 2 dimensions, weight 3");
    const int64_t tokens = x.size(0), groups = weight.size(1), outputs = out.size(1);
    check_matrix("x", x, tokens, groups * GROUP);
    check_matrix("out", out, tokens, outputs);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be bfloat16");
    check_aligned("x", x, x.stride(0), 8);
    STD_TORCH_CHECK(weight.is_cuda() && weight.is_contiguous() &&
                        weight.scalar_type() == ScalarType::Byte &&
                        weight.size(0) == (outputs + COLUMNS - 1) / COLUMNS && outputs < (1 << 30),
                    "weight must be contiguous uint8 [ceil(Out / 16), In / 32, bytes]");
    check_aligned("weight", weight, 0, 16);
    if (bias) {
        STD_TORCH_CHECK(bias->is_cuda() && bias->is_contiguous() && bias->dim() == 1 &&
                            bias->size(0) == outputs,
                        "bias must be a contiguous CUDA tensor [", outputs, "]");
    }
    STD_TORCH_CHECK(splits == 1 || splits == 2 || splits == 4 || splits == LANES,
                    "splits must be 1, 2, 4 or ", LANES);
    check_vector("partials", partials, ScalarType::Float, partials.numel());
    STD_TORCH_CHECK(splits == 1 || (partials.numel() >= LANES * tokens * outputs),
                    "partials must have ", LANES * tokens * outputs, " elements");
    const Linear p = {
        .x = data<const bf16>(x),
        .weight = data<const uint8_t>(weight),
        .bias = bias ? data<const float>(*bias) : nullptr,
        .out = out.data_ptr(),
        .x_stride = x.stride(0),
        .out_stride = out.stride(0),
        .tokens = tokens,
        .groups = static_cast<int>(groups),
        .outputs = static_cast<int>(outputs),
        .bias_is_bf16 = bias && is_bf16("bias", *bias),
        .out_is_bf16 = is_bf16("out", out),
        .partials = splits > 1 ? data<float>(partials) : nullptr,
    };
    if (tokens == 0 || outputs == 0) return;
    const DeviceGuard guard(x.get_device_index());
    const cudaStream_t stream = stream_of(x);
    STD_TORCH_CHECK(splits == 1 || tokens > FEW_TOKENS, "few tokens are not split");
    const bool known = with_packed_format(format, [&](auto type) {
        using F = decltype(type);
        STD_TORCH_CHECK(weight.size(2) == F::BYTES, "weight must have blocks of ", F::BYTES);
        multiply<F>(p, static_cast<int>(splits), stream);
    });
    STD_TORCH_CHECK(known, "there is no CUDA kernel of this format of weights");
    if (splits == 1) return;
    add_lanes<<<grid_size((tokens * outputs + LINEAR_THREADS - 1) / LINEAR_THREADS), LINEAR_THREADS,
                0, stream>>>(p);
    check_cuda(cudaGetLastError());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace_cuda, m) {
    m.def(
        "quantized_linear(Tensor x, Tensor weight, int format, Tensor? bias, int splits, "
        "Tensor(a!) partials, Tensor(b!) out) -> ()");
    m.def("linear_splits(int tokens, int outputs, int multiprocessors) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(headrace_cuda, CompositeExplicitAutograd, m) {
    m.impl("linear_splits", TORCH_BOX(&linear_splits));
}

STABLE_TORCH_LIBRARY_IMPL(headrace_cuda, CUDA, m) {
    m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace headrace::cuda
