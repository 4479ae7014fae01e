// headrace::ceiling, an aid of the benchmarks: what this machine can do at most with the threads and
// the instruction set in use, so that the speed of a kernel can be given as a fraction of it.
#include <torch/csrc/stable/library.h>

#include <array>
#include <string>

#include "checks.h"

namespace headrace::cpu {
namespace {

constexpr int64_t READ_CHUNK = 64 << 10;  // floats
constexpr int64_t STEPS = 1 << 13;

enum class Kind { read, fp32, bf16, int8 };
constexpr std::array<const char*, 4> KINDS = {"read", "fp32", "bf16", "int8"};

}  // namespace

// Each step is the fastest way to multiply and add that the kernels of that level use. There are as
// many sums as hide the latency of a step and find room in the registers.

namespace scalar::ceilings {

struct Fp32 {
    using Sum = Vec;
    static constexpr int SUMS = 2;
    static constexpr int64_t OPERATIONS = 2 * LANES;
    static HEADRACE_INLINE Vec add_product(const Vec& sum) { return Vec::fma(sum, sum, sum); }
};
using Bf16 = Fp32;
struct Int8 {
    using Sum = int32_t;
    static constexpr int SUMS = 6;
    static constexpr int64_t OPERATIONS = 2;
    static HEADRACE_INLINE Sum add_product(Sum sum) { return sum + sum * sum; }
};

}  // namespace scalar::ceilings

#if defined(__x86_64__)

namespace avx2::ceilings {

struct Fp32 {
    using Sum = Vec;
    static constexpr int SUMS = 6;
    static constexpr int64_t OPERATIONS = 2 * LANES;
    static HEADRACE_TARGET_AVX2 HEADRACE_INLINE Vec add_product(Vec sum) {
        return Vec::fma(sum, sum, sum);
    }
};
using Bf16 = Fp32;
struct Int8 {
    using Sum = __m256i;
    static constexpr int SUMS = 12;
    static constexpr int64_t OPERATIONS = 64;
    static HEADRACE_TARGET_AVX2 HEADRACE_INLINE Sum add_product(Sum sum) {
        const __m256i pairs = _mm256_maddubs_epi16(sum, sum);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, sum));
    }
};

}  // namespace avx2::ceilings

namespace avx512::ceilings {

struct Fp32 {
    using Sum = Vec;
    static constexpr int SUMS = 12;
    static constexpr int64_t OPERATIONS = 2 * LANES;
    static HEADRACE_TARGET_AVX512 HEADRACE_INLINE Vec add_product(Vec sum) {
        return Vec::fma(sum, sum, sum);
    }
};
struct Bf16 {
    using Sum = __m512;
    static constexpr int SUMS = 12;
    static constexpr int64_t OPERATIONS = 4 * LANES;
    static HEADRACE_TARGET_AVX512 HEADRACE_INLINE Sum add_product(Sum sum) {
        const auto pairs = reinterpret_cast<__m512bh>(sum);
        return _mm512_dpbf16_ps(sum, pairs, pairs);
    }
};
struct Int8 {
    using Sum = __m512i;
    static constexpr int SUMS = 12;
    static constexpr int64_t OPERATIONS = 8 * LANES;
    static HEADRACE_TARGET_AVX512 HEADRACE_INLINE Sum add_product(Sum sum) {
        return _mm512_dpbusd_epi32(sum, sum, sum);
    }
};

}  // namespace avx512::ceilings

#endif  // __x86_64__
}  // namespace headrace::cpu

#define HEADRACE_KERNELS "headrace/cpu/ceilings.h"
#include "headrace/cpu/foreach_isa.h"

namespace headrace::cpu {
namespace {

void ceiling(std::string name, Tensor memory, Tensor done) {
    size_t kind = 0;
    while (kind < KINDS.size() && name != KINDS[kind]) ++kind;
    STD_TORCH_CHECK(kind < KINDS.size(), "there is no ceiling ", name);
    check_vector("memory", memory, ScalarType::Float, memory.numel());
    check_vector("done", done, ScalarType::Double, done.numel());
    STD_TORCH_CHECK(name != "read" || memory.numel() >= done.numel() * READ_CHUNK,
                    "memory must hold ", READ_CHUNK, " values a chunk");
    const auto* from = data<const float>(memory);
    auto* to = data<double>(done);
    parallel_for(done.numel(), [&](int64_t chunk) {
        const float* const own = from + (kind == 0 ? chunk * READ_CHUNK : 0);
        HEADRACE_DISPATCH(ceilings::measure, static_cast<Kind>(kind), own, to + chunk);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    // kind: read, fp32, bf16 or int8. done: float64, for each chunk the bytes of `memory` read, or
    // the additions and multiplications made.
    m.def("ceiling(str kind, Tensor memory, Tensor(a!) done) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) { m.impl("ceiling", TORCH_BOX(&ceiling)); }

}  // namespace headrace::cpu
