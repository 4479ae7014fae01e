// Products of bf16 by AVX512-BF16, which multiplies and adds two neighbours at once, with one
// rounding and subnormal numbers as 0.
#pragma once

#if defined(__x86_64__)

namespace headrace::cpu::avx512::linear {

template <>
struct Values<bf16> {
    static constexpr int COUNT = 2 * LANES;
    __m512i value;

    static HEADRACE_TARGET_AVX512 HEADRACE_INLINE Values load(const bf16* from) {
        return {_mm512_loadu_si512(from)};
    }
    static HEADRACE_TARGET_AVX512 HEADRACE_INLINE Values load_first(const bf16* from,
                                                                    int64_t count) {
        const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
        return {_mm512_maskz_loadu_epi16(mask, from)};
    }
    static HEADRACE_TARGET_AVX512 HEADRACE_INLINE Vec add_product(const Values& a, const Values& b,
                                                                  const Vec& sum) {
        return {_mm512_dpbf16_ps(sum.value, reinterpret_cast<__m512bh>(a.value),
                                 reinterpret_cast<__m512bh>(b.value))};
    }
};

}  // namespace headrace::cpu::avx512::linear

#endif  // __x86_64__
