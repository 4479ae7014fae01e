// The number formats of the CUDA kernels: bf16, fp16, e4m3 and int8, one at a time and in pairs.
// The same on a host, without the intrinsics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define HEADRACE_DEVICE __device__ __forceinline__
#define HEADRACE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HEADRACE_DEVICE inline
#define HEADRACE_HOST_DEVICE inline
#endif
#if defined(__CUDACC__)
#define HEADRACE_PRAGMA(text) _Pragma(#text)
#define HEADRACE_UNROLL HEADRACE_PRAGMA(unroll)
#define HEADRACE_UNROLL_BY(count) HEADRACE_PRAGMA(unroll count)
#else
#define HEADRACE_UNROLL
#define HEADRACE_UNROLL_BY(count)
#endif

namespace headrace::cuda {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};
// arXiv 2209.05433: no infinity, largest value 448.
struct e4m3 {
    uint8_t bits;
};

template <class To, class From>
HEADRACE_HOST_DEVICE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

#define HEADRACE_INFINITY ::headrace::cuda::bit_cast<float>(0x7f800000U)

HEADRACE_HOST_DEVICE float to_float(float x) { return x; }
HEADRACE_HOST_DEVICE float to_float(int8_t x) { return static_cast<float>(x); }
HEADRACE_HOST_DEVICE float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
HEADRACE_HOST_DEVICE float to_float(fp16 x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
    return y;
#else
    // The exponents differ by 112; a product also normalises subnormal numbers.
    const float magnitude = bit_cast<float>(uint32_t{x.bits & 0x7fffU} << 13) * 0x1p112F;
    const bool finite = (x.bits & 0x7c00U) != 0x7c00U;
    const uint32_t bits =
        finite ? bit_cast<uint32_t>(magnitude) : 0x7f800000U | uint32_t{x.bits & 0x3ffU} << 13;
    return bit_cast<float>(bits | uint32_t{x.bits & 0x8000U} << 16);
#endif
}
HEADRACE_HOST_DEVICE float to_float(e4m3 x) {
    if ((x.bits & 0x7f) == 0x7f) return bit_cast<float>(0x7fc00000U);
    const float magnitude = bit_cast<float>(uint32_t{x.bits & 0x7fU} << 20) * 0x1p120F;
    return x.bits & 0x80 ? -magnitude : magnitude;
}

// Rounds a float's bits to nearest, ties to even, so that `drop` low bits are 0.
HEADRACE_HOST_DEVICE uint32_t round_bits(uint32_t bits, int drop) {
    return (bits + ((1U << (drop - 1)) - 1) + (bits >> drop & 1)) >> drop << drop;
}

template <class T>
HEADRACE_HOST_DEVICE T from_float(float x);

template <>
HEADRACE_HOST_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
HEADRACE_HOST_DEVICE bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__)
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
    return y;
#else
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>(round_bits(bit_cast<uint32_t>(x), 16) >> 16)};
#endif
}
template <>
HEADRACE_HOST_DEVICE fp16 from_float<fp16>(float x) {
#if defined(__CUDA_ARCH__)
    fp16 y;
    asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
    const float magnitude = bit_cast<float>(bits & 0x7fffffffU);
    if (x != x) return {0x7fff};
    if (magnitude >= 65520.0F) return {static_cast<uint16_t>(sign | 0x7c00)};
    // Below 2^-14 the units are 2^-24: those of a float in [0.5, 1).
    if (magnitude < 0x1p-14F) {
        const uint32_t units = bit_cast<uint32_t>(magnitude + 0.5F) - bit_cast<uint32_t>(0.5F);
        return {static_cast<uint16_t>(sign | units)};
    }
    const uint32_t rounded = round_bits(bits & 0x7fffffffU, 13) - (112U << 23);
    return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}
// |x| <= 448 or NaN.
template <>
HEADRACE_HOST_DEVICE e4m3 from_float<e4m3>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(pair) : "f"(0.0F), "f"(x));
    return {static_cast<uint8_t>(pair)};
#else
    const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 24 & 0x80;
    const float magnitude = bit_cast<float>(bits & 0x7fffffffU);
    if (x != x) return {0x7f};
    // Below 2^-6 the units are 2^-9: those of a float in [2^14, 2^15).
    if (magnitude < 0x1p-6F) {
        const uint32_t units =
            bit_cast<uint32_t>(magnitude + 0x1p14F) - bit_cast<uint32_t>(0x1p14F);
        return {static_cast<uint8_t>(sign | units)};
    }
    const uint32_t rounded = round_bits(bits & 0x7fffffffU, 20) - (120U << 23);
    return {static_cast<uint8_t>(sign | rounded >> 20)};
#endif
}
// |x| <= 127.
template <>
HEADRACE_HOST_DEVICE int8_t from_float<int8_t>(float x) {
    return static_cast<int8_t>(rintf(x));
}

// Two numbers of 16 bits in a word, the first in the low half.
template <class T>
HEADRACE_HOST_DEVICE uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    if constexpr (std::is_same_v<T, bf16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
#endif
}

// a * b + c of pairs, rounded once.
template <class T>
HEADRACE_HOST_DEVICE uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
    uint32_t d;
    if constexpr (std::is_same_v<T, bf16>)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    float results[2];
    for (int half = 0; half < 2; ++half) {
        const auto part = [half](uint32_t word) {
            return to_float(T{static_cast<uint16_t>(word >> 16 * half)});
        };
        // Products and the sums that occur here are exact in float.
        results[half] = part(a) * part(b) + part(c);
    }
    return pack<T>(results[0], results[1]);
#endif
}

template <class T>
HEADRACE_HOST_DEVICE constexpr uint32_t both(uint32_t half) {
    return half | half << 16;
}

// Bytes 0 and 2 of a word, 8-bit numbers of format From, as a pair of T, exactly; bytes 1 and 3
// are ignored. NaN of e4m3 becomes 480: a cache has none, its scales carry them.
template <class T, class From>
HEADRACE_HOST_DEVICE uint32_t widen_even(uint32_t word) {
    constexpr bool BF16 = std::is_same_v<T, bf16>;
    if constexpr (std::is_same_v<From, int8_t>) {
        if constexpr (BF16) {
            // Of x = s u7..u0: (128 + u) - (128 or, if negative, 256), each a bf16 of 8 bits.
            const uint32_t value = (word & both<T>(0x7f)) | both<T>(0x4300);
            const uint32_t offset = (word & both<T>(0x80)) | both<T>(0xc300);
            return fma_pairs<T>(value, both<T>(0x3f80), offset);
        } else {
            // (1024 + x + 128) - 1152.
            const uint32_t value = ((word ^ both<T>(0x80)) & both<T>(0xff)) | both<T>(0x6400);
            return fma_pairs<T>(value, both<T>(0x3c00), both<T>(0xe480));
        }
    } else {
        // The exponents differ by 120 or 8.
        const uint32_t sign = (word & both<T>(0x80)) << 8;
        const uint32_t value = (word & both<T>(0x7f)) << (BF16 ? 4 : 7) | sign;
        return fma_pairs<T>(value, both<T>(BF16 ? 0x7b80 : 0x5c00), both<T>(0x8000));
    }
}
template <class T, class From>
HEADRACE_HOST_DEVICE uint32_t widen_odd(uint32_t word) {
    return widen_even<T, From>(word >> 8);
}

// The nibbles in bits 0-3 and 16-19 of a word less `zero`, as a pair of T.
template <class T>
HEADRACE_HOST_DEVICE uint32_t widen_nibbles(uint32_t word, bool centred) {
    constexpr bool BF16 = std::is_same_v<T, bf16>;
    const uint32_t value = (word & both<T>(0xf)) | both<T>(BF16 ? 0x4300 : 0x6400);
    const uint32_t offset = BF16 ? (centred ? 0xc308 : 0xc300) : (centred ? 0xe408 : 0xe400);
    return fma_pairs<T>(value, both<T>(BF16 ? 0x3f80 : 0x3c00), both<T>(offset));
}

}  // namespace headrace::cuda
