// RMSNorm of rows, with and without the residual add; compiled by foreach_isa.h.

namespace headrace::cpu::HEADRACE_ISA {

// Four sums, of the vectors 0, 4, 8..., 1, 5, 9... and so on, hide the latency of the addition.
struct SumOfSquares {
    Vec parts[4];

    // Written out: an implicit constructor is compiled without the instructions of Vec.
    HEADRACE_INLINE SumOfSquares()
        : parts{Vec::set(0.0F), Vec::set(0.0F), Vec::set(0.0F), Vec::set(0.0F)} {}
    HEADRACE_INLINE void add(int part, Vec value) {
        parts[part] = Vec::fma(value, value, parts[part]);
    }
    HEADRACE_INLINE float total() const {
        return sum_of_lanes((parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
};

// Calls f(part, i, count) for the vectors of `size` values: value i of `count` <= 16.
template <class F>
HEADRACE_INLINE void for_each_vector(int64_t size, F&& f) {
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) {
        f(0, i, LANES);
        f(1, i + LANES, LANES);
        f(2, i + 2 * LANES, LANES);
        f(3, i + 3 * LANES, LANES);
    }
    for (int part = 0; i < size; ++part, i += LANES) f(part, i, size - i);
}

HEADRACE_INLINE Vec reciprocal_rms(const SumOfSquares& squares, int64_t size, float eps) {
    return Vec::set(1.0F / std::sqrt(squares.total() / static_cast<float>(size) + eps));
}

template <class X, class Out>
HEADRACE_INLINE void scale_row(const X* x, Vec scale, const float* weight, int64_t size, Out* out) {
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = size - i;
        store_first(load_first(x + i, count) * scale * load_first(weight + i, count), out + i,
                    count);
    }
}

template <class X, class Out>
void rms_norm_row(const X* x, const float* weight, int64_t size, float eps, Out* out) {
    SumOfSquares squares;
    for_each_vector(size, [&](int part, int64_t i, int64_t count) HEADRACE_INLINE_LAMBDA {
        squares.add(part, load_first(x + i, count));
    });
    scale_row(x, reciprocal_rms(squares, size, eps), weight, size, out);
}

template <class X, class Out>
void add_rms_norm_row(const X* x, float* residual, const float* weight, int64_t size, float eps,
                      Out* out) {
    SumOfSquares squares;
    for_each_vector(size, [&](int part, int64_t i, int64_t count) HEADRACE_INLINE_LAMBDA {
        const Vec total = load_first(residual + i, count) + load_first(x + i, count);
        store_first(total, residual + i, count);
        squares.add(part, total);
    });
    scale_row(residual, reciprocal_rms(squares, size, eps), weight, size, out);
}

}  // namespace headrace::cpu::HEADRACE_ISA
