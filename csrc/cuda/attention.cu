#include "headrace/cuda/attention.cuh"

#include <algorithm>

#include "checks.cuh"

namespace headrace::cuda {
namespace {

// The plan tensor: the counts, the items, the folds.
struct PlanMemory {
    int* counts;
    Item* items;
    Fold* folds;

    static int64_t bytes(int64_t capacity, int64_t requests) {
        return static_cast<int64_t>(sizeof(Item)) * (1 + capacity + requests) +
               static_cast<int64_t>(sizeof(Fold)) * requests;
    }
    PlanMemory(const Tensor& plan, int64_t capacity, int64_t requests) {
        STD_TORCH_CHECK(plan.is_cuda() && plan.scalar_type() == ScalarType::Byte &&
                            plan.is_contiguous() && plan.numel() >= bytes(capacity, requests),
                        "plan must be contiguous uint8 of ", bytes(capacity, requests), " bytes");
        check_aligned("plan", plan, 0, sizeof(Item));
        items = data<Item>(plan) + 1;
        counts = data<int>(plan);
        folds = reinterpret_cast<Fold*>(items + capacity + requests);
    }
};

void launch_plan_decode(const Tensor& query_start_loc, const Tensor& seq_lens, int64_t window,
                        int64_t capacity, const Tensor& plan) {
    const int64_t requests = seq_lens.numel();
    check_vector("query_start_loc", query_start_loc, ScalarType::Int, requests + 1);
    check_vector("seq_lens", seq_lens, ScalarType::Int, requests);
    STD_TORCH_CHECK(window >= 0 && window < (1 << 30) && capacity >= 0 && capacity < (1 << 30) &&
                        requests < (1 << 30),
                    "window and capacity must be 0 to 2^30");
    const PlanMemory memory(plan, capacity, requests);
    const DeviceGuard guard(seq_lens.get_device_index());
    const Plan p = {
        .query_start = data<const int>(query_start_loc),
        .seq_lens = data<const int>(seq_lens),
        .requests = static_cast<int>(requests),
        .window = static_cast<int>(window),
        .capacity = static_cast<int>(capacity),
        .counts = memory.counts,
        .items = memory.items,
        .folds = memory.folds,
    };
    plan_decode<<<1, PLAN_THREADS, PLAN_THREADS / 32 * 4, stream_of(seq_lens)>>>(p);
    check_cuda(cudaGetLastError());
}

struct Shape {
    int64_t rows, heads, head_dim, kv_heads, page_size, requests, capacity;
};

// Of q, the cache and out; what else there is follows from them.
Shape check_tensors(const Tensor& q, const Tensor& kv_cache, const Tensor& out) {
    STD_TORCH_CHECK(q.dim() == 3 && q.is_cuda() && out.dim() == 3 && out.is_cuda(),
                    "q and out must be CUDA tensors [T, H, D]");
    STD_TORCH_CHECK(kv_cache.dim() == 5 && kv_cache.is_cuda() && kv_cache.size(1) == 2,
                    "kv_cache must be a CUDA tensor [B, 2, K, P, row]");
    const Shape s = {q.size(0), q.size(1), q.size(2), kv_cache.size(2), kv_cache.size(3), 0, 0};
    for (const auto& [name, tensor] : {std::pair{"q", &q}, std::pair{"out", &out}}) {
        STD_TORCH_CHECK(tensor->size(0) == s.rows && tensor->size(1) == s.heads &&
                            tensor->size(2) == s.head_dim && tensor->stride(2) == 1 &&
                            tensor->stride(1) == s.head_dim &&
                            tensor->scalar_type() == q.scalar_type(),
                        name, " must be [T, H, D] of contiguous rows, as the other");
    }
    STD_TORCH_CHECK(s.heads % s.kv_heads == 0 && s.heads / s.kv_heads <= MAX_GROUP,
                    "heads must share a kv head by at most ", MAX_GROUP);
    STD_TORCH_CHECK(s.page_size % WARP_TOKENS == 0, "pages must be of multiples of ", WARP_TOKENS,
                    " tokens");
    const int64_t row = kv_cache.size(4), element = kv_cache.element_size();
    STD_TORCH_CHECK(row == s.head_dim + (element == 1 ? 4 : 0) && kv_cache.stride(4) == 1 &&
                        kv_cache.stride(3) == row,
                    "kv_cache must have contiguous pages of its format");
    for (int i = 0; i < 3; ++i) check_aligned("kv_cache", kv_cache, kv_cache.stride(i), 16);
    return s;
}

template <int D, bool WIDE, class T, class C>
void launch(const Decode<T>& p, cudaStream_t stream) {
    const auto kernel = decode_attention<D, WIDE, T, C>;
    const int bytes = DecodeMemory<D, C>::bytes(p.group);
    allow_shared_memory(kernel, bytes);
    // A kilobyte of each block is the system's.
    const int fit = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (bytes + 1024);
    const int blocks = device_attribute(cudaDevAttrMultiProcessorCount) * std::clamp(fit, 1, 2);
    kernel<<<blocks, ATTENTION_THREADS, bytes, stream>>>(p);
    check_cuda(cudaGetLastError());
}

template <int D, class T>
void attend(const Shape& s, const Decode<T>& p, const Combine<T>& c, const Tensor& kv_cache,
            cudaStream_t stream) {
    const auto launch_for = [&](auto cache) {
        using C = decltype(cache);
        p.group > 8 ? launch<D, true, T, C>(p, stream) : launch<D, false, T, C>(p, stream);
    };
    if (kv_cache.element_size() == 1)
        with_eight_bit_type("kv_cache", kv_cache, launch_for);
    else
        launch_for(T{});
    constexpr int64_t MOST_BLOCKS = 128;  // with 32 heads more than run at once
    const int64_t blocks = std::clamp<int64_t>(std::max(s.requests, s.rows), 1, MOST_BLOCKS);
    const dim3 grid(grid_size(blocks), static_cast<unsigned>((s.heads + WARPS - 1) / WARPS));
    combine_chunks<D, T><<<grid, ATTENTION_THREADS, 0, stream>>>(c);
    check_cuda(cudaGetLastError());
}

void launch_decode_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& query_start_loc,
                             const Tensor& block_table, const Tensor& plan, const Tensor& partials,
                             double scale, double soft_cap, const Tensor& out) {
    Shape s = check_tensors(q, kv_cache, out);
    STD_TORCH_CHECK(block_table.dim() == 2 && block_table.is_cuda() && block_table.stride(1) == 1 &&
                        block_table.scalar_type() == ScalarType::Int,
                    "block_table must be a CUDA tensor [R, max_blocks] int32 of contiguous rows");
    s.requests = block_table.size(0);
    check_vector("query_start_loc", query_start_loc, ScalarType::Int, s.requests + 1);
    check_vector("partials", partials, ScalarType::Float, partials.numel());
    s.capacity = partials.numel() / (s.heads * (s.head_dim + 2));
    const PlanMemory memory(plan, s.capacity, s.requests);
    const DeviceGuard guard(q.get_device_index());
    float* const values = data<float>(partials);
    auto* const sums = reinterpret_cast<Sum*>(values + s.capacity * s.heads * s.head_dim);
    const int64_t element = static_cast<int64_t>(kv_cache.element_size());

    with_half_type("q", q, [&](auto type) {
        using T = decltype(type);
        STD_TORCH_CHECK(element == 1 || kv_cache.scalar_type() == q.scalar_type(),
                        "kv_cache must have the dtype of q, or 8 bits");
        const Decode<T> p = {
            .q = data<const T>(q),
            .out = data<T>(out),
            .cache = data<const uint8_t>(kv_cache),
            .block_table = data<const int>(block_table),
            .counts = memory.counts,
            .items = memory.items,
            .partials = values,
            .sums = sums,
            .q_stride = q.stride(0),
            .out_stride = out.stride(0),
            .block_stride = kv_cache.stride(0) * element,
            .kv_stride = kv_cache.stride(1) * element,
            .head_stride = kv_cache.stride(2) * element,
            .table_stride = block_table.stride(0),
            .kv_heads = static_cast<int>(s.kv_heads),
            .group = static_cast<int>(s.heads / s.kv_heads),
            .page_size = static_cast<int>(s.page_size),
            .scale = static_cast<float>(scale) * LOG2_E,
            .soft_cap = static_cast<float>(soft_cap),
        };
        const Combine<T> c = {
            .counts = memory.counts,
            .folds = memory.folds,
            .query_start = data<const int>(query_start_loc),
            .partials = values,
            .sums = sums,
            .out = data<T>(out),
            .out_stride = out.stride(0),
            .requests = static_cast<int>(s.requests),
            .heads = static_cast<int>(s.heads),
            .rows = static_cast<int>(s.rows),
        };
        const cudaStream_t stream = stream_of(q);
        if (s.head_dim == 64)
            attend<64, T>(s, p, c, kv_cache, stream);
        else if (s.head_dim == 128)
            attend<128, T>(s, p, c, kv_cache, stream);
        else
            STD_TORCH_CHECK(false, "heads must be of 64 or 128, not ", s.head_dim);
    });
}

int64_t decode_plan_bytes(int64_t capacity, int64_t requests) {
    return PlanMemory::bytes(capacity, requests);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace_cuda, m) {
    m.def("decode_plan_bytes(int capacity, int requests) -> int");
    m.def(
        "plan_decode(Tensor query_start_loc, Tensor seq_lens, int window, int capacity, "
        "Tensor(a!) plan) -> ()");
    m.def(
        "decode_attention(Tensor q, Tensor kv_cache, Tensor query_start_loc, Tensor block_table, "
        "Tensor plan, Tensor(a!) partials, float scale, float soft_cap, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace_cuda, CompositeExplicitAutograd, m) {
    m.impl("decode_plan_bytes", TORCH_BOX(&decode_plan_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(headrace_cuda, CUDA, m) {
    m.impl("plan_decode", TORCH_BOX(&launch_plan_decode));
    m.impl("decode_attention", TORCH_BOX(&launch_decode_attention));
}

}  // namespace headrace::cuda
