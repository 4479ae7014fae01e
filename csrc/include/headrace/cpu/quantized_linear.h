// Products of grouped 4- and 8-bit weights with activations that are quantized to 8 bits on the way
// in. Here are the two layouts and what every instruction set shares; see ops/quantized_linear.py.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "headrace/cpu/isa.h"

namespace headrace::cpu::quantized {

constexpr int GROUP = 32;   // values along K that share a scale
constexpr int COLUMNS = 16; // outputs of a column block

// How a column block stores a group: the unsigned weights u of 16 columns in the order that
// multiply-accumulate by fours takes them (of 8 bits: 8 times [column][4 of K]; of 4 bits: 4 times,
// with K and K + 16 in a byte), then 16 scales d in fp16, then, with a minimum, 16 minima m in fp16.
// A weight is d * u + m, or d * (u - ZERO) without a minimum.
template <int BITS_, bool MINIMUM_>
struct Format {
    static constexpr int BITS = BITS_;
    static constexpr bool MINIMUM = MINIMUM_;
    static constexpr int ZERO = MINIMUM ? 0 : 1 << (BITS - 1);
    static constexpr int SCALES = COLUMNS * GROUP * BITS / 8;
    static constexpr int MINIMA = SCALES + 2 * COLUMNS;
    static constexpr int BYTES = MINIMA + (MINIMUM ? 2 * COLUMNS : 0);
};

using Q4 = Format<4, false>;
using Q4Minimum = Format<4, true>;
using Q8 = Format<8, false>;
using Q8Minimum = Format<8, true>;

// A tile of R rows of activations stores a group as int8 q[R][32], then for each row the scale s,
// s * sum(q - z), and the pair of int16 (-z, -sum(q - z)). An activation is s * (q - z).
constexpr int ROW_BYTES = GROUP + 12;

struct ActivationGroup {
    int8_t* q;
    uint8_t* scale;
    uint8_t* scaled_sum;
    uint8_t* offsets;

    ActivationGroup(uint8_t* tile, int64_t group, int rows, int row) {
        uint8_t* base = tile + group * rows * ROW_BYTES;
        q = reinterpret_cast<int8_t*>(base + row * GROUP);
        scale = base + rows * GROUP + 4 * row;
        scaled_sum = scale + 4 * rows;
        offsets = scaled_sum + 4 * rows;
    }
};

template <class T>
HEADRACE_INLINE T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
HEADRACE_INLINE void store(void* to, T value) {
    std::memcpy(to, &value, sizeof value);
}

HEADRACE_INLINE float from_bf16(uint16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

HEADRACE_INLINE uint16_t to_bf16(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40);
}

HEADRACE_INLINE float from_fp16(uint16_t bits) {
    // Exponent and mantissa where fp32 has them, then the difference of the biases as a product,
    // which is right for subnormal values too.
    const uint32_t magnitude = (bits & 0x7FFFu) << 13;
    const float value = magnitude >= 0x0F800000u
                            ? std::bit_cast<float>(magnitude | 0x7F800000u)
                            : std::bit_cast<float>(magnitude) * 0x1p112f;
    return (bits & 0x8000) ? -value : value;
}

// Of a group of activations, from its extremes; the same operations on every instruction set.
struct Quantizer {
    float inverse;   // 1 / s, or 0 where s * (q - z) cannot say more than 0
    int zero_point;  // z, in [-128, 127]
    float scale;     // s; NaN if an activation is NaN or infinite

    HEADRACE_INLINE Quantizer(float lowest, float highest, bool has_nan) {
        const float range = highest - lowest;  // lowest <= 0 <= highest
        if (has_nan || !(range < 3e38f)) {
            inverse = 0.0f;
            zero_point = 0;
            scale = std::bit_cast<float>(0x7FC00000u);
            return;
        }
        inverse = range > 1e-30f ? 255.0f / range : 0.0f;
        zero_point = -128 - static_cast<int>(std::nearbyint(lowest * inverse));
        scale = range / 255.0f;
    }

    HEADRACE_INLINE void store_facts(const ActivationGroup& to, int sum_of_q) const {
        const int sum = sum_of_q - GROUP * zero_point;
        store(to.scale, scale);
        store(to.scaled_sum, scale * static_cast<float>(sum));
        store(to.offsets, static_cast<int16_t>(-zero_point));
        store(to.offsets + 2, static_cast<int16_t>(-sum));
    }
};

}  // namespace headrace::cpu::quantized
