// Quantized products with AVX2: a column block is two registers wide, one after the other.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "headrace/cpu/quantized_linear.h"

namespace headrace::cpu::quantized {

struct Avx2 {
    static constexpr int MAX_ROWS = 4;
    static constexpr bool EXACT = false, UNPACKS = false;
    static constexpr int row_bytes(int parts) { return quantized::row_bytes(parts); }

    template <class Value>
    HEADRACE_TARGET_AVX2 static HEADRACE_INLINE __m256 values(const Value* x) {
        if constexpr (sizeof(Value) == 4)
            return _mm256_loadu_ps(x);
        else
            return _mm256_castsi256_ps(_mm256_slli_epi32(
                _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), 16));
    }

    template <class Value, int PARTS>
    HEADRACE_TARGET_AVX2 static void quantize_tile(const Value* x, int64_t stride, int64_t groups,
                                                   uint8_t* tile, int rows) {
        for (int row = 0; row < rows; ++row, x += stride) {
            quantize_row<Value, PARTS>(x, groups, tile, rows, row);
        }
    }

    template <class Value, int PARTS>
    HEADRACE_TARGET_AVX2 static void quantize_row(const Value* x, int64_t groups, uint8_t* tile,
                                                  int rows, int row) {
        for (int64_t g = 0; g < groups; ++g, x += GROUP) {
            __m256 v[4], lowest = _mm256_setzero_ps(), highest = lowest, unordered = lowest;
            for (int i = 0; i < 4; ++i) {
                v[i] = values(x + 8 * i);
                unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v[i], v[i], _CMP_UNORD_Q));
                lowest = _mm256_min_ps(v[i], lowest);
                highest = _mm256_max_ps(v[i], highest);
            }
            float lows[8], highs[8];
            _mm256_storeu_ps(lows, lowest);
            _mm256_storeu_ps(highs, highest);
            for (int i = 1; i < 8; ++i) {
                lows[0] = lows[i] < lows[0] ? lows[i] : lows[0];
                highs[0] = highs[i] > highs[0] ? highs[i] : highs[0];
            }
            const Quantizer quantizer(lows[0], highs[0], _mm256_movemask_ps(unordered) != 0);
            uint8_t* const to = tile + g * rows * row_bytes(PARTS) + row * GROUP;
            __m256i q[4];
            for (int i = 0; i < 4; ++i) {
                const __m256 scaled = _mm256_mul_ps(v[i], _mm256_set1_ps(quantizer.inverse));
                q[i] = _mm256_add_epi32(_mm256_cvtps_epi32(scaled),
                                        _mm256_set1_epi32(quantizer.zero_point));
            }
            // Packing interleaves the halves of its operands; the permutation undoes both times.
            const __m256i bytes =
                _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, order);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), ordered);
            for (int part = 0; part < PARTS; ++part) {
                const ActivationGroup facts(tile, g, rows, row, PARTS, part);
                int sum = 0;
                for (int i = 0; i < GROUP / PARTS; ++i) sum += facts.q[part * GROUP / PARTS + i];
                quantizer.store_facts(facts, sum, GROUP / PARTS);
            }
        }
    }

    template <class F, int R>
    HEADRACE_TARGET_AVX2 static void product(const uint8_t* weights, uint8_t* tile, int64_t groups,
                                             float* out) {
        half_product<F, R>(weights, tile, groups, 0, out);
        half_product<F, R>(weights, tile, groups, 1, out);
    }

    template <class F, int R>
    HEADRACE_TARGET_AVX2 static HEADRACE_INLINE void half_product(const uint8_t* weights,
                                                                  const uint8_t* x, int64_t groups,
                                                                  int half, float* out) {
        const __m256i low_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
        __m256 total[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; ++g, weights += F::BYTES, x += R * row_bytes(F::PARTS)) {
            const uint8_t* u = weights + 32 * half;
#pragma GCC unroll 2
            for (int part = 0; part < F::PARTS; ++part) {
                __m256i dot[R], sum = _mm256_setzero_si256();
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) dot[r] = _mm256_setzero_si256();
                if constexpr (F::BITS == 4) {
                    // int16 sums of 16 products of at most 15 * 128 do not overflow.
#pragma GCC unroll 8
                    for (int i = 0; i < QUADS / F::PARTS; ++i) {
                        const int j = part * QUADS / F::PARTS + i;
                        const __m256i both = bytes(u + 64 * (j % 4));
                        const __m256i v =
                            _mm256_and_si256(j < 4 ? both : _mm256_srli_epi16(both, 4), low_bits);
                        sum = _mm256_add_epi8(sum, v);
#pragma GCC unroll 4
                        for (int r = 0; r < R; ++r) {
                            const __m256i q = quad(x + r * GROUP + 4 * j);
                            dot[r] = _mm256_add_epi16(dot[r], _mm256_maddubs_epi16(v, q));
                        }
                    }
                    sum = _mm256_maddubs_epi16(sum, _mm256_set1_epi8(1));
                    sum = _mm256_madd_epi16(sum, ones);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) dot[r] = _mm256_madd_epi16(dot[r], ones);
                } else {
                    // Products of 8 bits by 8 overflow the sums of maddubs: even and odd bytes as
                    // int16.
                    for (int i = 0; i < QUADS / F::PARTS; ++i) {
                        const int j = part * QUADS / F::PARTS + i;
                        const __m256i v = bytes(u + 64 * j);
                        const __m256i even = _mm256_and_si256(v, _mm256_set1_epi16(255));
                        const __m256i odd = _mm256_srli_epi16(v, 8);
                        const __m256i pairs = _mm256_madd_epi16(_mm256_add_epi16(even, odd), ones);
                        sum = _mm256_add_epi32(sum, pairs);
#pragma GCC unroll 4
                        for (int r = 0; r < R; ++r) {
                            const __m256i q = quad(x + r * GROUP + 4 * j);
                            const __m256i q_even = _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8);
                            const __m256i q_odd = _mm256_srai_epi16(q, 8);
                            dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(even, q_even));
                            dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(odd, q_odd));
                        }
                    }
                }
                sum = _mm256_or_si256(sum, _mm256_set1_epi32(F::ZERO << 16));
                const __m256 d = halves(weights + F::scales(part) + 16 * half);
                __m256 m{};
                if constexpr (F::MINIMUM) m = halves(weights + F::minima(part) + 16 * half);
                const uint8_t* scales = x + R * GROUP;
                const uint8_t* facts = scales + 4 * R * (1 + 2 * part);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const __m256i offset = _mm256_madd_epi16(sum, quad(facts + 4 * R + 4 * r));
                    const __m256 exact = _mm256_cvtepi32_ps(_mm256_add_epi32(dot[r], offset));
                    const __m256 scale = _mm256_set1_ps(load<float>(scales + 4 * r));
                    total[r] = _mm256_fmadd_ps(_mm256_mul_ps(exact, d), scale, total[r]);
                    if constexpr (F::MINIMUM) {
                        const __m256 scaled_sum = _mm256_set1_ps(load<float>(facts + 4 * r));
                        total[r] = _mm256_fmadd_ps(m, scaled_sum, total[r]);
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) _mm256_storeu_ps(out + COLUMNS * r + 8 * half, total[r]);
    }

    HEADRACE_TARGET_AVX2 static void write(const Output& out, const float* totals, int64_t step,
                                           int64_t row, int64_t rows, int64_t column) {
        out.write(totals, step, row, rows, column);
    }

    HEADRACE_TARGET_AVX2 static HEADRACE_INLINE __m256i bytes(const uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }

    HEADRACE_TARGET_AVX2 static HEADRACE_INLINE __m256i quad(const uint8_t* from) {
        return _mm256_set1_epi32(load<int>(from));
    }

    HEADRACE_TARGET_AVX2 static HEADRACE_INLINE __m256 halves(const uint8_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
};

}  // namespace headrace::cpu::quantized
#endif
