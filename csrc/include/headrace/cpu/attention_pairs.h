// Scores of bf16 queries and keys by AVX512-BF16, which multiplies and adds two channels at once. A
// product of two bf16 is exact in fp32: against fp32 arithmetic only the rounding of sums differs.
#pragma once

#if defined(__x86_64__)

namespace headrace::cpu::avx512::tiles {

// c[r] = the sum of a[r][k] * b[k] over the pairs of channels, in ascending order, for a tile.
template <int ROWS>
HEADRACE_TARGET_AVX512 inline void multiply_pairs(const float* a, int64_t pairs, const float* b,
                                                  float* c) {
    constexpr int VECTORS = TILE / LANES;
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < pairs; ++k) {
        __m512bh row[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            row[v] = reinterpret_cast<__m512bh>(_mm512_loadu_ps(b + k * TILE + v * LANES));
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const auto x = reinterpret_cast<__m512bh>(_mm512_set1_ps(a[r * pairs + k]));
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, row[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + r * TILE + v * LANES, sum[r][v]);
    }
}

template <int ROWS>
HEADRACE_TARGET_AVX512 inline void multiply_some_pairs(int rows, const float* a, int64_t pairs,
                                                       const float* b, float* c) {
    if (rows == ROWS) {
        multiply_pairs<ROWS>(a, pairs, b, c);
    } else if constexpr (ROWS > 1) {
        multiply_some_pairs<ROWS - 1>(rows, a, pairs, b, c);
    }
}

template <>
struct Tiles<bf16, bf16> : PlainTiles<bf16, bf16> {
    static int64_t query_size(int64_t dim) { return dim / 2; }

    static void load_query(const bf16* from, int64_t dim, float* to) {
        std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(bf16));
    }

    // Pairs of a key's channels become a column: [dim / 2, TILE].
    static HEADRACE_TARGET_AVX512 void load_keys(const bf16* const* tokens, int first, int last,
                                                 int64_t dim, float* keys) {
        const int64_t pairs = dim / 2;
        for (int j = first / LANES * LANES; j < last; j += LANES) {
            for (int64_t d = 0; d < pairs; d += LANES) {
                const int count = static_cast<int>(std::min<int64_t>(pairs - d, LANES));
                const auto mask = static_cast<__mmask16>((1U << count) - 1);
                Vec x[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) {
                    x[i] = {_mm512_maskz_loadu_ps(mask, tokens[j + i] + 2 * d)};
                }
                transpose(x);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) {
                    if (i < count) x[i].store(keys + (d + i) * TILE + j);
                }
            }
        }
    }

    static HEADRACE_TARGET_AVX512 void score(const float* queries, int rows, int64_t dim,
                                             const float* keys, float* scores) {
        const int64_t pairs = dim / 2;
        for (int r = 0; r < rows; r += BLOCK_ROWS) {
            multiply_some_pairs<BLOCK_ROWS>(std::min(rows - r, BLOCK_ROWS), queries + r * pairs,
                                            pairs, keys, scores + r * TILE);
        }
    }
};

}  // namespace headrace::cpu::avx512::tiles

#endif  // __x86_64__
