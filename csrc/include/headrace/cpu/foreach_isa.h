// Compiles the file HEADRACE_KERNELS once for each instruction set, in namespaces of their names.
// That file has no include guard, includes nothing, and opens namespace headrace::cpu::HEADRACE_ISA.
#include "headrace/cpu/isa.h"
#include "headrace/cpu/vec.h"

#define HEADRACE_ISA scalar
#include "headrace/cpu/vec_math.h"
#include HEADRACE_KERNELS
#undef HEADRACE_ISA

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define HEADRACE_ISA avx2
#include "headrace/cpu/vec_math.h"
#include HEADRACE_KERNELS
#undef HEADRACE_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((           \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")
#endif
#define HEADRACE_ISA avx512
#include "headrace/cpu/vec_math.h"
#include HEADRACE_KERNELS
#undef HEADRACE_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// Calls the variant of a function template for the instruction set in use.
#define HEADRACE_DISPATCH(function, ...)                                     \
    switch (::headrace::cpu::isa()) {                                        \
        case ::headrace::cpu::Isa::avx512:                                   \
            ::headrace::cpu::avx512::function(__VA_ARGS__);                  \
            break;                                                           \
        case ::headrace::cpu::Isa::avx2:                                     \
            ::headrace::cpu::avx2::function(__VA_ARGS__);                    \
            break;                                                           \
        case ::headrace::cpu::Isa::scalar:                                   \
            ::headrace::cpu::scalar::function(__VA_ARGS__);                  \
            break;                                                           \
    }

#else

#define HEADRACE_DISPATCH(function, ...) ::headrace::cpu::scalar::function(__VA_ARGS__)

#endif
