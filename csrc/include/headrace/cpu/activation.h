// Gated activations of rows; compiled by foreach_isa.h.

namespace headrace::cpu::HEADRACE_ISA {

template <class T>
void silu_and_mul_row(const T* gate, const T* up, int64_t size, T* out) {
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = size - i;
        const Vec g = load_first(gate + i, count);
        const Vec silu = g / (Vec::set(1.0F) + exp(Vec::set(0.0F) - g));
        store_first(silu * load_first(up + i, count), out + i, count);
    }
}

}  // namespace headrace::cpu::HEADRACE_ISA
