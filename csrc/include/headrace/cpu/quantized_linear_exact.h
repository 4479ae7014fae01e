// Products of packed weights with bf16 activations, which are not rounded any further: the
// integers, and what remains of them when ZERO is taken off, are bf16 values too. Here are the
// layouts, and the products in plain C++.
#pragma once

#include "headrace/cpu/quantized_linear.h"

namespace headrace::cpu::quantized::exact {

// A tile of R rows of activations stores a group as bf16 x[R][32], each four in the order 0 2 1 3,
// then for each part and row the sum of x.
constexpr int row_bytes(int parts) { return 2 * GROUP + 4 * parts; }

template <int PARTS>
struct alignas(64) UnpackedGroup {
    float w[GROUP][COLUMNS];
    float d[PARTS][COLUMNS];
    float m[PARTS][COLUMNS];
};

template <int PARTS, class Value>
HEADRACE_INLINE void store_tile(const Value* x, int64_t stride, int64_t groups, uint8_t* tile,
                                int rows) {
    constexpr int ORDER[4] = {0, 2, 1, 3};
    for (int row = 0; row < rows; ++row, x += stride) {
        for (int64_t g = 0; g < groups; ++g) {
            uint8_t* to = tile + g * rows * row_bytes(PARTS);
            float values[GROUP];
            uint16_t bits[GROUP];
            for (int k = 0; k < GROUP; ++k) {
                if constexpr (sizeof(Value) == 2)
                    bits[k] = x[g * GROUP + k];
                else
                    bits[k] = to_bf16(x[g * GROUP + k]);
                values[k] = from_bf16(bits[k]);
            }
            uint16_t ordered[GROUP];
            for (int k = 0; k < GROUP; ++k) ordered[k] = bits[k / 4 * 4 + ORDER[k % 4]];
            std::memcpy(to + row * 2 * GROUP, ordered, sizeof ordered);
            for (int part = 0; part < PARTS; ++part) {
                // Halves are added until one value is left.
                float* sums = values + part * (GROUP / PARTS);
                for (int width = GROUP / PARTS / 2; width > 0; width /= 2) {
                    for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
                }
                store(to + rows * 2 * GROUP + 4 * (part * rows + row), sums[0]);
            }
        }
    }
}

template <class F>
HEADRACE_INLINE void unpack_groups(const uint8_t* weights, int64_t groups,
                                   UnpackedGroup<F::PARTS>* to) {
    for (int64_t g = 0; g < groups; ++g, weights += F::BYTES, to += 2) {
        for (int k = 0; k < GROUP; ++k) {
            for (int c = 0; c < COLUMNS; ++c) {
                to->w[k][c] = static_cast<float>(integer_of<F>(weights, c, k) - F::ZERO);
            }
        }
        for (int part = 0; part < F::PARTS; ++part) {
            for (int c = 0; c < COLUMNS; ++c) {
                to->d[part][c] = scale_of<F>(weights + F::scales(part), c);
                if constexpr (F::MINIMUM)
                    to->m[part][c] = scale_of<F>(weights + F::minima(part), c);
            }
        }
    }
}

// Adds to totals [R][2][16]. Products of integers and bf16 are exact in fp32: only sums round.
template <bool MINIMUM, int PARTS, int R>
HEADRACE_INLINE void add_products(const UnpackedGroup<PARTS>* weights, const uint8_t* x,
                                  int64_t groups, float* totals) {
    constexpr int ORDER[4] = {0, 2, 1, 3};
    for (int64_t g = 0; g < groups; ++g, weights += 2, x += R * row_bytes(PARTS)) {
        for (int r = 0; r < R; ++r) {
            for (int b = 0; b < 2; ++b) {
                float* total = totals + (2 * r + b) * COLUMNS;
                for (int part = 0; part < PARTS; ++part) {
                    float dot[COLUMNS] = {};
                    for (int i = 0; i < GROUP / PARTS; ++i) {
                        const int k = part * (GROUP / PARTS) + i;
                        const int at = 2 * (r * GROUP + k / 4 * 4 + ORDER[k % 4]);
                        const float value = from_bf16(load<uint16_t>(x + at));
                        for (int c = 0; c < COLUMNS; ++c) dot[c] += weights[b].w[k][c] * value;
                    }
                    const float sum = load<float>(x + R * 2 * GROUP + 4 * (part * R + r));
                    for (int c = 0; c < COLUMNS; ++c) {
                        total[c] += dot[c] * weights[b].d[part][c];
                        if constexpr (MINIMUM) total[c] += weights[b].m[part][c] * sum;
                    }
                }
            }
        }
    }
}

// The plain products as the compiler makes them for one instruction set.
#define HEADRACE_EXACT_PRODUCTS(NAME, TARGET, ROWS)                                              \
    struct NAME {                                                                                \
        static constexpr int MAX_ROWS = ROWS;                                                    \
        static constexpr bool EXACT = true, UNPACKS = true;                                      \
        template <int PARTS>                                                                     \
        using Unpacked = UnpackedGroup<PARTS>;                                                   \
        static constexpr int row_bytes(int parts) { return exact::row_bytes(parts); }            \
        template <class Value, int PARTS>                                                        \
        TARGET static void quantize_tile(const Value* x, int64_t stride, int64_t groups,         \
                                         uint8_t* tile, int rows) {                              \
            store_tile<PARTS>(x, stride, groups, tile, rows);                                    \
        }                                                                                        \
        template <class F>                                                                       \
        TARGET static void unpack(const uint8_t* weights, int64_t groups,                        \
                                  UnpackedGroup<F::PARTS>* to) {                                 \
            unpack_groups<F>(weights, groups, to);                                               \
        }                                                                                        \
        template <bool MINIMUM, int PARTS, int R>                                                \
        TARGET static void product_of_two(const UnpackedGroup<PARTS>* weights, const uint8_t* x, \
                                          int64_t groups, Ahead, float* totals) {                \
            add_products<MINIMUM, PARTS, R>(weights, x, groups, totals);                         \
        }                                                                                        \
        TARGET static void write(const Output& out, const float* totals, int64_t step,           \
                                 int64_t row, int64_t rows, int64_t column) {                    \
            out.write(totals, step, row, rows, column);                                          \
        }                                                                                        \
    };

HEADRACE_EXACT_PRODUCTS(Scalar, , 4)
#if defined(__x86_64__)
HEADRACE_EXACT_PRODUCTS(Avx2, HEADRACE_TARGET_AVX2, 4)
#endif
#undef HEADRACE_EXACT_PRODUCTS

}  // namespace headrace::cpu::quantized::exact
