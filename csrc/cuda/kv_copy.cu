#include "headrace/cuda/kv_copy.cuh"

#include "checks.cuh"

namespace headrace::cuda {
namespace {

struct Blocks {
    uint8_t* data;
    int64_t count, stride, bytes;  // of a block
};

Blocks blocks_of(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() >= 2, name, " must be [B, ...]");
    int64_t size = 1;
    for (int64_t i = tensor.dim() - 1; i > 0; --i) {
        STD_TORCH_CHECK(tensor.stride(i) == size || tensor.size(i) == 1, name,
                        " must have contiguous blocks");
        size *= tensor.size(i);
    }
    const int64_t element = static_cast<int64_t>(tensor.element_size());
    return {data<uint8_t>(tensor), tensor.size(0), tensor.stride(0) * element, size * element};
}

// The copy engine: it moves more to and from host memory than a kernel, and leaves the
// multiprocessors alone. Pairs that continue each other are one copy.
void copy_by_engine(const Blocks& src, const Blocks& dst, const Tensor& pairs,
                    cudaStream_t stream) {
    const int64_t count = pairs.size(0);
    const int64_t* const pair = data<const int64_t>(pairs);
    const auto is_copy = [&](int64_t i) { return pair[2 * i] >= 0 && pair[2 * i + 1] >= 0; };
    for (int64_t i = 0; i < count; ++i) {
        STD_TORCH_CHECK(pair[2 * i] < src.count && pair[2 * i + 1] < dst.count, "pair ", i,
                        " names block ", pair[2 * i], " of ", src.count, " and ", pair[2 * i + 1],
                        " of ", dst.count);
    }
    for (int64_t i = 0, run; i < count; i += run) {
        run = 1;
        if (!is_copy(i)) continue;
        while (i + run < count && pair[2 * (i + run)] == pair[2 * i] + run &&
               pair[2 * (i + run) + 1] == pair[2 * i + 1] + run)
            ++run;
        check_cuda(cudaMemcpy2DAsync(dst.data + pair[2 * i + 1] * dst.stride, dst.stride,
                                     src.data + pair[2 * i] * src.stride, src.stride, src.bytes,
                                     run, cudaMemcpyDefault, stream));
    }
}

void copy_by_kernel(const Blocks& src, const Blocks& dst, const Tensor& pairs,
                    cudaStream_t stream) {
    constexpr int64_t VECTOR = sizeof(Vector16);
    for (const Blocks& blocks : {src, dst}) {
        STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(blocks.data) % VECTOR == 0 &&
                            blocks.stride % VECTOR == 0 && blocks.bytes % VECTOR == 0,
                        "blocks must be aligned to, and of a multiple of, 16 bytes");
    }
    const BlockCopy copy = {
        .src = reinterpret_cast<const Vector16*>(src.data),
        .dst = reinterpret_cast<Vector16*>(dst.data),
        .pairs = data<const int64_t>(pairs),
        .src_stride = src.stride / VECTOR,
        .dst_stride = dst.stride / VECTOR,
        .src_blocks = src.count,
        .dst_blocks = dst.count,
        .size = src.bytes / VECTOR,
    };
    const int64_t chunks = (copy.size + COPY_CHUNK - 1) / COPY_CHUNK;
    STD_TORCH_CHECK(chunks < 65536, "a block must have less than 2 GiB");
    const dim3 grid(grid_size(pairs.size(0)), static_cast<unsigned>(chunks));
    copy_blocks<<<grid, COPY_THREADS, 0, stream>>>(copy);
    check_cuda(cudaGetLastError());
}

void launch_copy_blocks(const Tensor& src, const Tensor& dst, const Tensor& pairs) {
    const Blocks from = blocks_of("src", src), to = blocks_of("dst", dst);
    STD_TORCH_CHECK(from.bytes == to.bytes, "blocks of src have ", from.bytes,
                    " bytes, those of dst ", to.bytes);
    STD_TORCH_CHECK(pairs.dim() == 2 && pairs.size(1) == 2 && pairs.is_contiguous() &&
                        pairs.scalar_type() == ScalarType::Long,
                    "pairs must be contiguous int64 [N, 2]");
    const Tensor& on_device = dst.is_cuda() ? dst : src;
    STD_TORCH_CHECK(on_device.is_cuda(), "src or dst must be a CUDA tensor");
    STD_TORCH_CHECK(!pairs.is_cuda() || (src.is_cuda() && dst.is_cuda()),
                    "pairs must be on the CPU where src or dst is");
    if (pairs.size(0) == 0 || from.bytes == 0) return;
    const DeviceGuard guard(on_device.get_device_index());
    (pairs.is_cuda() ? copy_by_kernel : copy_by_engine)(from, to, pairs, stream_of(on_device));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace_cuda, m) {
    m.def("copy_blocks(Tensor src, Tensor(a!) dst, Tensor pairs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace_cuda, CUDA, m) {
    m.impl("copy_blocks", TORCH_BOX(&launch_copy_blocks));
}

}  // namespace headrace::cuda
