// Sixteen floats as one value, on every instruction set: what a kernel adds up and in which order
// is the same on all of them. Only the fused multiply-add of the scalar level rounds twice.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "headrace/cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace::cpu {

struct bf16 {
    uint16_t bits;
};

constexpr int LANES = 16;

// exp(x) = 2^n exp(r), |r| <= ln(2) / 2: n ln(2) in two parts keeps r exact, and the polynomial is
// the best of degree 4 for (exp(r) - 1 - r) / r^2 (relative error of exp 3e-9 before rounding). Beyond
// +-LIMIT the result is infinity or 0 already, and n would leave the range of an exponent.
namespace exponential {
constexpr float LIMIT = 150.0F;
constexpr float LOG2_E = 1.44269504F;
constexpr float LN2_HIGH = 0x1.63p-1F;
constexpr float LN2_LOW = -2.12194440e-4F;
constexpr float POLYNOMIAL[] = {1.381459879e-3F, 8.368716575e-3F, 4.166838899e-2F,
                                1.666652113e-1F, 4.999999404e-1F};
}  // namespace exponential

// ---- scalar ------------------------------------------------------------------------------------

namespace scalar {

struct Vec {
    float lane[LANES];

    static Vec set(float value) {
        Vec result;
        for (float& lane : result.lane) lane = value;
        return result;
    }
    static Vec load(const float* from) {
        Vec result;
        std::memcpy(result.lane, from, sizeof result.lane);
        return result;
    }
    static Vec load(const bf16* from) {
        Vec result;
        for (int i = 0; i < LANES; ++i) {
            const uint32_t bits = uint32_t{from[i].bits} << 16;
            std::memcpy(&result.lane[i], &bits, sizeof bits);
        }
        return result;
    }
    static Vec load(const int8_t* from) {
        Vec result;
        for (int i = 0; i < LANES; ++i) result.lane[i] = from[i];
        return result;
    }
    void store(float* to) const { std::memcpy(to, lane, sizeof lane); }
    // Rounds to nearest, ties to even; NaN stays NaN.
    void store(bf16* to) const {
        for (int i = 0; i < LANES; ++i) {
            uint32_t bits;
            std::memcpy(&bits, &lane[i], sizeof bits);
            const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
            to[i].bits = (lane[i] != lane[i] ? bits | 0x400000 : rounded) >> 16;
        }
    }
    // Of integers from -127 to 127; of NaN, anything.
    void store(int8_t* to) const {
        for (int i = 0; i < LANES; ++i) {
            to[i] = lane[i] == lane[i] ? static_cast<int8_t>(lane[i]) : int8_t{0};
        }
    }
    friend Vec operator+(Vec a, const Vec& b) {
        for (int i = 0; i < LANES; ++i) a.lane[i] += b.lane[i];
        return a;
    }
    friend Vec operator-(Vec a, const Vec& b) {
        for (int i = 0; i < LANES; ++i) a.lane[i] -= b.lane[i];
        return a;
    }
    friend Vec operator*(Vec a, const Vec& b) {
        for (int i = 0; i < LANES; ++i) a.lane[i] *= b.lane[i];
        return a;
    }
    friend Vec operator/(Vec a, const Vec& b) {
        for (int i = 0; i < LANES; ++i) a.lane[i] /= b.lane[i];
        return a;
    }
    // a * b + c
    static Vec fma(const Vec& a, const Vec& b, const Vec& c) { return a * b + c; }
    // The second if either is NaN.
    static Vec min(const Vec& a, Vec b) {
        for (int i = 0; i < LANES; ++i) b.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
        return b;
    }
    static Vec max(const Vec& a, Vec b) {
        for (int i = 0; i < LANES; ++i) b.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
        return b;
    }
    Vec round() const {
        Vec result;
        // Of numbers below 2^22: this sum has no bits for a fraction.
        for (int i = 0; i < LANES; ++i) result.lane[i] = (lane[i] + 0x1.8p23F) - 0x1.8p23F;
        return result;
    }
    // 2^n for integers -126 <= n <= 127.
    Vec exp2_of_integer() const {
        Vec result;
        for (int i = 0; i < LANES; ++i) {
            const float n = lane[i] == lane[i] ? lane[i] : 0.0F;
            const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
            std::memcpy(&result.lane[i], &bits, sizeof bits);
        }
        return result;
    }
};

}  // namespace scalar

#if defined(__x86_64__)

// ---- avx2 --------------------------------------------------------------------------------------

#define HEADRACE_AVX2 HEADRACE_TARGET_AVX2 HEADRACE_INLINE

namespace avx2 {

struct Vec {
    __m256 low, high;

    HEADRACE_AVX2 static Vec set(float value) {
        return {_mm256_set1_ps(value), _mm256_set1_ps(value)};
    }
    HEADRACE_AVX2 static Vec load(const float* from) {
        return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    }
    HEADRACE_AVX2 static Vec load(const bf16* from) { return {widen(from), widen(from + 8)}; }
    HEADRACE_AVX2 static Vec load(const int8_t* from) { return {widen(from), widen(from + 8)}; }
    HEADRACE_AVX2 void store(float* to) const {
        _mm256_storeu_ps(to, low);
        _mm256_storeu_ps(to + 8, high);
    }
    HEADRACE_AVX2 void store(bf16* to) const {
        const __m256i packed = _mm256_packus_epi32(narrow(low), narrow(high));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            _mm256_permute4x64_epi64(packed, 0b11'01'10'00));
    }
    HEADRACE_AVX2 void store(int8_t* to) const {
        const __m256i words =
            _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
        const __m256i ordered = _mm256_permute4x64_epi64(words, 0b11'01'10'00);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm_packs_epi16(_mm256_castsi256_si128(ordered),
                                         _mm256_extracti128_si256(ordered, 1)));
    }
    HEADRACE_AVX2 friend Vec operator+(Vec a, Vec b) {
        return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
    }
    HEADRACE_AVX2 friend Vec operator-(Vec a, Vec b) {
        return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
    }
    HEADRACE_AVX2 friend Vec operator*(Vec a, Vec b) {
        return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
    }
    HEADRACE_AVX2 friend Vec operator/(Vec a, Vec b) {
        return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
    }
    HEADRACE_AVX2 static Vec fma(Vec a, Vec b, Vec c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    HEADRACE_AVX2 static Vec min(Vec a, Vec b) {
        return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
    }
    HEADRACE_AVX2 static Vec max(Vec a, Vec b) {
        return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
    }
    HEADRACE_AVX2 Vec round() const {
        return {_mm256_round_ps(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    HEADRACE_AVX2 Vec exp2_of_integer() const { return {power(low), power(high)}; }

  private:
    HEADRACE_AVX2 static __m256 widen(const int8_t* from) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    }
    HEADRACE_AVX2 static __m256 widen(const bf16* from) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    HEADRACE_AVX2 static __m256i narrow(__m256 value) {
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
        return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
    }
    HEADRACE_AVX2 static __m256 power(__m256 n) {
        const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    }
};

}  // namespace avx2

// ---- avx512 ------------------------------------------------------------------------------------

#define HEADRACE_AVX512 HEADRACE_TARGET_AVX512 HEADRACE_INLINE

namespace avx512 {

struct Vec {
    __m512 value;

    HEADRACE_AVX512 static Vec set(float value) { return {_mm512_set1_ps(value)}; }
    HEADRACE_AVX512 static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
    HEADRACE_AVX512 static Vec load(const bf16* from) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
    }
    HEADRACE_AVX512 static Vec load(const int8_t* from) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
    }
    HEADRACE_AVX512 void store(float* to) const { _mm512_storeu_ps(to, value); }
    HEADRACE_AVX512 void store(int8_t* to) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value)));
    }
    // Not vcvtneps2bf16, which turns subnormal numbers into 0.
    HEADRACE_AVX512 void store(bf16* to) const {
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        const __m512i result =
            _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
    }
    HEADRACE_AVX512 friend Vec operator+(Vec a, Vec b) {
        return {_mm512_add_ps(a.value, b.value)};
    }
    HEADRACE_AVX512 friend Vec operator-(Vec a, Vec b) {
        return {_mm512_sub_ps(a.value, b.value)};
    }
    HEADRACE_AVX512 friend Vec operator*(Vec a, Vec b) {
        return {_mm512_mul_ps(a.value, b.value)};
    }
    HEADRACE_AVX512 friend Vec operator/(Vec a, Vec b) {
        return {_mm512_div_ps(a.value, b.value)};
    }
    HEADRACE_AVX512 static Vec fma(Vec a, Vec b, Vec c) {
        return {_mm512_fmadd_ps(a.value, b.value, c.value)};
    }
    HEADRACE_AVX512 static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.value, b.value)}; }
    HEADRACE_AVX512 static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.value, b.value)}; }
    HEADRACE_AVX512 Vec round() const {
        return {_mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    HEADRACE_AVX512 Vec exp2_of_integer() const {
        const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(value), _mm512_set1_epi32(127));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
    }
};

}  // namespace avx512

#undef HEADRACE_AVX2
#undef HEADRACE_AVX512
#endif  // __x86_64__

}  // namespace headrace::cpu
