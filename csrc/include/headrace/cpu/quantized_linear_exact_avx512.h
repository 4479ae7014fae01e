// Products of packed weights with bf16 activations by AVX-512's dot products of pairs.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "headrace/cpu/quantized_linear_avx512.h"
#include "headrace/cpu/quantized_linear_exact.h"

namespace headrace::cpu::quantized::exact {

// For each four of K, the pairs of bf16 (0, 2) and (1, 3) of 16 columns.
template <int PARTS>
struct alignas(64) UnpackedPairs {
    uint16_t w[QUADS][2][2 * COLUMNS];
    float d[PARTS][COLUMNS];
    float m[PARTS][COLUMNS];
};

struct Avx512 {
    static constexpr int MAX_ROWS = 6;
    static constexpr bool EXACT = true, UNPACKS = true;
    template <int PARTS>
    using Unpacked = UnpackedPairs<PARTS>;
    static constexpr int row_bytes(int parts) { return exact::row_bytes(parts); }

    template <class Value, int PARTS>
    HEADRACE_TARGET_AVX512 static void quantize_tile(const Value* x, int64_t stride, int64_t groups,
                                                     uint8_t* tile, int rows) {
        store_tile<PARTS>(x, stride, groups, tile, rows);
    }

    template <class F>
    HEADRACE_TARGET_AVX512 static void unpack(const uint8_t* weights, int64_t groups,
                                              UnpackedPairs<F::PARTS>* to) {
        for (int64_t g = 0; g < groups; ++g, weights += F::BYTES, to += 2) {
            quantized::Avx512::prefetch(weights + quantized::Avx512::AHEAD, F::BYTES);
            if constexpr (F::BITS == 4) {
                const __m512i table = bf16_of_4_bits<F::ZERO>();
#pragma GCC unroll 4
                for (int i = 0; i < QUADS / 2; ++i) {
                    // The table is there twice: the bit above the four does not matter.
                    const __m512i both = _mm512_loadu_si512(weights + 64 * i);
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half) {
                        const __m512i even = _mm512_srli_epi16(both, 4 * half);
                        const __m512i odd = _mm512_srli_epi16(both, 4 * half + 8);
                        uint16_t (*pairs)[2 * COLUMNS] = to->w[i + half * QUADS / 2];
                        _mm512_store_si512(pairs[0], _mm512_permutexvar_epi16(even, table));
                        _mm512_store_si512(pairs[1], _mm512_permutexvar_epi16(odd, table));
                    }
                }
            } else {
#pragma GCC unroll 8
                for (int i = 0; i < QUADS; ++i) {
                    const __m512i bytes = _mm512_loadu_si512(weights + 64 * i);
                    const __m512i odd = _mm512_srli_epi16(bytes, 8);
                    _mm512_store_si512(to->w[i][0], bf16_of_8_bits<F::ZERO>(bytes));
                    _mm512_store_si512(to->w[i][1], bf16_of_8_bits<F::ZERO>(odd));
                }
            }
#pragma GCC unroll 2
            for (int part = 0; part < F::PARTS; ++part) {
                const __m512 d = quantized::Avx512::scales<F>(weights + F::scales(part));
                _mm512_store_ps(to->d[part], d);
                if constexpr (F::MINIMUM) {
                    const __m512 m = quantized::Avx512::scales<F>(weights + F::minima(part));
                    _mm512_store_ps(to->m[part], m);
                }
            }
        }
    }

    template <bool MINIMUM, int PARTS, int R>
    HEADRACE_TARGET_AVX512 static void product_of_two(const UnpackedPairs<PARTS>* weights,
                                                      const uint8_t* x, int64_t groups, Ahead ahead,
                                                      float* totals) {
        __m512 total[R][2];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            total[r][0] = _mm512_loadu_ps(totals + (2 * r + 0) * COLUMNS);
            total[r][1] = _mm512_loadu_ps(totals + (2 * r + 1) * COLUMNS);
        }
        for (int64_t g = 0; g < groups; ++g, weights += 2, x += R * row_bytes(PARTS)) {
            for (int64_t i = 0; i < ahead.lines; ++i, ahead.from += 64) {
                _mm_prefetch(ahead.from, _MM_HINT_T0);
                _mm_prefetch(ahead.from + ahead.stride, _MM_HINT_T0);
            }
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; ++part) {
                __m512 dot[R][2];
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) dot[r][0] = dot[r][1] = _mm512_setzero_ps();
#pragma GCC unroll 16
                for (int i = 0; i < 2 * QUADS / PARTS; ++i) {
                    const int pair = part * 2 * QUADS / PARTS + i;
                    const auto w0 = (__m512bh)_mm512_load_si512(weights[0].w[pair / 2][pair % 2]);
                    const auto w1 = (__m512bh)_mm512_load_si512(weights[1].w[pair / 2][pair % 2]);
#pragma GCC unroll 6
                    for (int r = 0; r < R; ++r) {
                        const int two = load<int>(x + 2 * GROUP * r + 4 * pair);
                        const auto values = (__m512bh)_mm512_set1_epi32(two);
                        dot[r][0] = _mm512_dpbf16_ps(dot[r][0], w0, values);
                        dot[r][1] = _mm512_dpbf16_ps(dot[r][1], w1, values);
                    }
                }
                const __m512 d0 = _mm512_load_ps(weights[0].d[part]);
                const __m512 d1 = _mm512_load_ps(weights[1].d[part]);
                __m512 m0{}, m1{};
                if constexpr (MINIMUM) {
                    m0 = _mm512_load_ps(weights[0].m[part]);
                    m1 = _mm512_load_ps(weights[1].m[part]);
                }
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) {
                    total[r][0] = _mm512_fmadd_ps(dot[r][0], d0, total[r][0]);
                    total[r][1] = _mm512_fmadd_ps(dot[r][1], d1, total[r][1]);
                    if constexpr (MINIMUM) {
                        const uint8_t* sums = x + R * 2 * GROUP + 4 * part * R;
                        const __m512 sum = _mm512_set1_ps(load<float>(sums + 4 * r));
                        total[r][0] = _mm512_fmadd_ps(m0, sum, total[r][0]);
                        total[r][1] = _mm512_fmadd_ps(m1, sum, total[r][1]);
                    }
                }
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            _mm512_storeu_ps(totals + (2 * r + 0) * COLUMNS, total[r][0]);
            _mm512_storeu_ps(totals + (2 * r + 1) * COLUMNS, total[r][1]);
        }
    }

    HEADRACE_TARGET_AVX512 static void write(const Output& out, const float* totals, int64_t step,
                                             int64_t row, int64_t rows, int64_t column) {
        quantized::Avx512::write(out, totals, step, row, rows, column);
    }

  private:
    template <int ZERO>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512i bf16_of_4_bits() {
        alignas(64) uint16_t table[32];
        for (int i = 0; i < 32; ++i) table[i] = to_bf16(static_cast<float>(i % 16 - ZERO));
        return _mm512_load_si512(table);
    }

    // Of the low byte of each 16 bits.
    template <int ZERO>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512i bf16_of_8_bits(__m512i pairs) {
        const __m512i byte = _mm512_set1_epi32(255), zero = _mm512_set1_epi32(ZERO);
        const __m512i low = _mm512_and_si512(pairs, byte);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi32(pairs, 16), byte);
        const __m512i a = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(low, zero)));
        const __m512i b = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(high, zero)));
        // Their low halves are 0: the integers have 8 bits.
        return _mm512_or_si512(_mm512_srli_epi32(a, 16), b);
    }
};

}  // namespace headrace::cpu::quantized::exact
#endif
