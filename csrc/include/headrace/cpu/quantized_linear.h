// Products of grouped 4- and 8-bit weights with activations that are quantized to 8 bits on the way
// in. Here are the two layouts and what every instruction set shares; see ops/quantized_linear.py.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "headrace/cpu/isa.h"

namespace headrace::cpu::quantized {

constexpr int GROUP = 32;    // values along K that are stored and multiplied together
constexpr int COLUMNS = 16;  // outputs of a column block

// How a column block stores a group: the unsigned weights u of 16 columns in the order that
// multiply-accumulate by fours takes them (of 8 bits: 8 times [column][4 of K]; of 4 bits: 4 times,
// with K and K + 16 in a byte), then for each of PARTS equal parts of the group 16 scales d, then,
// with a minimum, for each part 16 minima m; all in fp16, or in fp32 if WIDE. A weight is d * u +
// m, or d * (u - ZERO) without a minimum.
template <int BITS_, bool MINIMUM_, int PARTS_, bool WIDE_>
struct Format {
    static constexpr int BITS = BITS_;
    static constexpr bool MINIMUM = MINIMUM_;
    static constexpr int PARTS = PARTS_;
    static constexpr bool WIDE = WIDE_;
    // What packed_format.py calls it by.
    static constexpr int CODE = BITS + 16 * MINIMUM + 32 * (PARTS == 2) + 64 * WIDE;
    static constexpr int ZERO = MINIMUM ? 0 : 1 << (BITS - 1);
    static constexpr int SCALE_BYTES = WIDE ? 4 : 2;
    static constexpr int SCALES = COLUMNS * GROUP * BITS / 8;
    static constexpr int MINIMA = SCALES + SCALE_BYTES * COLUMNS * PARTS;
    static constexpr int BYTES = MINIMA + (MINIMUM ? SCALE_BYTES * COLUMNS * PARTS : 0);
    // Where those of a part begin.
    static constexpr int scales(int part) { return SCALES + SCALE_BYTES * COLUMNS * part; }
    static constexpr int minima(int part) { return MINIMA + SCALE_BYTES * COLUMNS * part; }
};

// Calls f with a value of the format of this code; false if there is none. WIDE ones are those of
// stored types whose scales are products of two numbers.
template <class Function>
bool with_format(int64_t code, Function&& f) {
    const auto is = [&]<class F>(F format) { return code == F::CODE && (f(format), true); };
    return is(Format<4, false, 1, false>{}) || is(Format<4, true, 1, false>{}) ||
           is(Format<4, false, 2, false>{}) || is(Format<4, true, 2, false>{}) ||
           is(Format<8, false, 1, false>{}) || is(Format<8, true, 1, false>{}) ||
           is(Format<8, false, 2, false>{}) || is(Format<4, true, 1, true>{}) ||
           is(Format<4, false, 2, true>{}) || is(Format<4, true, 2, true>{}) ||
           is(Format<8, true, 1, true>{}) || is(Format<8, false, 2, true>{});
}

// Quads of K, 4 values each, of a group.
constexpr int QUADS = GROUP / 4;

// The same unpacked, for tiles of many rows: every format as bytes u, and for each part the pairs
// of int16 (sum of u, ZERO), d and m.
template <int PARTS>
struct alignas(64) UnpackedGroup {
    uint8_t u[QUADS][4 * COLUMNS];
    int32_t sums[PARTS][COLUMNS];
    float d[PARTS][COLUMNS];
    float m[PARTS][COLUMNS];
};

// A tile of R rows of activations stores a group as int8 q[R][32], then for each row the scale s,
// and for each row of each part s * sum(q - z) and the pair of int16 (-z, -sum(q - z)). An
// activation is s * (q - z).
constexpr int row_bytes(int parts) { return GROUP + 4 + 8 * parts; }

struct ActivationGroup {
    int8_t* q;
    uint8_t* scale;
    uint8_t* scaled_sum;
    uint8_t* offsets;

    ActivationGroup(uint8_t* tile, int64_t group, int rows, int row, int parts, int part = 0) {
        uint8_t* base = tile + group * rows * row_bytes(parts);
        q = reinterpret_cast<int8_t*>(base + row * GROUP);
        scale = base + rows * GROUP + 4 * row;
        scaled_sum = scale + 4 * rows * (1 + 2 * part);
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
    const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    return static_cast<uint16_t>((value == value ? rounded : bits | 0x400000) >> 16);
}

HEADRACE_INLINE float from_fp16(uint16_t bits) {
    // Exponent and mantissa where fp32 has them, then the difference of the biases as a product,
    // which is right for subnormal values too.
    const uint32_t magnitude = (bits & 0x7FFFu) << 13;
    const float value = magnitude >= 0x0F800000u ? std::bit_cast<float>(magnitude | 0x7F800000u)
                                                 : std::bit_cast<float>(magnitude) * 0x1p112f;
    return (bits & 0x8000) ? -value : value;
}

// The scale or minimum of a column, of those that begin at `from`.
template <class F>
HEADRACE_INLINE float scale_of(const uint8_t* from, int column) {
    if constexpr (F::WIDE)
        return load<float>(from + 4 * column);
    else
        return from_fp16(load<uint16_t>(from + 2 * column));
}

// The integer u of a column and a value of K.
template <class F>
HEADRACE_INLINE int integer_of(const uint8_t* group, int column, int k) {
    if constexpr (F::BITS == 8) return group[(k / 4 * COLUMNS + column) * 4 + k % 4];
    const uint8_t both = group[(k % 16 / 4 * COLUMNS + column) * 4 + k % 4];
    return k < 16 ? both & 15 : both >> 4;
}

// Where totals go: rows of float32 or bf16, with a bias added.
struct Output {
    void* out;
    int64_t stride;
    int64_t columns;
    const void* bias;
    bool is_bf16, bias_is_bf16;

    // Totals of rows, `step` apart, of the column block that begins at `column`.
    HEADRACE_INLINE void write(const float* totals, int64_t step, int64_t row, int64_t rows,
                               int64_t column) const {
        const int64_t width = columns - column < COLUMNS ? columns - column : COLUMNS;
        float add[COLUMNS] = {};
        for (int64_t c = 0; bias && c < width; ++c) {
            add[c] = bias_is_bf16 ? from_bf16(static_cast<const uint16_t*>(bias)[column + c])
                                  : static_cast<const float*>(bias)[column + c];
        }
        for (int64_t r = 0; r < rows; ++r, totals += step) {
            const int64_t at = (row + r) * stride + column;
            float values[COLUMNS];
            for (int c = 0; c < COLUMNS; ++c) values[c] = totals[c];
            for (int c = 0; bias && c < COLUMNS; ++c) values[c] += add[c];
            if (!is_bf16) {
                copy(static_cast<float*>(out) + at, values, width);
                continue;
            }
            uint16_t rounded[COLUMNS];
            for (int c = 0; c < COLUMNS; ++c) rounded[c] = to_bf16(values[c]);
            copy(static_cast<uint16_t*>(out) + at, rounded, width);
        }
    }

  private:
    template <class T>
    static HEADRACE_INLINE void copy(T* to, const T* from, int64_t width) {
        if (width == COLUMNS)
            std::memcpy(to, from, sizeof(T) * COLUMNS);
        else
            std::memcpy(to, from, sizeof(T) * width);
    }
};

// Lines of two column blocks, `stride` bytes apart, to bring into the cache for each group.
struct Ahead {
    const uint8_t* from;
    int64_t stride;
    int64_t lines;
};

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

    HEADRACE_INLINE void store_facts(const ActivationGroup& to, int sum_of_q, int count) const {
        const int sum = sum_of_q - count * zero_point;
        store(to.scale, scale);
        store(to.scaled_sum, scale * static_cast<float>(sum));
        store(to.offsets, static_cast<int16_t>(-zero_point));
        store(to.offsets + 2, static_cast<int16_t>(-sum));
    }
};

}  // namespace headrace::cpu::quantized
