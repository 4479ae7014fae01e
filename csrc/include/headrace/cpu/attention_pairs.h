// Scores of bf16 queries and keys by AVX512-BF16, which multiplies and adds two channels at once. A
// product of two bf16 is exact in fp32: against fp32 arithmetic only the rounding of sums differs.
#pragma once

#if defined(__x86_64__)

namespace headrace::cpu::avx512::tiles {

// scores[r] = the sum of q[r] * keys over the pairs of channels, in ascending order.
template <int ROWS, int VECTORS>
HEADRACE_TARGET_AVX512 inline void score_pairs(const float* q, int pairs, const float* keys,
                                               float* scores, const Ahead& ahead) {
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (int k = 0; k < pairs; ++k) {
        ahead.fetch_share(k, pairs);
        __m512bh key[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            key[v] = reinterpret_cast<__m512bh>(_mm512_loadu_ps(keys + k * TILE + v * LANES));
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const auto x = reinterpret_cast<__m512bh>(_mm512_set1_ps(q[r * pairs + k]));
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, key[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            _mm512_storeu_ps(scores + r * TILE + v * LANES, sum[r][v]);
        }
    }
}

template <>
struct Tiles<bf16, bf16> : PlainTiles<bf16, bf16> {
    static int64_t query_size(int64_t dim) { return dim / 2; }

    static void load_query(const bf16* from, int64_t dim, float* to) {
        std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(bf16));
    }

    static void score(const float* queries, int rows, int columns, int64_t dim, const float* keys,
                      float* scores, const Ahead& ahead) {
        const auto pairs = static_cast<int>(dim / 2);
        for_each_block(rows, columns, [&]<int ROWS, int VECTORS>(int r, int64_t n) {
            score_pairs<ROWS, VECTORS>(queries + r * pairs, pairs, keys + n, scores + r * TILE + n,
                                       ahead.once(r, n));
        });
    }
};

}  // namespace headrace::cpu::avx512::tiles

#endif  // __x86_64__
