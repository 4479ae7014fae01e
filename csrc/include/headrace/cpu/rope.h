// QK-norm, rotary embedding and the write into the paged KV cache; compiled by foreach_isa.h.
#include "headrace/cpu/norm.h"

#if !defined(HEADRACE_CPU_ROPE_SHAPE)
#define HEADRACE_CPU_ROPE_SHAPE
namespace headrace::cpu {

// The largest head that is quantized.
constexpr int64_t MAX_QUANTIZED_DIM = 512;

// What the tokens of a call have in common; lengths and strides count elements.
struct RopeShape {
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t half;  // pairs that are rotated
    int64_t cache_head_stride;
    const float* q_norm;  // [head_dim], null without QK-norm; so is k_norm
    const float* k_norm;
    float eps;
};

}  // namespace headrace::cpu
#endif

namespace headrace::cpu::HEADRACE_ISA {

// out = the first 2 `half` values of `head` rotated by pairs (i, i + half), and the others. With
// `norm`, values are multiplied by `scale` and their weight first.
template <bool normed, class In, class Out>
HEADRACE_INLINE void rotate_head(const In* head, const float* cos, const float* sin, int64_t half,
                                 int64_t head_dim, Vec scale, const float* norm, Out* out) {
    const auto load = [&](int64_t i, int64_t count) HEADRACE_INLINE_LAMBDA {
        const Vec value = load_first(head + i, count);
        if constexpr (normed) return value * scale * load_first(norm + i, count);
        return value;
    };
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t count = half - i;
        const Vec first = load(i, count), second = load(half + i, count);
        const Vec c = load_first(cos + i, count), s = load_first(sin + i, count);
        store_first(first * c - second * s, out + i, count);
        store_first(second * c + first * s, out + half + i, count);
    }
    for (int64_t i = 2 * half; i < head_dim; i += LANES) {
        store_first(load(i, head_dim - i), out + i, head_dim - i);
    }
}

template <class In, class Out>
HEADRACE_INLINE void rope_head(const In* head, const float* cos, const float* sin, int64_t half,
                               int64_t head_dim, const float* norm, float eps, Out* out) {
    if (norm == nullptr) {
        rotate_head<false>(head, cos, sin, half, head_dim, Vec::set(1.0F), norm, out);
        return;
    }
    SumOfSquares squares;
    for_each_vector(head_dim, [&](int part, int64_t i, int64_t count) HEADRACE_INLINE_LAMBDA {
        squares.add(part, load_first(head + i, count));
    });
    const Vec scale = reciprocal_rms(squares, head_dim, eps);
    rotate_head<true>(head, cos, sin, half, head_dim, scale, norm, out);
}

// The integers of x, and their scale.
template <class In>
HEADRACE_INLINE void quantize_row(const In* x, int64_t size, int8_t* out, int8_t* scale_out) {
    constexpr float LIMIT = 127.0F;
    Vec top = Vec::set(0.0F), poison = Vec::set(0.0F);
    for (int64_t i = 0; i < size; i += LANES) {
        const Vec value = load_first(x + i, size - i);
        top = Vec::max(top, Vec::max(value, Vec::set(0.0F) - value));
        poison = Vec::fma(value, Vec::set(0.0F), poison);  // NaN, if there is NaN or infinity
    }
    float lane[LANES];
    top.store(lane);
    const float largest = *std::max_element(lane, lane + LANES);
    const Vec factor = Vec::set(largest > 0.0F ? LIMIT / largest : 0.0F);
    for (int64_t i = 0; i < size; i += LANES) {
        const Vec value = load_first(x + i, size - i) * factor;
        const Vec within = Vec::max(Vec::set(-LIMIT), Vec::min(Vec::set(LIMIT), value));
        store_first(within.round(), out + i, size - i);
    }
    const float scale = largest / LIMIT + sum_of_lanes(poison);
    std::memcpy(scale_out, &scale, sizeof scale);
}

// The heads of q, k and v of one token. `key` and `value` are where its first head of each goes in
// the cache, null if nowhere; from there to the scale of an int8 row it is `to_scale`.
template <class In, class Cache>
void rope_token(const RopeShape& shape, const In* qkv, const float* cos_sin, In* q_out, Cache* key,
                Cache* value, int64_t to_scale) {
    const float* cos = cos_sin;
    const float* sin = cos_sin + shape.half;
    for (int64_t h = 0; h < shape.num_heads; ++h) {
        rope_head(qkv + h * shape.head_dim, cos, sin, shape.half, shape.head_dim, shape.q_norm,
                  shape.eps, q_out + h * shape.head_dim);
    }
    if (key == nullptr) return;
    const In* const k = qkv + shape.num_heads * shape.head_dim;
    const In* const v = k + shape.num_kv_heads * shape.head_dim;
    for (int64_t h = 0; h < shape.num_kv_heads; ++h) {
        const In* const own_k = k + h * shape.head_dim;
        const In* const own_v = v + h * shape.head_dim;
        Cache* const key_row = key + h * shape.cache_head_stride;
        Cache* const value_row = value + h * shape.cache_head_stride;
        if constexpr (std::is_same_v<Cache, int8_t>) {
            float rotated[MAX_QUANTIZED_DIM];
            rope_head(own_k, cos, sin, shape.half, shape.head_dim, shape.k_norm, shape.eps,
                      rotated);
            quantize_row(rotated, shape.head_dim, key_row, key_row + to_scale);
            quantize_row(own_v, shape.head_dim, value_row, value_row + to_scale);
        } else {
            rope_head(own_k, cos, sin, shape.half, shape.head_dim, shape.k_norm, shape.eps,
                      key_row);
            if constexpr (std::is_same_v<In, Cache>) {
                std::memcpy(value_row, own_v, shape.head_dim * sizeof(In));
            } else {
                for (int64_t i = 0; i < shape.head_dim; i += LANES) {
                    const int64_t count = shape.head_dim - i;
                    store_first(load_first(own_v + i, count), value_row + i, count);
                }
            }
        }
    }
}

}  // namespace headrace::cpu::HEADRACE_ISA
