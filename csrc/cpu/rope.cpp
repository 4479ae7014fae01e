#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <type_traits>

#include "checks.h"

#define HEADRACE_KERNELS "headrace/cpu/rope.h"
#include "headrace/cpu/foreach_isa.h"

namespace headrace::cpu {
namespace {

// A row of a table or a slot out of range would be read or written far away.
void check_range(const char* name, const int64_t* values, int64_t count, int64_t low,
                 int64_t high) {
    for (int64_t i = 0; i < count; ++i) {
        STD_TORCH_CHECK(values[i] >= low && values[i] < high, name, " ", values[i], " of token ", i,
                        " is out of range: it must be at least ", low, " and below ", high);
    }
}

const float* norm_weight(const char* name, const std::optional<Tensor>& weight, int64_t head_dim) {
    if (!weight) return nullptr;
    check_vector(name, *weight, ScalarType::Float, head_dim);
    return data<const float>(*weight);
}

void rope_and_write_kv(Tensor qkv, Tensor positions, Tensor cos_sin, Tensor kv_cache,
                       Tensor slot_mapping, Tensor q_out, std::optional<Tensor> q_norm,
                       std::optional<Tensor> k_norm, double eps) {
    STD_TORCH_CHECK(q_out.is_cpu() && q_out.dim() == 3 && q_out.is_contiguous(),
                    "q_out must be a contiguous CPU tensor [T, H, D]");
    const int64_t tokens = q_out.size(0), num_heads = q_out.size(1), head_dim = q_out.size(2);
    STD_TORCH_CHECK(kv_cache.is_cpu() && kv_cache.dim() == 5 && kv_cache.size(1) == 2 &&
                        kv_cache.size(4) == head_dim && kv_cache.stride(4) == 1,
                    "kv_cache must be a CPU tensor [B, 2, K, P, ", head_dim,
                    "] of contiguous values");
    const int64_t num_kv_heads = kv_cache.size(2), page_size = kv_cache.size(3);
    check_matrix("qkv", qkv, tokens, (num_heads + 2 * num_kv_heads) * head_dim);
    check_type("q_out", q_out, qkv.scalar_type());
    check_vector("positions", positions, ScalarType::Long, tokens);
    check_vector("slot_mapping", slot_mapping, ScalarType::Long, tokens);
    STD_TORCH_CHECK(cos_sin.is_cpu() && cos_sin.dim() == 3 && cos_sin.size(1) == 2 &&
                        cos_sin.is_contiguous() && 2 * cos_sin.size(2) <= head_dim,
                    "cos_sin must be a contiguous CPU tensor [positions, 2, pairs]");
    check_type("cos_sin", cos_sin, ScalarType::Float);
    STD_TORCH_CHECK(q_norm.has_value() == k_norm.has_value(), "q_norm and k_norm come together");

    const int64_t* const position = data<const int64_t>(positions);
    const int64_t* const slot = data<const int64_t>(slot_mapping);
    check_range("position", position, tokens, 0, cos_sin.size(0));
    check_range("slot", slot, tokens, -1, kv_cache.size(0) * page_size);

    const RopeShape shape = {
        .num_heads = num_heads,
        .num_kv_heads = num_kv_heads,
        .head_dim = head_dim,
        .half = cos_sin.size(2),
        .cache_head_stride = kv_cache.stride(2),
        .q_norm = norm_weight("q_norm", q_norm, head_dim),
        .k_norm = norm_weight("k_norm", k_norm, head_dim),
        .eps = static_cast<float>(eps),
    };
    const float* const table = data<const float>(cos_sin);
    const int64_t qkv_stride = qkv.stride(0), block_stride = kv_cache.stride(0),
                  value_stride = kv_cache.stride(1), token_stride = kv_cache.stride(3);
    with_float_type("qkv", qkv, [&](auto in) {
        with_float_type("kv_cache", kv_cache, [&](auto cached) {
            using In = decltype(in);
            using Cache = decltype(cached);
            const In* const from = data<const In>(qkv);
            In* const q = data<In>(q_out);
            Cache* const cache = data<Cache>(kv_cache);
            for_each_row(tokens, qkv.size(1), [&](int64_t token) {
                Cache* key = nullptr;
                Cache* value = nullptr;
                if (slot[token] >= 0) {
                    key = cache + slot[token] / page_size * block_stride +
                          slot[token] % page_size * token_stride;
                    value = key + value_stride;
                }
                HEADRACE_DISPATCH(rope_token, shape, from + token * qkv_stride,
                                  table + position[token] * 2 * shape.half,
                                  q + token * num_heads * head_dim, key, value);
            });
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def(
        "rope_and_write_kv(Tensor qkv, Tensor positions, Tensor cos_sin, Tensor(a!) kv_cache, "
        "Tensor slot_mapping, Tensor(b!) q_out, Tensor? q_norm, Tensor? k_norm, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) {
    m.impl("rope_and_write_kv", TORCH_BOX(&rope_and_write_kv));
}

}  // namespace headrace::cpu
