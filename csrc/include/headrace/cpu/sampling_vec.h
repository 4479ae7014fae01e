// What sampling_chunk.h needs beyond vec.h on each instruction set: masks of comparisons, exact sums
// of integers, and the words of 16 Philox counters.
#pragma once

#include <bit>
#include <cstdint>

#include "headrace/cpu/sampling_types.h"
#include "headrace/cpu/vec.h"

namespace headrace::cpu {

// ---- scalar ------------------------------------------------------------------------------------

namespace scalar::lanes {

// Bit i of a mask is of lane i.
HEADRACE_INLINE uint32_t at_least(const Vec& a, const Vec& b) {
    uint32_t mask = 0;
    for (int i = 0; i < LANES; ++i) mask |= uint32_t{a.lane[i] >= b.lane[i]} << i;
    return mask;
}
HEADRACE_INLINE uint32_t equal(const Vec& a, const Vec& b) {
    uint32_t mask = 0;
    for (int i = 0; i < LANES; ++i) mask |= uint32_t{a.lane[i] == b.lane[i]} << i;
    return mask;
}
// Where either is NaN.
HEADRACE_INLINE uint32_t unordered(const Vec& a, const Vec& b) {
    uint32_t mask = 0;
    for (int i = 0; i < LANES; ++i) {
        mask |= uint32_t{a.lane[i] != a.lane[i] || b.lane[i] != b.lane[i]} << i;
    }
    return mask;
}
// To an integer, ties to even; of numbers that are not negative.
HEADRACE_INLINE Vec to_integers(Vec x) {
    for (float& lane : x.lane) lane = lane < 0x1p23F ? (lane + 0x1p23F) - 0x1p23F : lane;
    return x;
}
// (2^32 - 1 - word) / 2^8, rounded down.
HEADRACE_INLINE Vec complements(const uint32_t* words) {
    Vec result;
    for (int i = 0; i < LANES; ++i) result.lane[i] = static_cast<float>(~words[i] >> 8);
    return result;
}

// Writes the lanes of the mask side by side, and first + lane of each; returns their number. There
// is room for all lanes.
HEADRACE_INLINE int64_t pack(const Vec& x, uint32_t mask, int32_t first, float* to, int32_t* ids) {
    int64_t count = 0;
    for (; mask != 0; mask &= mask - 1) {
        const int lane = std::countr_zero(mask);
        to[count] = x.lane[lane];
        ids[count++] = first + lane;
    }
    return count;
}
// x where a < b, and 0.
HEADRACE_INLINE Vec where_less(const Vec& a, const Vec& b, Vec x) {
    for (int i = 0; i < LANES; ++i) x.lane[i] = a.lane[i] < b.lane[i] ? x.lane[i] : 0.0F;
    return x;
}

// Of integers below 2^53 in total: no order changes it.
struct IntegerSum {
    double value = 0;

    HEADRACE_INLINE void add(const Vec& x) {
        for (const float lane : x.lane) value += lane;
    }
    HEADRACE_INLINE double total() const { return value; }
};

// The words of the 64 tokens from 4 * first_counter on, in the order of the tokens.
inline void philox_block(uint32_t first_counter, const sampling::NoiseKey& key, uint32_t* words) {
    for (uint32_t i = 0; i < 16; ++i) sampling::philox_words(first_counter + i, key, words + 4 * i);
}

}  // namespace scalar::lanes

#if defined(__x86_64__)

// ---- avx2 --------------------------------------------------------------------------------------

#define HEADRACE_AVX2 HEADRACE_TARGET_AVX2 HEADRACE_INLINE

namespace avx2::lanes {

HEADRACE_AVX2 uint32_t mask_of(__m256 low, __m256 high) {
    return static_cast<uint32_t>(_mm256_movemask_ps(low)) |
           static_cast<uint32_t>(_mm256_movemask_ps(high)) << 8;
}
HEADRACE_AVX2 uint32_t at_least(Vec a, Vec b) {
    return mask_of(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ),
                   _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
}
HEADRACE_AVX2 uint32_t equal(Vec a, Vec b) {
    return mask_of(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ),
                   _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ));
}
HEADRACE_AVX2 uint32_t unordered(Vec a, Vec b) {
    return mask_of(_mm256_cmp_ps(a.low, b.low, _CMP_UNORD_Q),
                   _mm256_cmp_ps(a.high, b.high, _CMP_UNORD_Q));
}
HEADRACE_AVX2 Vec to_integers(Vec x) { return x.round(); }
HEADRACE_AVX2 __m256 complements_of_8(const uint32_t* words) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    return _mm256_cvtepi32_ps(
        _mm256_srli_epi32(_mm256_xor_si256(word, _mm256_set1_epi32(-1)), 8));
}
HEADRACE_AVX2 Vec complements(const uint32_t* words) {
    return {complements_of_8(words), complements_of_8(words + 8)};
}

HEADRACE_AVX2 int64_t pack(Vec x, uint32_t mask, int32_t first, float* to, int32_t* ids) {
    float lane[LANES];
    x.store(lane);
    int64_t count = 0;
    for (; mask != 0; mask &= mask - 1) {
        const int i = std::countr_zero(mask);
        to[count] = lane[i];
        ids[count++] = first + i;
    }
    return count;
}
HEADRACE_AVX2 Vec where_less(Vec a, Vec b, Vec x) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), x.low),
            _mm256_and_ps(_mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ), x.high)};
}

struct IntegerSum {
    __m256d low, high;

    HEADRACE_AVX2 IntegerSum() : low(_mm256_setzero_pd()), high(_mm256_setzero_pd()) {}
    HEADRACE_AVX2 void add(Vec x) {
        low = _mm256_add_pd(low, sum_of_8(x.low));
        high = _mm256_add_pd(high, sum_of_8(x.high));
    }
    HEADRACE_AVX2 double total() const {
        double lane[4];
        _mm256_storeu_pd(lane, _mm256_add_pd(low, high));
        return (lane[0] + lane[1]) + (lane[2] + lane[3]);
    }

  private:
    HEADRACE_AVX2 static __m256d sum_of_8(__m256 x) {
        return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)),
                             _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    }
};

// A counter has a 64-bit lane for each of its words: a multiplication reads the low halves alone,
// so that what is above them need not be cleared.
HEADRACE_TARGET_AVX2 inline void philox_block(uint32_t first_counter,
                                              const sampling::NoiseKey& key, uint32_t* words) {
    using namespace sampling;
    constexpr int SETS = 4;  // of four counters
    __m256i word[4][SETS];
    for (int set = 0; set < SETS; ++set) {
        // In the order that the interleaving at the end undoes.
        const auto counter = static_cast<int64_t>(first_counter + 4 * set);
        word[0][set] = _mm256_add_epi64(_mm256_set1_epi64x(counter), _mm256_setr_epi64x(0, 2, 1, 3));
        word[1][set] = _mm256_set1_epi64x(key.position[0]);
        word[2][set] = _mm256_set1_epi64x(key.position[1]);
        word[3][set] = _mm256_setzero_si256();
    }
    const __m256i multiplier[2] = {_mm256_set1_epi64x(philox::MULTIPLIERS[0]),
                                   _mm256_set1_epi64x(philox::MULTIPLIERS[1])};
    uint32_t round_key[2] = {key.seed[0], key.seed[1]};
    for (int round = 0; round < philox::ROUNDS; ++round) {
        const __m256i keys[2] = {_mm256_set1_epi64x(round_key[0]),
                                 _mm256_set1_epi64x(round_key[1])};
#pragma GCC unroll 4
        for (int set = 0; set < SETS; ++set) {
            const __m256i first = _mm256_mul_epu32(word[0][set], multiplier[0]);
            const __m256i second = _mm256_mul_epu32(word[2][set], multiplier[1]);
            word[0][set] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(second, 32), keys[0]),
                                            word[1][set]);
            word[1][set] = second;
            word[2][set] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(first, 32), keys[1]),
                                            word[3][set]);
            word[3][set] = first;
        }
        for (int i = 0; i < 2; ++i) round_key[i] += philox::WEYL[i];
    }
    auto* to = reinterpret_cast<__m256i*>(words);
    for (int set = 0; set < SETS; ++set) {
        const __m256i low = _mm256_blend_epi32(word[0][set], _mm256_slli_epi64(word[1][set], 32),
                                               0b10101010);
        const __m256i high = _mm256_blend_epi32(word[2][set], _mm256_slli_epi64(word[3][set], 32),
                                                0b10101010);
        _mm256_storeu_si256(to + 2 * set, _mm256_unpacklo_epi64(low, high));
        _mm256_storeu_si256(to + 2 * set + 1, _mm256_unpackhi_epi64(low, high));
    }
}

}  // namespace avx2::lanes

// ---- avx512 ------------------------------------------------------------------------------------

#define HEADRACE_AVX512 HEADRACE_TARGET_AVX512 HEADRACE_INLINE

namespace avx512::lanes {

HEADRACE_AVX512 uint32_t at_least(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a.value, b.value, _CMP_GE_OQ);
}
HEADRACE_AVX512 uint32_t equal(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a.value, b.value, _CMP_EQ_OQ);
}
HEADRACE_AVX512 uint32_t unordered(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a.value, b.value, _CMP_UNORD_Q);
}
HEADRACE_AVX512 Vec to_integers(Vec x) { return x.round(); }
HEADRACE_AVX512 Vec complements(const uint32_t* words) {
    const __m512i word = _mm512_loadu_si512(words);
    return {_mm512_cvtepi32_ps(
        _mm512_srli_epi32(_mm512_xor_si512(word, _mm512_set1_epi32(-1)), 8))};
}

HEADRACE_AVX512 int64_t pack(Vec x, uint32_t mask, int32_t first, float* to, int32_t* ids) {
    const auto chosen = static_cast<__mmask16>(mask);
    const __m512i id = _mm512_add_epi32(
        _mm512_set1_epi32(first),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    // To a register first: stores of chosen lanes are slow on some CPUs.
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(chosen, x.value));
    _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(chosen, id));
    return std::popcount(mask);
}
HEADRACE_AVX512 Vec where_less(Vec a, Vec b, Vec x) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.value, b.value, _CMP_LT_OQ), x.value)};
}

struct IntegerSum {
    __m512d value;

    HEADRACE_AVX512 IntegerSum() : value(_mm512_setzero_pd()) {}
    HEADRACE_AVX512 void add(Vec x) {
        const __m256 low = _mm512_castps512_ps256(x.value);
        const __m256 high = _mm512_extractf32x8_ps(x.value, 1);
        value = _mm512_add_pd(value,
                              _mm512_add_pd(_mm512_cvtps_pd(low), _mm512_cvtps_pd(high)));
    }
    HEADRACE_AVX512 double total() const {
        double lane[8];
        _mm512_storeu_pd(lane, value);
        double sum = 0;
        for (const double part : lane) sum += part;
        return sum;
    }
};

// As on avx2, with eight counters side by side.
HEADRACE_TARGET_AVX512 inline void philox_block(uint32_t first_counter,
                                                const sampling::NoiseKey& key, uint32_t* words) {
    using namespace sampling;
    constexpr int SETS = 2;
    __m512i word[4][SETS];
    for (int set = 0; set < SETS; ++set) {
        const auto counter = static_cast<int64_t>(first_counter + 8 * set);
        word[0][set] = _mm512_add_epi64(_mm512_set1_epi64(counter),
                                        _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
        word[1][set] = _mm512_set1_epi64(key.position[0]);
        word[2][set] = _mm512_set1_epi64(key.position[1]);
        word[3][set] = _mm512_setzero_si512();
    }
    const __m512i multiplier[2] = {_mm512_set1_epi64(philox::MULTIPLIERS[0]),
                                   _mm512_set1_epi64(philox::MULTIPLIERS[1])};
    constexpr int XOR3 = 0x96;
    uint32_t round_key[2] = {key.seed[0], key.seed[1]};
#pragma GCC unroll 10
    for (int round = 0; round < philox::ROUNDS; ++round) {
        const __m512i keys[2] = {_mm512_set1_epi64(round_key[0]), _mm512_set1_epi64(round_key[1])};
#pragma GCC unroll 2
        for (int set = 0; set < SETS; ++set) {
            const __m512i first = _mm512_mul_epu32(word[0][set], multiplier[0]);
            const __m512i second = _mm512_mul_epu32(word[2][set], multiplier[1]);
            word[0][set] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(second, 32), keys[0],
                                                     word[1][set], XOR3);
            word[1][set] = second;
            word[2][set] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(first, 32), keys[1],
                                                     word[3][set], XOR3);
            word[3][set] = first;
        }
        for (int i = 0; i < 2; ++i) round_key[i] += philox::WEYL[i];
    }
    for (int set = 0; set < SETS; ++set) {
        const __m512i low = _mm512_mask_blend_epi32(0xAAAA, word[0][set],
                                                    _mm512_slli_epi64(word[1][set], 32));
        const __m512i high = _mm512_mask_blend_epi32(0xAAAA, word[2][set],
                                                     _mm512_slli_epi64(word[3][set], 32));
        _mm512_storeu_si512(words + 32 * set, _mm512_unpacklo_epi64(low, high));
        _mm512_storeu_si512(words + 32 * set + 16, _mm512_unpackhi_epi64(low, high));
    }
}

}  // namespace avx512::lanes

#undef HEADRACE_AVX2
#undef HEADRACE_AVX512
#endif  // __x86_64__

}  // namespace headrace::cpu
