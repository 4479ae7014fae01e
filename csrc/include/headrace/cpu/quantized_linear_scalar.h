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

    template <class F, int R>
    static void product(const uint8_t* weights, uint8_t* tile, int64_t groups, float* out) {
        for (int i = 0; i < R * COLUMNS; ++i) out[i] = 0.0f;
        for (int64_t g = 0; g < groups; ++g, weights += F::BYTES) {
            for (int part = 0; part < F::PARTS; ++part) {
                for (int r = 0; r < R; ++r) {
                    const ActivationGroup x(tile, g, R, r, F::PARTS, part);
                    add_part<F>(weights, x, part, out + r * COLUMNS);
                }
            }
        }
    }

    template <class F>
    static void add_part(const uint8_t* weights, const ActivationGroup& x, int part,
                         float* totals) {
        const int minus_z = load<int16_t>(x.offsets), minus_sum = load<int16_t>(x.offsets + 2);
        const float scale = load<float>(x.scale), scaled_sum = load<float>(x.scaled_sum);
        for (int c = 0; c < COLUMNS; ++c) {
            int dot = 0, sum = 0;
            for (int i = 0; i < GROUP / F::PARTS; ++i) {
                const int k = part * GROUP / F::PARTS + i, u = integer_of<F>(weights, c, k);
                dot += u * x.q[k];
                sum += u;
            }
            const float d = scale_of<F>(weights + F::scales(part), c);
            const auto exact = static_cast<float>(dot + sum * minus_z + F::ZERO * minus_sum);
            totals[c] = std::fma(exact * d, scale, totals[c]);
            if constexpr (F::MINIMUM) {
                const float m = scale_of<F>(weights + F::minima(part), c);
                totals[c] = std::fma(m, scaled_sum, totals[c]);
            }
        }
    }

    static void write(const Output& out, const float* totals, int64_t step, int64_t row,
                      int64_t rows, int64_t column) {
        out.write(totals, step, row, rows, column);
    }
};

}  // namespace headrace::cpu::quantized
