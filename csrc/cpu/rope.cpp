#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

#include "checks.h"
#include "headrace/cpu/tape.h"

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

// A store to a line that is not there waits for it, and few of them can wait at a time.
void prefetch_for_writing(const void* from, int64_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(from) & ~uintptr_t{63};
    const auto end = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes);
    for (uintptr_t line = begin; line < end; line += 64) {
#if defined(__x86_64__)
        // __builtin_prefetch would need a target that has it; an older CPU takes it for a no-op.
        asm volatile("prefetchw %0" : : "m"(*reinterpret_cast<const char*>(line)));
#else
        __builtin_prefetch(reinterpret_cast<const char*>(line), 1);
#endif
    }
}

const float* norm_weight(const char* name, const std::optional<Tensor>& weight, int64_t head_dim) {
    if (!weight) return nullptr;
    check_vector(name, *weight, ScalarType::Float, head_dim);
    return data<const float>(*weight);
}

// Strides count elements.
template <class In, class Cache>
struct Rope {
    RopeShape shape;
    const In* qkv;
    const float* table;
    In* q_out;
    Cache* cache;
    const int64_t* positions;
    const int64_t* slots;
    int64_t tokens, qkv_size, qkv_stride;
    int64_t max_positions, cache_slots, page_size;
    int64_t block_stride, value_stride, token_stride;
};

// Where the key of a token's first head goes, null if nowhere; the scale of an int8 row goes behind
// the page, `to_scale` further.
template <class Cache>
struct Slot {
    Cache* key = nullptr;
    int64_t to_scale = 0;
};

template <class In, class Cache>
Slot<Cache> slot_of(const Rope<In, Cache>& r, int64_t token) {
    const int64_t slot = r.slots[token];
    if (slot < 0) return {};
    const int64_t block = slot / r.page_size, offset = slot - block * r.page_size;
    const int64_t scale = r.page_size * r.token_stride + offset * int64_t{sizeof(float)};
    return {.key = r.cache + block * r.block_stride + offset * r.token_stride,
            .to_scale = scale - offset * r.token_stride};
}

// In a decode each token's slots lie in a block of their own, which no cache has held since the
// last step: what the next tokens write is fetched while this one is computed.
template <class In, class Cache>
void prefetch_slots(const Rope<In, Cache>& r, int64_t token) {
    const Slot<Cache> slot = slot_of(r, token);
    if (slot.key == nullptr) return;
    const auto prefetch = [&](const Cache* row) {
        prefetch_for_writing(row, r.shape.head_dim * static_cast<int64_t>(sizeof(Cache)));
        if constexpr (std::is_same_v<Cache, int8_t>) {
            prefetch_for_writing(row + slot.to_scale, sizeof(float));
        }
    };
    for (int64_t head = 0; head < r.shape.num_kv_heads; ++head) {
        const Cache* const own = slot.key + head * r.shape.cache_head_stride;
        prefetch(own);
        prefetch(own + r.value_stride);
    }
}

template <class In, class Cache>
void rope_rows(const Rope<In, Cache>& r) {
    constexpr int64_t AHEAD = 4;
    check_range("position", r.positions, r.tokens, 0, r.max_positions);
    check_range("slot", r.slots, r.tokens, -1, r.cache_slots);
    for_each_run(r.tokens, r.qkv_size, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < std::min(begin + AHEAD, end); ++token) {
            prefetch_slots(r, token);
        }
        for (int64_t token = begin; token < end; ++token) {
            if (token + AHEAD < end) prefetch_slots(r, token + AHEAD);
            const auto [key, to_scale] = slot_of(r, token);
            Cache* const value = key == nullptr ? nullptr : key + r.value_stride;
            HEADRACE_DISPATCH(rope_token, r.shape, r.qkv + token * r.qkv_stride,
                              r.table + r.positions[token] * 2 * r.shape.half,
                              r.q_out + token * r.shape.num_heads * r.shape.head_dim, key, value,
                              to_scale);
        }
    });
}

template <class F>
void with_cache_type(const Tensor& kv_cache, F&& f) {
    if (kv_cache.scalar_type() == ScalarType::Char) return f(int8_t{});
    with_float_type("kv_cache", kv_cache, f);
}

void rope_and_write_kv(const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin,
                       const Tensor& kv_cache, const Tensor& slot_mapping, const Tensor& q_out,
                       std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, double eps) {
    STD_TORCH_CHECK(q_out.is_cpu() && q_out.dim() == 3 && q_out.is_contiguous(),
                    "q_out must be a contiguous CPU tensor [T, H, D]");
    const int64_t tokens = q_out.size(0), num_heads = q_out.size(1), head_dim = q_out.size(2);
    const bool quantized = kv_cache.scalar_type() == ScalarType::Char;
    const int64_t row_size = quantized ? head_dim + static_cast<int64_t>(sizeof(float)) : head_dim;
    STD_TORCH_CHECK(kv_cache.is_cpu() && kv_cache.dim() == 5 && kv_cache.size(1) == 2 &&
                        kv_cache.size(4) == row_size && kv_cache.stride(4) == 1,
                    "kv_cache must be a CPU tensor [B, 2, K, P, ", row_size,
                    "] of contiguous values");
    STD_TORCH_CHECK(!quantized || head_dim <= MAX_QUANTIZED_DIM,
                    "an int8 cache takes heads of up to ", MAX_QUANTIZED_DIM, ", not ", head_dim);
    STD_TORCH_CHECK(!quantized || kv_cache.stride(3) == row_size,
                    "the pages of an int8 cache must be contiguous");
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
    with_float_type("qkv", qkv, [&](auto in) {
        with_cache_type(kv_cache, [&](auto cached) {
            using In = decltype(in);
            using Cache = decltype(cached);
            launch<rope_rows<In, Cache>>(Rope<In, Cache>{
                .shape = shape,
                .qkv = data<const In>(qkv),
                .table = data<const float>(cos_sin),
                .q_out = data<In>(q_out),
                .cache = data<Cache>(kv_cache),
                .positions = data<const int64_t>(positions),
                .slots = data<const int64_t>(slot_mapping),
                .tokens = tokens,
                .qkv_size = qkv.size(1),
                .qkv_stride = qkv.stride(0),
                .max_positions = cos_sin.size(0),
                .cache_slots = kv_cache.size(0) * page_size,
                .page_size = page_size,
                .block_stride = kv_cache.stride(0),
                .value_stride = kv_cache.stride(1),
                .token_stride = quantized ? head_dim : kv_cache.stride(3),
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
