// Rows of a table as fp32; compiled by foreach_isa.h.

namespace headrace::cpu::HEADRACE_ISA {

template <class W>
void widen_row(const W* row, int64_t size, float* out) {
    for (int64_t i = 0; i < size; i += LANES) {
        store_first(load_first(row + i, size - i), out + i, size - i);
    }
}

}  // namespace headrace::cpu::HEADRACE_ISA
