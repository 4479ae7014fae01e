// The arithmetic of a tile of attention; compiled by foreach_isa.h. A row's operations and their
// order are the same among whatever rows it stands.

namespace headrace::cpu::HEADRACE_ISA::tiles {

using attention::Ahead;
using attention::LOWEST;
using attention::Partial;
using attention::TILE;
using attention::TokenScales;

// The rows of a matrix of floats, and values where the cache has them.
struct Dense {
    const float* from;
    int64_t stride;

    HEADRACE_INLINE const float* row(int64_t k) const { return from + k * stride; }
};

template <class KV>
struct CacheRows {
    const KV* const* tokens;
    int64_t offset;

    HEADRACE_INLINE const KV* row(int64_t k) const { return tokens[k] + offset; }
};

// c[r] = c[r] * factor[r] + the sum over k in [first, last) of a[r][k] * b[k], in ascending order,
// for VECTORS * LANES columns. Rows of a and c are TILE and ldc apart.
template <int ROWS, int VECTORS, class B>
void weigh_block(const float* a, const B& b, int64_t n, int first, int last, const float* factor,
                 float* c, int64_t ldc, const Ahead& ahead) {
    Vec sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            sum[r][v] = Vec::load(c + r * ldc + n + v * LANES) * Vec::set(factor[r]);
        }
    }
    for (int k = first; k < last; ++k) {
        ahead.fetch(k, k + 1);
        const auto* from = b.row(k) + n;
        Vec row[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) row[v] = Vec::load(from + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vec x = Vec::set(a[r * TILE + k]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = Vec::fma(x, row[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[r][v].store(c + r * ldc + n + v * LANES);
    }
}

// scores[r] = the sum over the channels of q[r] * keys, in ascending order, for VECTORS * LANES
// tokens. A word of `keys` [dim * sizeof(KV) / 4, TILE] holds the channels of a token that fit.
template <int ROWS, int VECTORS, class KV>
void score_block(const float* q, int64_t dim, const float* keys, float* scores,
                 const Ahead& ahead) {
    constexpr int CHANNELS = sizeof(float) / sizeof(KV);
    const int words = static_cast<int>(dim / CHANNELS);
    Vec sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = Vec::set(0.0F);
    }
    for (int k = 0; k < words; ++k) {
        ahead.fetch_share(k, words);
        Vec word[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) word[v] = Vec::load(keys + k * TILE + v * LANES);
#pragma GCC unroll 4
        for (int channel = 0; channel < CHANNELS; ++channel) {
            Vec key[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) key[v] = widen(KV{}, word[v], channel);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const Vec x = Vec::set(q[r * dim + k * CHANNELS + channel]);
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) sum[r][v] = Vec::fma(x, key[v], sum[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[r][v].store(scores + r * TILE + v * LANES);
    }
}

template <int ROWS, int VECTORS, class F>
void with_rows(int rows, F&& f) {
    if (rows == ROWS) {
        f.template operator()<ROWS, VECTORS>();
    } else if constexpr (ROWS > 1) {
        with_rows<ROWS - 1, VECTORS>(rows, f);
    }
}

// Calls f.operator()<ROWS, VECTORS>(row, column) for blocks that cover rows and columns.
template <class F>
void for_each_block(int rows, int64_t columns, F&& f) {
    for (int r = 0; r < rows; r += BLOCK_ROWS) {
        const int block = std::min(rows - r, BLOCK_ROWS);
        int64_t n = 0;
        const auto run = [&]<int VECTORS>() {
            with_rows<BLOCK_ROWS, VECTORS>(
                block, [&]<int ROWS, int COUNT>() { f.template operator()<ROWS, COUNT>(r, n); });
            n += VECTORS * LANES;
        };
        while (n + BLOCK_VECTORS * LANES <= columns) run.template operator()<BLOCK_VECTORS>();
        if constexpr (BLOCK_VECTORS > 2) {
            if (n + 2 * LANES <= columns) run.template operator()<2>();
        }
        while (n < columns) run.template operator()<1>();
    }
}

// exp(x) for x <= 0: 1 at 0, and 0 below -86, where a weight is lost in any sum that holds a 1.
HEADRACE_INLINE Vec exp_nonpositive(Vec x) {
    using namespace exponential;
    constexpr float LOWEST_X = -87.0F, LOST = 4e-38F;
    x = Vec::max(Vec::set(LOWEST_X), x);
    const Vec n = (x * Vec::set(LOG2_E)).round();
    const Vec r = Vec::fma(n, Vec::set(-LN2_LOW), Vec::fma(n, Vec::set(-LN2_HIGH), x));
    Vec p = Vec::set(POLYNOMIAL[0]);
#pragma GCC unroll 4
    for (int i = 1; i < 5; ++i) p = Vec::fma(p, r, Vec::set(POLYNOMIAL[i]));
    p = Vec::fma(p, r * r, r + Vec::set(1.0F));
    return Vec::max(Vec::set(0.0F), p * n.exp2_of_integer() - Vec::set(LOST));
}

HEADRACE_INLINE float exp_nonpositive(float x) {
    float lanes[LANES];
    exp_nonpositive(Vec::set(x)).store(lanes);
    return lanes[0];
}

// cap * tanh(x / cap), within 3e-7 * cap.
HEADRACE_INLINE Vec soft_capped(Vec x, float cap) {
    const Vec e = exp(x * Vec::set(2.0F) / Vec::set(cap));
    return Vec::set(cap) - Vec::set(2.0F * cap) / (e + Vec::set(1.0F));
}

// Turns products [rows, TILE] into weights exp(score - maximum so far); row r sees the columns from
// first[r] - start to last[r] - start, and none sees any from `columns` on, whose weights would be
// zeros in a sum. factor[r] is what earlier weights lose to the new maximum. With `scales`,
// products are multiplied by those of the keys first, and weights by those of the values behind
// their sum.
inline void soften_rows(float* scores, int rows, int columns, int start, const int* first,
                        const int* last, float scale, float soft_cap, const TokenScales* scales,
                        const Partial& partial, float* factor) {
    for (int r = 0; r < rows; ++r) {
        float* row = scores + r * TILE;
        Vec top = Vec::set(partial.max[r]);
#pragma GCC unroll 4
        for (int v = 0; v < TILE; v += LANES) {
            if (v >= columns) break;
            Vec x = Vec::load(row + v);
            if (scales) x = x * Vec::load(scales->keys + v);
            x = x * Vec::set(scale);
            if (soft_cap > 0) x = soft_capped(x, soft_cap);
            x = keep_lanes(x, first[r] - start - v, last[r] - start - v);
            x.store(row + v);
            top = Vec::max(x, top);
        }
        const float highest = largest_lane(top);
        factor[r] = partial.max[r] - highest;
        partial.max[r] = highest;
    }
    for (int r = 0; r < rows; r += LANES) {
        exp_nonpositive(Vec::load(factor + r)).store(factor + r);
    }
    for (int r = 0; r < rows; ++r) {
        float* row = scores + r * TILE;
        Vec x[TILE / LANES];
#pragma GCC unroll 4
        for (int v = 0; v < TILE / LANES; ++v) {
            x[v] = Vec::set(0.0F);
            if (v * LANES >= columns) continue;
            x[v] = exp_nonpositive(Vec::load(row + v * LANES) - Vec::set(partial.max[r]));
            (scales ? x[v] * Vec::load(scales->values + v * LANES) : x[v]).store(row + v * LANES);
        }
        const float sum = lane_sum((x[0] + x[1]) + (x[2] + x[3]));
        partial.sum[r] = partial.sum[r] * factor[r] + sum;
    }
}

// Adds the partial of the next split to `total`.
inline void merge_rows(const Partial& next, int rows, int64_t dim, const Partial& total) {
    for (int r = 0; r < rows; ++r) {
        const float highest = std::max(total.max[r], next.max[r]);
        const float old = exp_nonpositive(total.max[r] - highest),
                    now = exp_nonpositive(next.max[r] - highest);
        total.max[r] = highest;
        total.sum[r] = total.sum[r] * old + next.sum[r] * now;
        for (int64_t d = r * dim; d < (r + 1) * dim; d += LANES) {
            const Vec kept = Vec::load(total.values + d) * Vec::set(old);
            Vec::fma(Vec::load(next.values + d), Vec::set(now), kept).store(total.values + d);
        }
    }
}

// The kernel for queries of type Q and a cache of type KV, in fp32.
template <class Q, class KV>
struct PlainTiles {
    using Query = Q;
    using Cache = KV;

    static constexpr auto* soften = soften_rows;
    static constexpr auto* merge = merge_rows;

    // Floats of a loaded query.
    static int64_t query_size(int64_t dim) { return dim; }

    static void load_query(const Q* from, int64_t dim, float* to) {
        for (int64_t d = 0; d < dim; d += LANES) Vec::load(from + d).store(to + d);
    }

    // Words of keys become columns: [dim * sizeof(KV) / 4, TILE]. `tokens` points to something for
    // all tokens of the tile.
    static void load_keys(const KV* const* tokens, int first, int last, int64_t dim, float* keys) {
        const int64_t words = dim * static_cast<int64_t>(sizeof(KV)) / 4;
        for (int j = first / LANES * LANES; j < last; j += LANES) {
            for (int64_t d = 0; d < words; d += LANES) {
                const int count = static_cast<int>(std::min<int64_t>(words - d, LANES));
                Vec x[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) {
                    x[i] = load_words(reinterpret_cast<const float*>(tokens[j + i]) + d, count);
                }
                transpose(x);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) {
                    if (i < count) x[i].store(keys + (d + i) * TILE + j);
                }
            }
        }
    }

    static void score(const float* queries, int rows, int columns, int64_t dim, const float* keys,
                      float* scores, const Ahead& ahead) {
        for_each_block(rows, columns, [&]<int ROWS, int VECTORS>(int r, int64_t n) {
            score_block<ROWS, VECTORS, KV>(queries + r * dim, dim, keys + n, scores + r * TILE + n,
                                           ahead.once(r, n));
        });
    }

    // sums[r] = sums[r] * factor[r] + the values of the tokens [first, last), weighted; `offset`
    // leads from the key of a token to its value. Values are widened to fp32 once: on the way into
    // registers, or into `values` [TILE, dim] if several blocks of rows read them.
    static void weigh(const float* weights, int rows, const KV* const* tokens, int64_t offset,
                      int first, int last, int64_t dim, const float* factor, float* values,
                      float* sums, const Ahead& ahead) {
        const CacheRows<KV> cached{tokens, offset};
        const auto multiply = [&](const auto& rows_of_values) {
            for_each_block(rows, dim, [&]<int ROWS, int VECTORS>(int r, int64_t n) {
                weigh_block<ROWS, VECTORS>(weights + r * TILE, rows_of_values, n, first, last,
                                           factor + r, sums + r * dim, dim, ahead.once(r, n));
            });
        };
        if (rows <= BLOCK_ROWS) return multiply(cached);
        for (int j = first; j < last; ++j) {
            for (int64_t d = 0; d < dim; d += LANES) {
                Vec::load(cached.row(j) + d).store(values + j * dim + d);
            }
        }
        multiply(Dense{values, dim});
    }

    static void finish(const float* values, float sum, int64_t dim, Q* to) {
        const Vec reciprocal = Vec::set(1.0F / sum);
        for (int64_t d = 0; d < dim; d += LANES) {
            (Vec::load(values + d) * reciprocal).store(to + d);
        }
    }
};

template <class Q, class KV>
struct Tiles : PlainTiles<Q, KV> {};

}  // namespace headrace::cpu::HEADRACE_ISA::tiles
