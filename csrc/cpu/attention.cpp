// headrace::paged_attention for CPUs: its schema, its checks, and the launch.
#include "headrace/cpu/attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "headrace/cpu/tape.h"

namespace headrace::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Launch {
    attention::Batch batch;
    bool q_is_bf16;
    ScalarType cache_type;
    int64_t rows, max_blocks, cache_blocks;
};

// What the kernel reads and writes by is checked at every call: it costs a fraction of the reading.
void check_batch(const Launch& launch) {
    const auto& [batch, q_is_bf16, cache_type, rows, max_blocks, cache_blocks] = launch;
    int32_t begin = batch.query_start_loc[0];
    STD_TORCH_CHECK(begin == 0, "query_start_loc must begin with 0, not ", begin);
    for (int64_t request = 0; request < batch.requests; ++request) {
        const int32_t end = batch.query_start_loc[request + 1];
        if (begin == end) continue;  // padding
        const int32_t length = batch.seq_lens[request];
        STD_TORCH_CHECK(begin < end && end <= rows && end - begin <= length, "request ", request,
                        " has rows ", begin, " to ", end, " of ", rows, " and a sequence of ",
                        length);
        STD_TORCH_CHECK(length <= max_blocks * batch.page_size, "the sequence of request ", request,
                        ", ", length, ", is longer than its block table");
        const int32_t hidden = batch.window ? length - (end - begin) + 1 - batch.window : 0;
        const int32_t* table = batch.block_table + request * batch.table_stride;
        for (int64_t page = std::max(hidden, 0) / batch.page_size; page * batch.page_size < length;
             ++page) {
            STD_TORCH_CHECK(table[page] >= 0 && table[page] < cache_blocks, "request ", request,
                            " has block ", table[page], " of a cache of ", cache_blocks);
        }
        begin = end;
    }
}

void check_int32(const char* name, const Tensor& tensor, int64_t dims) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Int &&
                        tensor.dim() == dims && tensor.stride(dims - 1) == 1,
                    name, " must be int32 on the CPU, of ", dims,
                    " dimensions, with adjacent values");
}

bool is_float(const Tensor& tensor) {
    const ScalarType type = tensor.scalar_type();
    return tensor.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16);
}

// A row for each token, its heads and channels contiguous.
void check_rows(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(is_float(tensor) && tensor.dim() == 3, name,
                    " must be bfloat16 or float32 on the CPU, of 3 dimensions");
    STD_TORCH_CHECK(tensor.stride(2) == 1 && tensor.stride(1) == tensor.size(2), name,
                    " must have contiguous rows");
}

template <class Q>
void attend(const Launch& launch) {
    const attention::Batch& batch = launch.batch;
    switch (launch.cache_type) {
        case ScalarType::BFloat16:
            attention::attend_on_this_cpu<Q, bf16>(batch);
            break;
        case ScalarType::Char:
            attention::attend_on_this_cpu<Q, int8_t>(batch);
            break;
        default:
            attention::attend_on_this_cpu<Q, float>(batch);
    }
    auto* const out = static_cast<Q*>(batch.out);
    for (int64_t row = batch.query_start_loc[batch.requests]; row < launch.rows; ++row) {
        std::fill_n(out + row * batch.out_stride, batch.heads * batch.dim, Q{});
    }
}

void run(const Launch& launch) {
    check_batch(launch);
    if (launch.q_is_bf16) {
        attend<bf16>(launch);
    } else {
        attend<float>(launch);
    }
}

void paged_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& query_start_loc,
                     const Tensor& seq_lens, const Tensor& block_table, double scale,
                     int64_t sliding_window, double soft_cap, const Tensor& scratch,
                     const Tensor& out) {
    check_rows("q", q);
    check_rows("out", out);
    check_int32("query_start_loc", query_start_loc, 1);
    check_int32("seq_lens", seq_lens, 1);
    check_int32("block_table", block_table, 2);
    const int64_t rows = q.size(0), heads = q.size(1), dim = q.size(2);
    const int64_t requests = seq_lens.size(0);
    STD_TORCH_CHECK(out.scalar_type() == q.scalar_type() && out.size(0) == rows &&
                        out.size(1) == heads && out.size(2) == dim,
                    "out must have the shape and the dtype of q");
    const bool quantized = kv_cache.is_cpu() && kv_cache.scalar_type() == ScalarType::Char;
    const int64_t row_size = quantized ? dim + static_cast<int64_t>(sizeof(float)) : dim;
    STD_TORCH_CHECK(
        (quantized || is_float(kv_cache)) && kv_cache.dim() == 5 && kv_cache.size(1) == 2 &&
            kv_cache.size(4) == row_size && kv_cache.stride(4) == 1 &&
            kv_cache.stride(3) == row_size,
        "kv_cache must be [B, 2, K, P, D], bfloat16 or float32, or [B, 2, K, P, D + 4], "
        "int8, its pages contiguous");
    const int64_t kv_heads = kv_cache.size(2);
    STD_TORCH_CHECK(dim >= 16 && dim <= attention::MAX_DIM && dim % 16 == 0,
                    "the head size must be a multiple of 16 up to 256, not ", dim);
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " heads of q cannot share ",
                    kv_heads, " heads of the cache");
    STD_TORCH_CHECK(query_start_loc.size(0) == requests + 1 && block_table.size(0) == requests,
                    "query_start_loc, seq_lens and block_table disagree on the requests");
    STD_TORCH_CHECK(sliding_window >= 0 && sliding_window <= INT32_MAX && soft_cap >= 0,
                    "sliding_window and soft_cap must not be negative; 0 is none");
    const int64_t scratch_bytes = scratch.numel() * static_cast<int64_t>(scratch.element_size());
    STD_TORCH_CHECK(
        scratch.is_cpu() && scratch.is_contiguous() &&
            scratch_bytes >= requests * static_cast<int64_t>(sizeof(attention::RequestPlan)),
        "scratch has ", scratch_bytes, " bytes, too few for ", requests, " requests");
    auto* const scratch_start = static_cast<std::byte*>(scratch.mutable_data_ptr());
    STD_TORCH_CHECK(
        requests == 0 ||
            reinterpret_cast<uintptr_t>(scratch_start) % alignof(attention::RequestPlan) == 0,
        "scratch must begin at a multiple of ", alignof(attention::RequestPlan));

    const attention::Batch batch = {
        .q = q.const_data_ptr(),
        .q_stride = q.stride(0),
        .kv_cache = kv_cache.const_data_ptr(),
        .block_stride = kv_cache.stride(0),
        .kv_stride = kv_cache.stride(1),
        .head_stride = kv_cache.stride(2),
        .query_start_loc = query_start_loc.const_data_ptr<int32_t>(),
        .seq_lens = seq_lens.const_data_ptr<int32_t>(),
        .block_table = block_table.const_data_ptr<int32_t>(),
        .table_stride = block_table.stride(0),
        .requests = requests,
        .heads = heads,
        .kv_heads = kv_heads,
        .page_size = kv_cache.size(3),
        .dim = dim,
        .scale = static_cast<float>(scale),
        .window = static_cast<int32_t>(sliding_window),
        .soft_cap = static_cast<float>(soft_cap),
        .scratch = scratch_start,
        .scratch_bytes = scratch_bytes,
        .out = out.mutable_data_ptr(),
        .out_stride = out.stride(0),
        .group = heads / kv_heads,
        .block_rows = attention::Batch::rows_that_fit(dim),
    };
    launch<run>(Launch{
        .batch = batch,
        .q_is_bf16 = q.scalar_type() == ScalarType::BFloat16,
        .cache_type = kv_cache.scalar_type(),
        .rows = rows,
        .max_blocks = block_table.size(1),
        .cache_blocks = kv_cache.size(0),
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def(
        "paged_attention(Tensor q, Tensor kv_cache, Tensor query_start_loc, Tensor seq_lens, "
        "Tensor block_table, float scale, int sliding_window, float soft_cap, Tensor(a!) scratch, "
        "Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) {
    m.impl("paged_attention", TORCH_BOX(&paged_attention));
}

}  // namespace headrace::cpu
