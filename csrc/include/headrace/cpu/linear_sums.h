// What linear.h needs beyond vec.h on each instruction set: how many sums the registers hold, and
// their ends. The lanes of a sum are added in the same order on all of them: those 2 apart, then 1,
// 8 and 4.
#pragma once

#include "headrace/cpu/vec.h"

namespace headrace::cpu {

namespace scalar::linear {

// Rows of x and of the weight whose products are summed at a time.
constexpr int TILE_ROWS = 2;
constexpr int TILE_COLUMNS = 2;

// to[c] = the sum of the lanes of sums[c], plus to[c] unless `first`.
HEADRACE_INLINE void add_up(const Vec (&sums)[TILE_COLUMNS], float* to, bool first) {
    for (int c = 0; c < TILE_COLUMNS; ++c) {
        float quarter[4];
        for (int q = 0; q < 4; ++q) {
            const float* lane = sums[c].lane + 4 * q;
            quarter[q] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
        }
        const float sum = (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
        to[c] = first ? sum : to[c] + sum;
    }
}

HEADRACE_INLINE void prefetch(const void*) {}

}  // namespace scalar::linear

#if defined(__x86_64__)

#define HEADRACE_AVX2 HEADRACE_TARGET_AVX2 HEADRACE_INLINE

namespace avx2::linear {

// 12 of 16 registers: a sum takes two.
constexpr int TILE_ROWS = 3;
constexpr int TILE_COLUMNS = 2;

HEADRACE_AVX2 __m256 add_up_quarters(__m256 a, __m256 b) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    return _mm256_add_ps(ab, _mm256_permute_ps(ab, 0x4E));
}

HEADRACE_AVX2 void add_up(const Vec (&sums)[TILE_COLUMNS], float* to, bool first) {
    const __m256 both = _mm256_add_ps(add_up_quarters(sums[0].low, sums[1].low),
                                      add_up_quarters(sums[0].high, sums[1].high));
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    auto* const pair = reinterpret_cast<__m64*>(to);
    if (!first) sum = _mm_add_ps(_mm_loadl_pi(_mm_setzero_ps(), pair), sum);
    _mm_storel_pi(pair, sum);
}

HEADRACE_AVX2 void prefetch(const void* at) {
    _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0);
}

}  // namespace avx2::linear

#undef HEADRACE_AVX2
#define HEADRACE_AVX512 HEADRACE_TARGET_AVX512 HEADRACE_INLINE

namespace avx512::linear {

// 24 registers of sums, four of weights and one of x.
constexpr int TILE_ROWS = 6;
constexpr int TILE_COLUMNS = 4;

HEADRACE_AVX512 void add_up(const Vec (&sums)[TILE_COLUMNS], float* to, bool first) {
    const __m512 a = sums[0].value, b = sums[1].value, c = sums[2].value, d = sums[3].value;
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d one = _mm512_castps_pd(ab), two = _mm512_castps_pd(cd);
    const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(one, two)),
                                          _mm512_castpd_ps(_mm512_unpackhi_pd(one, two)));
    const __m256 both =
        _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    _mm_storeu_ps(to, first ? sum : _mm_add_ps(_mm_loadu_ps(to), sum));
}

HEADRACE_AVX512 void prefetch(const void* at) {
    _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0);
}

}  // namespace avx512::linear

#undef HEADRACE_AVX512
#endif  // __x86_64__

}  // namespace headrace::cpu
