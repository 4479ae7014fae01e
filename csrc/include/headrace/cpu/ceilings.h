// Loops at the limits of a core; compiled by foreach_isa.h.

namespace headrace::cpu::HEADRACE_ISA::ceilings {

// Many steps of sums that do not wait for each other; returns the operations they made.
template <class Step>
double repeat() {
    typename Step::Sum hidden[Step::SUMS] = {}, sums[Step::SUMS];
    // The compiler must neither know that the sums are alike nor that nobody wants them.
    asm volatile("" : "+m"(hidden));
#pragma GCC unroll 12
    for (int i = 0; i < Step::SUMS; ++i) sums[i] = hidden[i];
    for (int64_t step = 0; step < STEPS; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < Step::SUMS; ++i) sums[i] = Step::add_product(sums[i]);
    }
#pragma GCC unroll 12
    for (int i = 0; i < Step::SUMS; ++i) hidden[i] = sums[i];
    asm volatile("" : "+m"(hidden));
    return static_cast<double>(STEPS * Step::SUMS * Step::OPERATIONS);
}

double read(const float* memory) {
    Vec hidden[4], sums[4] = {Vec::set(0.0F), Vec::set(0.0F), Vec::set(0.0F), Vec::set(0.0F)};
    for (int64_t i = 0; i < READ_CHUNK; i += 4 * LANES) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            sums[part] = sums[part] + Vec::load(memory + i + part * LANES);
        }
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) hidden[part] = sums[part];
    asm volatile("" : "+m"(hidden));
    return static_cast<double>(READ_CHUNK * sizeof(float));
}

void measure(Kind kind, const float* memory, double* done) {
    switch (kind) {
        case Kind::read:
            *done = read(memory);
            break;
        case Kind::fp32:
            *done = repeat<Fp32>();
            break;
        case Kind::bf16:
            *done = repeat<Bf16>();
            break;
        case Kind::int8:
            *done = repeat<Int8>();
            break;
    }
}

}  // namespace headrace::cpu::HEADRACE_ISA::ceilings
