// x @ weight.T of row-major matrices; compiled by foreach_isa.h.
//
// A product of two rows is one sum of as many lanes as a register has, over K in ascending order,
// whatever the tile it is computed in: what a row of x gets depends on that row only. Sums over more
// than K_BLOCK values are ended and added up there, so that a tile's rows stay in the L1 cache.

namespace headrace::cpu::HEADRACE_ISA::linear {

// What one step of K multiplies: `COUNT` values of a row.
template <class T>
struct Values {
    static constexpr int COUNT = LANES;
    Vec value;

    static HEADRACE_INLINE Values load(const T* from) { return {Vec::load(from)}; }
    static HEADRACE_INLINE Values load_first(const T* from, int64_t count) {
        return {HEADRACE_ISA::load_first(from, count)};
    }
    static HEADRACE_INLINE Vec add_product(const Values& a, const Values& b, const Vec& sum) {
        return Vec::fma(a.value, b.value, sum);
    }
};

// totals[r][c] (+)= x[r] . weight[c] for ROWS rows of x and TILE_COLUMNS of the weight, of `size`
// values. The weights `ahead` elements behind are fetched into the cache.
template <int ROWS, class T>
void add_products(const T* x, int64_t x_stride, const T* const* weight, int64_t ahead, int64_t size,
                  float* totals, int64_t totals_stride, bool first) {
    Vec sums[ROWS][TILE_COLUMNS];
    const T* column[TILE_COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < TILE_COLUMNS; ++c) {
        column[c] = weight[c];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) sums[r][c] = Vec::set(0.0F);
    }
    int64_t k = 0;
    Values<T> w[TILE_COLUMNS];
    for (; k + Values<T>::COUNT <= size; k += Values<T>::COUNT) {
#pragma GCC unroll 4
        for (int c = 0; c < TILE_COLUMNS; ++c) {
            w[c] = Values<T>::load(column[c] + k);
            prefetch(column[c] + k + ahead);
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const Values<T> row = Values<T>::load(x + r * x_stride + k);
#pragma GCC unroll 4
            for (int c = 0; c < TILE_COLUMNS; ++c) {
                sums[r][c] = Values<T>::add_product(row, w[c], sums[r][c]);
            }
        }
    }
    if (const int64_t rest = size - k; rest > 0) {
#pragma GCC unroll 4
        for (int c = 0; c < TILE_COLUMNS; ++c) w[c] = Values<T>::load_first(column[c] + k, rest);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const Values<T> row = Values<T>::load_first(x + r * x_stride + k, rest);
#pragma GCC unroll 4
            for (int c = 0; c < TILE_COLUMNS; ++c) {
                sums[r][c] = Values<T>::add_product(row, w[c], sums[r][c]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) add_up(sums[r], totals + r * totals_stride, first);
}

template <int ROWS, class T>
HEADRACE_INLINE void add_products_of(int64_t rows, const T* x, int64_t x_stride,
                                     const T* const* weight, int64_t ahead, int64_t size,
                                     float* totals, int64_t totals_stride, bool first) {
    if (rows == ROWS) {
        add_products<ROWS>(x, x_stride, weight, ahead, size, totals, totals_stride, first);
    } else if constexpr (ROWS > 1) {
        add_products_of<ROWS - 1>(rows, x, x_stride, weight, ahead, size, totals, totals_stride,
                                  first);
    }
}

// The columns [begin, end) of out, at most CHUNK_COLUMNS.
template <class T, class Out>
void multiply_chunk(const Product<T, Out>& p, int64_t begin, int64_t end) {
    // Rows that stay in the L1 cache while the weights of the chunk pass by, in tiles of nearly
    // equal height.
    const int64_t row_bytes = std::min(p.size, K_BLOCK) * static_cast<int64_t>(sizeof(T));
    const int64_t fitting = L1_BYTES / std::max<int64_t>(1, row_bytes) / TILE_ROWS * TILE_ROWS;
    const int64_t most = std::clamp<int64_t>(fitting, TILE_ROWS, BLOCK_ROWS);
    float totals[BLOCK_ROWS * CHUNK_COLUMNS];
    for (int64_t top = 0; top < p.rows; top += most) {
        const int64_t rows = std::min(most, p.rows - top);
        const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        int64_t k = 0;
        do {  // once if there is nothing to sum
            const int64_t size = std::min(K_BLOCK, p.size - k);
            for (int64_t column = begin; column < end; column += TILE_COLUMNS) {
                const T* weight[TILE_COLUMNS];
                for (int c = 0; c < TILE_COLUMNS; ++c) {
                    weight[c] = p.weight + std::min(column + c, end - 1) * p.weight_stride + k;
                }
                int64_t ahead = TILE_COLUMNS * p.weight_stride;
                for (int64_t tile = 0; tile < tiles; ++tile, ahead = 0) {
                    const int64_t row = rows * tile / tiles, next = rows * (tile + 1) / tiles;
                    add_products_of<TILE_ROWS>(
                        next - row, p.x + (top + row) * p.x_stride + k, p.x_stride, weight, ahead,
                        size, totals + row * CHUNK_COLUMNS + column - begin, CHUNK_COLUMNS, k == 0);
                }
            }
            k += K_BLOCK;
        } while (k < p.size);
        for (int64_t row = 0; row < rows; ++row) {
            const float* const from = totals + row * CHUNK_COLUMNS;
            Out* const to = p.out + (top + row) * p.out_stride + begin;
            for (int64_t i = 0; i < end - begin; i += LANES) {
                const int64_t count = end - begin - i;
                Vec value = load_first(from + i, count);
                if (p.bias) value = value + load_first(p.bias + begin + i, count);
                store_first(value, to + i, count);
            }
        }
    }
}

}  // namespace headrace::cpu::HEADRACE_ISA::linear
