// Quantized products with AVX-512 VNNI: a column block is one register wide.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "headrace/cpu/quantized_linear.h"

namespace headrace::cpu::quantized {

struct Avx512 {
    static constexpr int MAX_ROWS = 6;
    static constexpr bool EXACT = false, UNPACKS = true;
    template <int PARTS>
    using Unpacked = UnpackedGroup<PARTS>;
    static constexpr int row_bytes(int parts) { return quantized::row_bytes(parts); }
    // Bytes of weights between what is used and what is fetched; found by trying 1 to 4 KB.
    static constexpr int64_t AHEAD = 4096;

    struct Minimum {
        HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512 of(__m512 a, __m512 b) {
            return _mm512_min_ps(a, b);
        }
    };
    struct Maximum {
        HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512 of(__m512 a, __m512 b) {
            return _mm512_max_ps(a, b);
        }
    };
    struct Sum {
        HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512 of(__m512 a, __m512 b) {
            return _mm512_castsi512_ps(
                _mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
        }
    };

    // Sixteen vectors, each reduced to a lane of the result: halves meet, then quarters, and so on.
    template <class Op>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512 reduce(const __m512* v) {
        __m512 a[8], b[4], c[2];
        for (int i = 0; i < 8; ++i) {
            a[i] = Op::of(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44),
                          _mm512_shuffle_f32x4(v[i], v[i + 8], 0xEE));
        }
        for (int i = 0; i < 4; ++i) {
            b[i] = Op::of(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88),
                          _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
        }
        for (int i = 0; i < 2; ++i) {
            c[i] = Op::of(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
        }
        const __m512 d =
            Op::of(_mm512_shuffle_ps(c[0], c[1], 0x44), _mm512_shuffle_ps(c[0], c[1], 0xEE));
        const __m512i lane_of =
            _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
        return _mm512_permutexvar_ps(lane_of, d);
    }

    template <class Value>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512 values(const Value* x) {
        if constexpr (sizeof(Value) == 4)
            return _mm512_loadu_ps(x);
        else
            return _mm512_castsi512_ps(_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))),
                16));
    }

    // Sixteen groups of the tile at a time, so that their extremes, scales and sums are lanes.
    template <class Value, int PARTS>
    HEADRACE_TARGET_AVX512 static void quantize_tile(const Value* x, int64_t stride, int64_t groups,
                                                     uint8_t* tile, int rows) {
        int row = 0;
        int64_t group = 0;
        for (int64_t left = rows * groups; left > 0; left -= 16) {
            const int count = left < 16 ? static_cast<int>(left) : 16;
            const Value* from[16];
            uint8_t* to[16];
            int row_of[16];
            for (int i = 0; i < count; ++i) {
                from[i] = x + row * stride + group * GROUP;
                to[i] = tile + group * rows * row_bytes(PARTS);
                row_of[i] = row;
                if (++group == groups) group = 0, ++row;
            }
            quantize_groups<Value, PARTS>(from, to, row_of, count, rows);
        }
    }

    template <class Value, int PARTS>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE void quantize_groups(const Value* const* from,
                                                                       uint8_t* const* to,
                                                                       const int* row_of, int count,
                                                                       int rows) {
        const __m512 zero = _mm512_setzero_ps();
        __m512 low[16], high[16];
        uint32_t nan = 0;
        for (int i = 0; i < 16; ++i) low[i] = high[i] = zero;
        for (int i = 0; i < count; ++i) {
            const __m512 v0 = values(from[i]), v1 = values(from[i] + 16);
            low[i] = _mm512_min_ps(v0, v1);
            high[i] = _mm512_max_ps(v0, v1);
            nan |= uint32_t{_mm512_cmp_ps_mask(v0, v1, _CMP_UNORD_Q) != 0} << i;
        }
        // The operations of Quantizer.
        const __m512 lowest = _mm512_min_ps(reduce<Minimum>(low), zero);
        const __m512 highest = _mm512_max_ps(reduce<Maximum>(high), zero);
        const __m512 range = _mm512_sub_ps(highest, lowest), most = _mm512_set1_ps(255.0f);
        const __mmask16 fine = _mm512_cmp_ps_mask(range, _mm512_set1_ps(3e38f), _CMP_LT_OQ) &
                               static_cast<__mmask16>(~nan);
        const __mmask16 divides =
            fine & _mm512_cmp_ps_mask(range, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
        const __m512 inverse = _mm512_maskz_div_ps(divides, most, range);
        const __m512 scale = _mm512_mask_div_ps(_mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)),
                                                fine, range, most);
        const __m512i z = _mm512_maskz_sub_epi32(
            fine, _mm512_set1_epi32(-128), _mm512_cvtps_epi32(_mm512_mul_ps(lowest, inverse)));
        alignas(64) float inverses[16];
        alignas(64) int32_t zero_points[16];
        _mm512_store_ps(inverses, inverse);
        _mm512_store_si512(zero_points, z);

        __m512 sums[PARTS][16];
        for (int part = 0; part < PARTS; ++part) {
            for (int i = 0; i < 16; ++i) sums[part][i] = zero;
        }
        const __m512i smallest = _mm512_set1_epi32(-128), largest = _mm512_set1_epi32(127);
        for (int i = 0; i < count; ++i) {
            const __m512 by = _mm512_set1_ps(inverses[i]);
            const __m512i add = _mm512_set1_epi32(zero_points[i]);
            __m512i q[2];
            for (int half = 0; half < 2; ++half) {
                const __m512 scaled = _mm512_mul_ps(values(from[i] + 16 * half), by);
                q[half] = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), add);
                q[half] = _mm512_max_epi32(_mm512_min_epi32(q[half], largest), smallest);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to[i] + row_of[i] * GROUP + 16 * half),
                                 _mm512_cvtepi32_epi8(q[half]));
            }
            if constexpr (PARTS == 1) {
                sums[0][i] = _mm512_castsi512_ps(_mm512_add_epi32(q[0], q[1]));
            } else {
                sums[0][i] = _mm512_castsi512_ps(q[0]);
                sums[PARTS - 1][i] = _mm512_castsi512_ps(q[1]);
            }
        }
        alignas(64) float scales[16];
        _mm512_store_ps(scales, scale);
        for (int part = 0; part < PARTS; ++part) {
            const __m512i sum =
                _mm512_sub_epi32(_mm512_castps_si512(reduce<Sum>(sums[part])),
                                 _mm512_mullo_epi32(z, _mm512_set1_epi32(GROUP / PARTS)));
            const __m512i none = _mm512_setzero_si512();
            alignas(64) float scaled_sums[16];
            alignas(64) int32_t offsets[16];
            _mm512_store_ps(scaled_sums, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum)));
            _mm512_store_si512(
                offsets, _mm512_or_si512(
                             _mm512_and_si512(_mm512_sub_epi32(none, z), _mm512_set1_epi32(0xFFFF)),
                             _mm512_slli_epi32(_mm512_sub_epi32(none, sum), 16)));
            for (int i = 0; i < count; ++i) {
                uint8_t* facts = to[i] + rows * GROUP + 4 * row_of[i];
                store(facts, scales[i]);
                store(facts + 4 * rows * (1 + 2 * part), scaled_sums[i]);
                store(facts + 4 * rows * (2 + 2 * part), offsets[i]);
            }
        }
    }

    template <class F>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512 scales(const uint8_t* from) {
        if constexpr (F::WIDE) return _mm512_loadu_ps(from);
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }

    // One column block, as it is stored: for tiles that are alone.
    template <class F, int R>
    HEADRACE_TARGET_AVX512 static void product(const uint8_t* weights, const uint8_t* x,
                                               int64_t groups, float* out) {
        __m512 total[R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; ++g, weights += F::BYTES, x += R * row_bytes(F::PARTS)) {
            prefetch(weights + AHEAD, F::BYTES);
#pragma GCC unroll 2
            for (int part = 0; part < F::PARTS; ++part) {
                __m512i dot[R], sum = _mm512_setzero_si512();
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) dot[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
                for (int i = 0; i < QUADS / F::PARTS; ++i) {
                    const int j = part * QUADS / F::PARTS + i;
                    const __m512i u = quad<F>(weights, j);
                    add_up<F>(sum, u);
#pragma GCC unroll 6
                    for (int r = 0; r < R; ++r) accumulate(dot[r], u, x + r * GROUP + 4 * j);
                }
                sum = sums<F>(sum);
                const __m512 d = scales<F>(weights + F::scales(part));
                __m512 m{};
                if constexpr (F::MINIMUM) m = scales<F>(weights + F::minima(part));
                const uint8_t* facts = x + R * GROUP;
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) {
                    add_part<F::MINIMUM>(total[r], dot[r], sum, d, m, facts + 4 * r, 4 * R, part);
                }
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) _mm512_storeu_ps(out + COLUMNS * r, total[r]);
    }

    // Into every second group of `to`: the other ones are those of the block beside it.
    template <class F>
    HEADRACE_TARGET_AVX512 static void unpack(const uint8_t* weights, int64_t groups,
                                              UnpackedGroup<F::PARTS>* to) {
        for (int64_t g = 0; g < groups; ++g, weights += F::BYTES, to += 2) {
            prefetch(weights + AHEAD, F::BYTES);
#pragma GCC unroll 2
            for (int part = 0; part < F::PARTS; ++part) {
                __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 8
                for (int i = 0; i < QUADS / F::PARTS; ++i) {
                    const int j = part * QUADS / F::PARTS + i;
                    const __m512i u = quad<F>(weights, j);
                    add_up<F>(sum, u);
                    _mm512_store_si512(to->u[j], u);
                }
                _mm512_store_si512(to->sums[part], sums<F>(sum));
                _mm512_store_ps(to->d[part], scales<F>(weights + F::scales(part)));
                if constexpr (F::MINIMUM) {
                    _mm512_store_ps(to->m[part], scales<F>(weights + F::minima(part)));
                }
            }
        }
    }

    // Two column blocks side by side, added to totals [R][2][16]: a broadcast activation serves
    // both.
    template <bool MINIMUM, int PARTS, int R>
    HEADRACE_TARGET_AVX512 static void product_of_two(const UnpackedGroup<PARTS>* weights,
                                                      const uint8_t* x, int64_t groups, Ahead ahead,
                                                      float* totals) {
        constexpr int B = 2;
        __m512 total[R][B];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            total[r][0] = _mm512_loadu_ps(totals + (B * r + 0) * COLUMNS);
            total[r][1] = _mm512_loadu_ps(totals + (B * r + 1) * COLUMNS);
        }
        for (int64_t g = 0; g < groups; ++g, weights += B, x += R * row_bytes(PARTS)) {
            for (int64_t i = 0; i < ahead.lines; ++i, ahead.from += 64) {
                _mm_prefetch(ahead.from, _MM_HINT_T0);
                _mm_prefetch(ahead.from + ahead.stride, _MM_HINT_T0);
            }
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; ++part) {
                __m512i dot[R][B];
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) dot[r][0] = dot[r][1] = _mm512_setzero_si512();
#pragma GCC unroll 8
                for (int i = 0; i < QUADS / PARTS; ++i) {
                    const int j = part * QUADS / PARTS + i;
                    const __m512i u0 = _mm512_load_si512(weights[0].u[j]);
                    const __m512i u1 = _mm512_load_si512(weights[1].u[j]);
#pragma GCC unroll 6
                    for (int r = 0; r < R; ++r) {
                        const __m512i q = _mm512_set1_epi32(load<int>(x + r * GROUP + 4 * j));
                        dot[r][0] = _mm512_dpbusd_epi32(dot[r][0], u0, q);
                        dot[r][1] = _mm512_dpbusd_epi32(dot[r][1], u1, q);
                    }
                }
                const uint8_t* facts = x + R * GROUP;
                const __m512i sum0 = _mm512_load_si512(weights[0].sums[part]);
                const __m512i sum1 = _mm512_load_si512(weights[1].sums[part]);
                const __m512 d0 = _mm512_load_ps(weights[0].d[part]);
                const __m512 d1 = _mm512_load_ps(weights[1].d[part]);
                __m512 m0{}, m1{};
                if constexpr (MINIMUM) {
                    m0 = _mm512_load_ps(weights[0].m[part]);
                    m1 = _mm512_load_ps(weights[1].m[part]);
                }
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) {
                    const uint8_t* own = facts + 4 * r;
                    add_part<MINIMUM>(total[r][0], dot[r][0], sum0, d0, m0, own, 4 * R, part);
                    add_part<MINIMUM>(total[r][1], dot[r][1], sum1, d1, m1, own, 4 * R, part);
                }
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            _mm512_storeu_ps(totals + (B * r + 0) * COLUMNS, total[r][0]);
            _mm512_storeu_ps(totals + (B * r + 1) * COLUMNS, total[r][1]);
        }
    }

    static HEADRACE_INLINE void prefetch(const uint8_t* from, int64_t bytes) {
        for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(from + at, _MM_HINT_T0);
    }

    // Output::write, of whole vectors.
    HEADRACE_TARGET_AVX512 static void write(const Output& o, const float* totals, int64_t step,
                                             int64_t row, int64_t rows, int64_t column) {
        const int64_t width = o.columns - column;
        const auto mask = static_cast<__mmask16>(width < COLUMNS ? (1 << width) - 1 : 0xFFFF);
        __m512 bias = _mm512_setzero_ps();
        if (o.bias && !o.bias_is_bf16) {
            bias = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(o.bias) + column);
        } else if (o.bias) {
            const auto* from = static_cast<const uint16_t*>(o.bias) + column;
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
            bias = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
        }
        for (int64_t r = 0; r < rows; ++r, totals += step) {
            const int64_t at = (row + r) * o.stride + column;
            __m512 values = _mm512_loadu_ps(totals);
            if (o.bias) values = _mm512_add_ps(values, bias);
            if (!o.is_bf16) {
                _mm512_mask_storeu_ps(static_cast<float*>(o.out) + at, mask, values);
                continue;
            }
            const __m512i bits = _mm512_castps_si512(values);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            __m512i rounded =
                _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
            rounded =
                _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q),
                                     bits, _mm512_set1_epi32(0x400000));
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(o.out) + at, mask,
                                     _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
        }
    }

  private:
    // The bytes of 4 values of K of 16 columns.
    template <class F>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512i quad(const uint8_t* weights, int index) {
        if constexpr (F::BITS == 8) return _mm512_loadu_si512(weights + 64 * index);
        const __m512i both = _mm512_loadu_si512(weights + 64 * (index % 4));
        return _mm512_and_si512(index < 4 ? both : _mm512_srli_epi16(both, 4),
                                _mm512_set1_epi8(15));
    }

    // Sums of u: of 4 bits as bytes of at most 8 * 15, of 8 bits as int32.
    template <class F>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE void add_up(__m512i& sum, __m512i u) {
        if constexpr (F::BITS == 4)
            sum = _mm512_add_epi8(sum, u);
        else
            sum = _mm512_dpbusd_epi32(sum, u, _mm512_set1_epi8(1));
    }

    // Pairs of int16 (sum of u, ZERO), against (-z, -sum(q - z)) of a row.
    template <class F>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE __m512i sums(__m512i sum) {
        if constexpr (F::BITS == 4) {
            sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), sum, _mm512_set1_epi8(1));
        }
        return _mm512_or_si512(sum, _mm512_set1_epi32(F::ZERO << 16));
    }

    // facts: of a row and the first part; those of other kinds and parts are `step` bytes apart.
    template <bool MINIMUM>
    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE void add_part(__m512& total, __m512i dot,
                                                                __m512i sum, __m512 d, __m512 m,
                                                                const uint8_t* facts, int step,
                                                                int part) {
        const uint8_t* own = facts + step * (1 + 2 * part);
        const __m512i offsets = _mm512_set1_epi32(load<int>(own + step));
        const __m512 exact = _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(dot, sum, offsets));
        const __m512 scale = _mm512_set1_ps(load<float>(facts));
        total = _mm512_fmadd_ps(_mm512_mul_ps(exact, d), scale, total);
        if constexpr (MINIMUM) {
            total = _mm512_fmadd_ps(m, _mm512_set1_ps(load<float>(own)), total);
        }
    }

    HEADRACE_TARGET_AVX512 static HEADRACE_INLINE void accumulate(__m512i& dot, __m512i u,
                                                                  const uint8_t* q) {
        dot = _mm512_dpbusd_epi32(dot, u, _mm512_set1_epi32(load<int>(q)));
    }
};

}  // namespace headrace::cpu::quantized
#endif
