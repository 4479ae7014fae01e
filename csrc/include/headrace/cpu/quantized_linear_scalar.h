// Quantized products in plain C++: the fallback, and the specification of the other two, which give
// the same bits.
#pragma once

#include "headrace/cpu/quantized_linear.h"

namespace headrace::cpu::quantized {

struct Scalar {
    static constexpr int MAX_ROWS = 4;
    static constexpr bool EXACT = false, UNPACKS = false;
    static constexpr int row_bytes(int parts) { return quantized::row_bytes(parts); }

    template <class Value, int PARTS>
    static void quantize_tile(const Value* x, int64_t stride, int64_t groups, uint8_t* tile,
                              int rows) {
        for (int row = 0; row < rows; ++row, x += stride) {
            quantize_row<Value, PARTS>(x, groups, tile, rows, row);
        }
    }

    template <class Value, int PARTS>
    static void quantize_row(const Value* x, int64_t groups, uint8_t* tile, int rows, int row) {
        for (int64_t g = 0; g < groups; ++g, x += GROUP) {
            float values[GROUP], lowest = 0.0f, highest = 0.0f;
            bool has_nan = false;
            for (int k = 0; k < GROUP; ++k) {
                if constexpr (sizeof(Value) == 2)
                    values[k] = from_bf16(x[k]);
                else
                    values[k] = x[k];
                has_nan |= values[k] != values[k];
                lowest = values[k] < lowest ? values[k] : lowest;
                highest = values[k] > highest ? values[k] : highest;
            }
            const Quantizer quantizer(lowest, highest, has_nan);
            for (int part = 0; part < PARTS; ++part) {
                const ActivationGroup to(tile, g, rows, row, PARTS, part);
                int sum = 0;
                for (int i = 0; i < GROUP / PARTS; ++i) {
                    const int k = part * GROUP / PARTS + i;
                    const float scaled = std::nearbyint(values[k] * quantizer.inverse);
                    // What is not finite has made the scale NaN; any q will do.
                    int q = std::fabs(scaled) <= 256.0f ? static_cast<int>(scaled) : 0;
                    q += quantizer.zero_point;
                    q = q < -128 ? -128 : q > 127 ? 127 : q;
                    to.q[k] = static_cast<int8_t>(q);
                    sum += q;
                }
                quantizer.store_facts(to, sum, GROUP / PARTS);
            }
        }
    }

    // Loops over columns, which compilers turn into whatever vectors they may use.
    template <class F, int R>
    static void product(const uint8_t* weights, uint8_t* tile, int64_t groups, float* out) {
        for (int i = 0; i < R * COLUMNS; ++i) out[i] = 0.0f;
        for (int64_t g = 0; g < groups; ++g, weights += F::BYTES) {
            int16_t u[GROUP][COLUMNS];
            for (int k = 0; k < GROUP; ++k) {
                // The four of K are the bytes of a word; of 4 bits the second half is above the
                // first.
                uint32_t words[COLUMNS];
                const int quad = F::BITS == 8 ? k / 4 : k % 16 / 4;
                std::memcpy(words, weights + quad * sizeof words, sizeof words);
                const int shift = 8 * (k % 4) + (F::BITS == 4 && k >= 16 ? 4 : 0);
                for (int c = 0; c < COLUMNS; ++c) {
                    u[k][c] = static_cast<int16_t>(words[c] >> shift & ((1 << F::BITS) - 1));
                }
            }
            for (int part = 0; part < F::PARTS; ++part) {
                const int begin = part * GROUP / F::PARTS, end = begin + GROUP / F::PARTS;
                int32_t sum[COLUMNS] = {};
                for (int k = begin; k < end; ++k) {
                    for (int c = 0; c < COLUMNS; ++c) sum[c] += u[k][c];
                }
                float d[COLUMNS], m[COLUMNS] = {};
                for (int c = 0; c < COLUMNS; ++c) {
                    d[c] = scale_of<F>(weights + F::scales(part), c);
                    if constexpr (F::MINIMUM) m[c] = scale_of<F>(weights + F::minima(part), c);
                }
                for (int r = 0; r < R; ++r) {
                    const ActivationGroup x(tile, g, R, r, F::PARTS, part);
                    int32_t dot[COLUMNS] = {};
                    for (int k = begin; k < end; k += 16)
                        add_products<F::BITS>(u + k, x.q + k, dot);
                    add_part<F>(dot, sum, d, m, x, out + r * COLUMNS);
                }
            }
        }
    }

    // Of 16 values of K. A product fits 16 bits (255 * 128), and of 4 bits (15 * 128) so do 16 of
    // them.
    template <int BITS>
    static HEADRACE_INLINE void add_products(const int16_t (*u)[COLUMNS], const int8_t* q,
                                             int32_t* dot) {
        int16_t sums[COLUMNS] = {};
        for (int k = 0; k < 16; ++k) {
            for (int c = 0; c < COLUMNS; ++c) {
                const auto product = static_cast<int16_t>(u[k][c] * q[k]);
                if constexpr (BITS == 4)
                    sums[c] = static_cast<int16_t>(sums[c] + product);
                else
                    dot[c] += product;
            }
        }
        for (int c = 0; BITS == 4 && c < COLUMNS; ++c) dot[c] += sums[c];
    }

    template <class F>
    static HEADRACE_INLINE void add_part(const int32_t* dot, const int32_t* sum, const float* d,
                                         const float* m, const ActivationGroup& x, float* totals) {
        const int minus_z = load<int16_t>(x.offsets), minus_sum = load<int16_t>(x.offsets + 2);
        const float scale = load<float>(x.scale), scaled_sum = load<float>(x.scaled_sum);
        for (int c = 0; c < COLUMNS; ++c) {
            const auto exact = static_cast<float>(dot[c] + sum[c] * minus_z + F::ZERO * minus_sum);
            totals[c] = std::fma(exact * d[c], scale, totals[c]);
            if constexpr (F::MINIMUM) totals[c] = std::fma(m[c], scaled_sum, totals[c]);
        }
    }

    static void write(const Output& out, const float* totals, int64_t step, int64_t row,
                      int64_t rows, int64_t column) {
        out.write(totals, step, row, rows, column);
    }
};

}  // namespace headrace::cpu::quantized
