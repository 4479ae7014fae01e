// What attention_tile.h needs beyond vec.h on each instruction set: the numbers of registers, a
// transpose, a mask of lanes, the sum and the largest of the lanes, the channels of a word of keys.
#pragma once

#include <cmath>
#include <utility>

#include "headrace/cpu/vec.h"

namespace headrace::cpu {

namespace scalar::tiles {

// Rows and vectors of a block of sums that stay in registers while products are added to them.
constexpr int BLOCK_ROWS = 2;
constexpr int BLOCK_VECTORS = 1;

HEADRACE_INLINE void transpose(Vec (&x)[LANES]) {
    for (int i = 0; i < LANES; ++i) {
        for (int j = 0; j < i; ++j) std::swap(x[i].lane[j], x[j].lane[i]);
    }
}

// Minus infinity in the lanes outside [first, last).
HEADRACE_INLINE Vec keep_lanes(Vec x, int first, int last) {
    for (int i = 0; i < LANES; ++i) x.lane[i] = i >= first && i < last ? x.lane[i] : -INFINITY;
    return x;
}

// NaN is left out unless it is in all lanes.
HEADRACE_INLINE float largest_lane(Vec x) {
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            x.lane[i] = x.lane[i] > x.lane[i + half] ? x.lane[i] : x.lane[i + half];
        }
    }
    return x.lane[0];
}

HEADRACE_INLINE float lane_sum(Vec x) {
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
    }
    return x.lane[0];
}

// `count` <= 16 words of 4 bytes; the others may be anything.
HEADRACE_INLINE Vec load_words(const float* from, int count) {
    Vec result;
    std::memcpy(result.lane, from, count * sizeof(float));
    return result;
}

// A channel of those that share words.
HEADRACE_INLINE Vec widen(float, const Vec& word, int) { return word; }
HEADRACE_INLINE Vec widen(bf16, Vec word, int channel) {
    for (float& lane : word.lane) {
        uint32_t bits;
        std::memcpy(&bits, &lane, sizeof bits);
        bits = channel == 0 ? bits << 16 : bits & 0xffff0000;
        std::memcpy(&lane, &bits, sizeof bits);
    }
    return word;
}
HEADRACE_INLINE Vec widen(int8_t, Vec word, int channel) {
    for (float& lane : word.lane) {
        int8_t channels[4];
        std::memcpy(channels, &lane, sizeof channels);
        lane = channels[channel];
    }
    return word;
}

}  // namespace scalar::tiles

#if defined(__x86_64__)

#define HEADRACE_AVX2 HEADRACE_TARGET_AVX2 HEADRACE_INLINE

namespace avx2::tiles {

// 12 registers of sums, and three for what is multiplied into them.
constexpr int BLOCK_ROWS = 6;
constexpr int BLOCK_VECTORS = 1;

HEADRACE_AVX2 void transpose_8x8(__m256 (&x)[8]) {
    __m256 y[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m256d a = _mm256_castps_pd(y[i + half]);
            const __m256d b = _mm256_castps_pd(y[i + 2 + half]);
            x[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            x[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
    }
    // Quarter q of x[4 j + c] holds column 4 q + c of rows 4 j to 4 j + 3.
#pragma GCC unroll 8
    for (int c = 0; c < 4; ++c) {
        y[c] = _mm256_permute2f128_ps(x[c], x[4 + c], 0x20);
        y[4 + c] = _mm256_permute2f128_ps(x[c], x[4 + c], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = y[i];
}

HEADRACE_AVX2 void transpose(Vec (&x)[LANES]) {
    __m256 top_left[8], top_right[8], bottom_left[8], bottom_right[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) top_left[i] = x[i].low;
    transpose_8x8(top_left);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) top_right[i] = x[i].high;
    transpose_8x8(top_right);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) bottom_left[i] = x[8 + i].low;
    transpose_8x8(bottom_left);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) bottom_right[i] = x[8 + i].high;
    transpose_8x8(bottom_right);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        x[i] = {top_left[i], bottom_left[i]};
        x[8 + i] = {top_right[i], bottom_right[i]};
    }
}

HEADRACE_AVX2 __m256 keep_8_lanes(__m256 x, int first, int last) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane);
    const __m256i not_behind = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane);
    const __m256i kept = _mm256_andnot_si256(before, not_behind);
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, _mm256_castsi256_ps(kept));
}

HEADRACE_AVX2 Vec keep_lanes(Vec x, int first, int last) {
    return {keep_8_lanes(x.low, first, last), keep_8_lanes(x.high, first - 8, last - 8)};
}

HEADRACE_AVX2 float largest_lane(Vec x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

HEADRACE_AVX2 float lane_sum(Vec x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

HEADRACE_AVX2 Vec load_words(const float* from, int count) {
    if (count == LANES) return Vec::load(from);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
    const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lane);
    return {_mm256_maskload_ps(from, low), _mm256_maskload_ps(from + 8, high)};
}

HEADRACE_AVX2 Vec widen(float, Vec word, int) { return word; }
HEADRACE_AVX2 __m256 widen_8(__m256 word, int channel) {
    const __m256i bits = _mm256_castps_si256(word);
    return _mm256_castsi256_ps(channel == 0 ? _mm256_slli_epi32(bits, 16)
                                            : _mm256_and_si256(bits, _mm256_set1_epi32(-65536)));
}
HEADRACE_AVX2 Vec widen(bf16, Vec word, int channel) {
    return {widen_8(word.low, channel), widen_8(word.high, channel)};
}
HEADRACE_AVX2 __m256 widen_8_bytes(__m256 word, int channel) {
    const __m256i top = _mm256_slli_epi32(_mm256_castps_si256(word), 24 - 8 * channel);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
}
HEADRACE_AVX2 Vec widen(int8_t, Vec word, int channel) {
    return {widen_8_bytes(word.low, channel), widen_8_bytes(word.high, channel)};
}

}  // namespace avx2::tiles

#undef HEADRACE_AVX2
#define HEADRACE_AVX512 HEADRACE_TARGET_AVX512 HEADRACE_INLINE

namespace avx512::tiles {

// 24 registers of sums, and five for what is multiplied into them.
constexpr int BLOCK_ROWS = 6;
constexpr int BLOCK_VECTORS = 4;

HEADRACE_AVX512 void transpose(Vec (&rows)[LANES]) {
    __m512 x[LANES], y[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2) {
        y[i] = _mm512_unpacklo_ps(rows[i].value, rows[i + 1].value);
        y[i + 1] = _mm512_unpackhi_ps(rows[i].value, rows[i + 1].value);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 4) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512d a = _mm512_castps_pd(y[i + half]);
            const __m512d b = _mm512_castps_pd(y[i + 2 + half]);
            x[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // Quarter q of x[4 j + c] holds column 4 q + c of rows 4 j to 4 j + 3.
#pragma GCC unroll 16
    for (int c = 0; c < 4; ++c) {
        const __m512 low = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x44);
        const __m512 high = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xEE);
        const __m512 low2 = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x44);
        const __m512 high2 = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xEE);
        rows[c].value = _mm512_shuffle_f32x4(low, low2, 0x88);
        rows[4 + c].value = _mm512_shuffle_f32x4(low, low2, 0xDD);
        rows[8 + c].value = _mm512_shuffle_f32x4(high, high2, 0x88);
        rows[12 + c].value = _mm512_shuffle_f32x4(high, high2, 0xDD);
    }
}

HEADRACE_AVX512 Vec keep_lanes(Vec x, int first, int last) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 kept = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(first)) &
                           _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(last));
    return {_mm512_mask_blend_ps(kept, _mm512_set1_ps(-INFINITY), x.value)};
}

HEADRACE_AVX512 float largest_lane(Vec x) { return _mm512_reduce_max_ps(x.value); }

HEADRACE_AVX512 float lane_sum(Vec x) { return _mm512_reduce_add_ps(x.value); }

HEADRACE_AVX512 Vec load_words(const float* from, int count) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << count) - 1), from)};
}

HEADRACE_AVX512 Vec widen(float, Vec word, int) { return word; }
HEADRACE_AVX512 Vec widen(bf16, Vec word, int channel) {
    const __m512i bits = _mm512_castps_si512(word.value);
    return {_mm512_castsi512_ps(channel == 0 ? _mm512_slli_epi32(bits, 16)
                                             : _mm512_and_si512(bits, _mm512_set1_epi32(-65536)))};
}
HEADRACE_AVX512 Vec widen(int8_t, Vec word, int channel) {
    const __m512i top = _mm512_slli_epi32(_mm512_castps_si512(word.value), 24 - 8 * channel);
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24))};
}

}  // namespace avx512::tiles

#undef HEADRACE_AVX512
#endif  // __x86_64__

}  // namespace headrace::cpu
