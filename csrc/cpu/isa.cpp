#include "headrace/cpu/isa.h"

#include <atomic>

namespace headrace::cpu {
namespace {

Isa detect() {
#if defined(__x86_64__)
    // These ask the operating system too, whether it saves the wide registers.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) {
        return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
        return Isa::avx2;
    }
#endif
    return Isa::scalar;
}

std::atomic<Isa>& current() {
    static std::atomic<Isa> level{best_isa()};
    return level;
}

}  // namespace

Isa best_isa() {
    static const Isa best = detect();
    return best;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

void set_isa(Isa level) { current().store(level, std::memory_order_relaxed); }

}  // namespace headrace::cpu
