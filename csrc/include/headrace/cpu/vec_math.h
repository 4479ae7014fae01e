// What the kernels compute with Vec; compiled once for each instruction set by foreach_isa.h.

namespace headrace::cpu::HEADRACE_ISA {

// The first `count` of 16 values, and zeros.
template <class T>
HEADRACE_INLINE Vec load_first(const T* from, int64_t count) {
    if (count >= LANES) return Vec::load(from);
    T padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return Vec::load(padded);
}

template <class T>
HEADRACE_INLINE void store_first(Vec value, T* to, int64_t count) {
    if (count >= LANES) {
        value.store(to);
        return;
    }
    T padded[LANES];
    value.store(padded);
    std::memcpy(to, padded, count * sizeof(T));
}

HEADRACE_INLINE float sum_of_lanes(Vec value) {
    float lane[LANES];
    value.store(lane);
    for (int i = 0; i < 8; ++i) lane[i] += lane[i + 8];
    for (int i = 0; i < 4; ++i) lane[i] += lane[i + 4];
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

HEADRACE_INLINE Vec exp(Vec x) {
    using namespace exponential;
    x = Vec::max(Vec::set(-LIMIT), Vec::min(Vec::set(LIMIT), x));
    const Vec n = (x * Vec::set(LOG2_E)).round();
    const Vec r = Vec::fma(n, Vec::set(-LN2_LOW), Vec::fma(n, Vec::set(-LN2_HIGH), x));
    Vec p = Vec::set(POLYNOMIAL[0]);
    for (int i = 1; i < 5; ++i) p = Vec::fma(p, r, Vec::set(POLYNOMIAL[i]));
    p = Vec::fma(p, r * r, r + Vec::set(1.0F));
    // In two factors, so that results near the ends of the range are subnormal or infinite.
    const Vec half = (n * Vec::set(0.5F)).round();
    return p * half.exp2_of_integer() * (n - half).exp2_of_integer();
}

}  // namespace headrace::cpu::HEADRACE_ISA
