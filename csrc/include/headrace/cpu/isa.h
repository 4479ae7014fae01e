// Which instructions the CPU kernels use, and the attributes that compile a function for them.
#pragma once

namespace headrace::cpu {

enum class Isa { scalar, avx2, avx512 };

// The best level of this CPU, found once, unless set_isa chose another.
Isa isa();
Isa best_isa();
// A level of this CPU or one below it; for tests.
void set_isa(Isa level);

}  // namespace headrace::cpu

// Attributes do not reach lambdas: a target function is called from a lambda, never written as one.
#if defined(__x86_64__)
#define HEADRACE_TARGET_AVX512                                                            \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16," \
                          "avx2,fma,f16c")))
#define HEADRACE_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define HEADRACE_TARGET_AVX512
#define HEADRACE_TARGET_AVX2
#endif
#define HEADRACE_INLINE inline __attribute__((always_inline))
#define HEADRACE_INLINE_LAMBDA __attribute__((always_inline))
