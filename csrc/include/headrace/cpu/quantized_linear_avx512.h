// Quantized products with AVX-512 VNNI: a column block is one register wide.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "headrace/cpu/quantized_linear.h"

namespace headrace::cpu::quantized {

struct Avx512 {
    static constexpr int MAX_ROWS = 12;

    template <class Value>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512 values(const Value* x) {
        if constexpr (sizeof(Value) == 4) return _mm512_loadu_ps(x);
        else return _mm512_castsi512_ps(_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16));
    }

    template <class Value>
    HEADRACE_TARGET_AVX512 static void quantize_row(const Value* x, int64_t groups, uint8_t* tile,
                                                    int rows, int row) {
        for (int64_t g = 0; g < groups; ++g, x += GROUP) {
            const __m512 low = values(x), high = values(x + 16);
            const __m512 zero = _mm512_setzero_ps();
            const float lowest = _mm512_reduce_min_ps(_mm512_min_ps(_mm512_min_ps(low, high), zero));
            const float highest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(low, high), zero));
            const bool has_nan = _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q) != 0;
            const Quantizer quantizer(lowest, highest, has_nan);
            const ActivationGroup to(tile, g, rows, row);
            const __m512 inverse = _mm512_set1_ps(quantizer.inverse);
            const __m512i z = _mm512_set1_epi32(quantizer.zero_point);
            const __m512i q0 = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)), z);
            const __m512i q1 = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(high, inverse)), z);
            const __m128i b0 = _mm512_cvtsepi32_epi8(q0), b1 = _mm512_cvtsepi32_epi8(q1);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to.q), b0);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to.q + 16), b1);
            const __m256i both = _mm256_set_m128i(b1, b0);
            const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), both);
            __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
            four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
            four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1));
            quantizer.store_facts(to, _mm_cvtsi128_si32(four));
        }
    }

    template <class F, int R>
    HEADRACE_TARGET_AVX512 static void product(const uint8_t* weights, uint8_t* tile, int64_t groups,
                                               float* out) {
        const __m512i ones = _mm512_set1_epi8(1), low_bits = _mm512_set1_epi8(15);
        const uint8_t* x = tile;
        __m512 total[R];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; ++g, weights += F::BYTES, x += R * ROW_BYTES) {
            __m512i dot[R];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) dot[r] = _mm512_setzero_si512();
            __m512i sum = _mm512_setzero_si512();
            if constexpr (F::BITS == 4) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const __m512i both = _mm512_loadu_si512(weights + 64 * j);
                    const __m512i low = _mm512_and_si512(both, low_bits);
                    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits);
                    // Bytes of at most 8 * 15.
                    sum = _mm512_add_epi8(sum, _mm512_add_epi8(low, high));
#pragma GCC unroll 12
                    for (int r = 0; r < R; ++r) accumulate(dot[r], low, x + r * GROUP + 4 * j);
#pragma GCC unroll 12
                    for (int r = 0; r < R; ++r) accumulate(dot[r], high, x + r * GROUP + 16 + 4 * j);
                }
                sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), sum, ones);
            } else {
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) {
                    const __m512i u = _mm512_loadu_si512(weights + 64 * j);
                    sum = _mm512_dpbusd_epi32(sum, u, ones);
#pragma GCC unroll 12
                    for (int r = 0; r < R; ++r) accumulate(dot[r], u, x + r * GROUP + 4 * j);
                }
            }
            // Pairs of int16 (sum of u, ZERO), against (-z, -sum(q - z)) of a row.
            sum = _mm512_or_si512(sum, _mm512_set1_epi32(F::ZERO << 16));
            const __m512 d = halves(weights + F::SCALES);
            __m512 m{};
            if constexpr (F::MINIMUM) m = halves(weights + F::MINIMA);
            const uint8_t* facts = x + R * GROUP;
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const __m512i offsets = _mm512_set1_epi32(load<int>(facts + 8 * R + 4 * r));
                const __m512 exact = _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(dot[r], sum, offsets));
                const __m512 scale = _mm512_set1_ps(load<float>(facts + 4 * r));
                total[r] = _mm512_fmadd_ps(_mm512_mul_ps(exact, d), scale, total[r]);
                if constexpr (F::MINIMUM) {
                    const __m512 scaled_sum = _mm512_set1_ps(load<float>(facts + 4 * R + 4 * r));
                    total[r] = _mm512_fmadd_ps(m, scaled_sum, total[r]);
                }
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) _mm512_storeu_ps(out + COLUMNS * r, total[r]);
    }

    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE void accumulate(__m512i& dot, __m512i u,
                                                                  const uint8_t* q) {
        dot = _mm512_dpbusd_epi32(dot, u, _mm512_set1_epi32(load<int>(q)));
    }

    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512 halves(const uint8_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
};

}  // namespace headrace::cpu::quantized
#endif
