// Attention of requests with one query token each over the paged KV cache.
//
// Reading the cache is what takes time: 2 D values a token and kv head, about 4 G operations each.
// So a block serves all G query heads of a kv head on tensor cores, with its four warps on 16
// tokens each of a tile of 64. A warp copies its own tokens to its own stages of shared memory,
// across the borders of items, and never waits for another warp but where a chunk ends.
//
// 8-bit values are widened exactly between shared memory and the product. The scale of a key
// multiplies its score, that of a value its weight, both in fp32.
#pragma once

#include "headrace/cuda/attention_stages.cuh"

namespace headrace::cuda {

// Shared memory: the stages of each warp; for each warp the sums and values of a chunk; and those
// of the chunks before it.
template <int D, class C>
struct DecodeMemory {
    static constexpr int STAGES = WARPS * Stage<D, C>::COUNT * Stage<D, C>::BYTES;
    static HEADRACE_HOST_DEVICE int merge_floats(int group) { return group * (D + 2); }
    static HEADRACE_HOST_DEVICE int bytes(int group) {
        return STAGES + (WARPS + 1) * merge_floats(group) * 4;
    }
};

// Which of the D columns accumulator n, value i (0 or 1) of lane t holds; 8-bit values come apart
// into even and odd columns.
template <class C>
HEADRACE_HOST_DEVICE int accumulator_column(int n, int t, int i) {
    return sizeof(C) == 1 ? n / 2 * 16 + 4 * t + 2 * i + n % 2 : 8 * n + 2 * t + i;
}
// Which columns of q stand in place k (of 16) of step `step`: so that a key's values are used as
// they are read.
template <class C>
HEADRACE_HOST_DEVICE int query_column(int step, int t, int half, int i) {
    return 16 * step + (sizeof(C) == 1 ? 4 * t + half + 2 * i : 2 * t + 8 * half + i);
}

// What a warp has of its tokens of a chunk: of rows g and g + 8.
template <int D>
struct Accumulator {
    float values[D / 8][4];
    float largest[2], total[2];

    HEADRACE_DEVICE void clear() {
        HEADRACE_UNROLL
        for (int n = 0; n < D / 8; ++n) {
            HEADRACE_UNROLL
            for (int i = 0; i < 4; ++i) values[n][i] = 0.0F;
        }
        HEADRACE_UNROLL
        for (int half = 0; half < 2; ++half) {
            largest[half] = -HEADRACE_INFINITY;
            total[half] = 0.0F;
        }
    }
};

template <int D, class T, class C>
HEADRACE_DEVICE void multiply_keys(const uint32_t (&q)[D / 16][4], const uint8_t* keys, int lane,
                                   float (&scores)[2][4]) {
    using S = Stage<D, C>;
    const int row = lane / 16 * 8 + lane % 8, column = lane / 8 % 2;
    HEADRACE_UNROLL
    for (int pair = 0; pair < S::VECTORS / 2; ++pair) {
        uint32_t words[4];
        load_matrices(words, keys + S::offset(row, 2 * pair + column));
        HEADRACE_UNROLL
        for (int n = 0; n < 2; ++n) {
            const uint32_t first = words[2 * n], second = words[2 * n + 1];
            if constexpr (S::SCALED) {
                multiply_add<T>(scores[n], q[2 * pair], widen_even<T, C>(first),
                                widen_odd<T, C>(first));
                multiply_add<T>(scores[n], q[2 * pair + 1], widen_even<T, C>(second),
                                widen_odd<T, C>(second));
            } else {
                multiply_add<T>(scores[n], q[pair], first, second);
            }
        }
    }
}

template <int D, class T, class C>
HEADRACE_DEVICE void add_values(const uint32_t (&weights)[4], const uint8_t* stage_values, int lane,
                                Accumulator<D>& acc) {
    using S = Stage<D, C>;
    const int row = lane % 16, column = lane / 16;
    HEADRACE_UNROLL
    for (int pair = 0; pair < S::VECTORS / 2; ++pair) {
        uint32_t words[4];
        load_matrices_transposed(words, stage_values + S::offset(row, 2 * pair + column));
        HEADRACE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int vector = 2 * pair + i;
            const uint32_t low = words[2 * i], high = words[2 * i + 1];
            if constexpr (S::SCALED) {
                multiply_add<T>(acc.values[2 * vector], weights, widen_even<T, C>(low),
                                widen_even<T, C>(high));
                multiply_add<T>(acc.values[2 * vector + 1], weights, widen_odd<T, C>(low),
                                widen_odd<T, C>(high));
            } else {
                multiply_add<T>(acc.values[vector], weights, low, high);
            }
        }
    }
}

// Scores of 16 tokens into weights, scaled by 2^-largest; WIDE: rows 8 to 15 are in use.
template <int D, bool WIDE, class T>
struct Softmax {
    const Decode<T>& p;
    const float* key_scales;  // null: none
    const float* value_scales;
    int first, lowest, end;  // position of the first token; tokens [lowest, end) are seen

    HEADRACE_DEVICE bool seen(int token) const {
        return first + token >= lowest && first + token < end;
    }

    HEADRACE_DEVICE float score(float product, int token) const {
        float x = product * p.scale;
        if (key_scales) x *= key_scales[token];
        // The scale holds log2 e, which the cap comes before.
        if (p.soft_cap > 0) x = p.soft_cap * LOG2_E * tanhf(x / (p.soft_cap * LOG2_E));
        return seen(token) ? x : -HEADRACE_INFINITY;
    }

    HEADRACE_DEVICE void operator()(float (&scores)[2][4], int t, Accumulator<D>& acc,
                                    uint32_t (&weights)[4]) const {
        HEADRACE_UNROLL
        for (int half = 0; half < 2; ++half) {
            if (half == 1 && !WIDE) {
                weights[1] = weights[3] = 0;
                return;
            }
            float largest = -HEADRACE_INFINITY;
            HEADRACE_UNROLL
            for (int k = 0; k < 4; ++k) {
                float& x = scores[k / 2][2 * half + k % 2];
                x = score(x, 8 * (k / 2) + 2 * t + k % 2);
                largest = maximum(x, largest);
            }
            largest = maximum(largest, shuffle_xor(largest, 1));
            largest = maximum(largest, shuffle_xor(largest, 2));
            largest = maximum(largest, acc.largest[half]);
            const float offset = finite_or_zero(largest);
            const float keep = exp2_of(acc.largest[half] - offset);
            acc.largest[half] = largest;
            float sum = 0.0F;
            HEADRACE_UNROLL
            for (int k = 0; k < 4; ++k) {
                const int token = 8 * (k / 2) + 2 * t + k % 2;
                float& x = scores[k / 2][2 * half + k % 2];
                x = exp2_of(x - offset);
                sum += x;
                // Of tokens that are not seen the scale may be anything.
                if (value_scales) x = seen(token) ? x * value_scales[token] : 0.0F;
            }
            acc.total[half] = fmaf(acc.total[half], keep, sum);
            HEADRACE_UNROLL
            for (int n = 0; n < D / 8; ++n) {
                acc.values[n][2 * half] *= keep;
                acc.values[n][2 * half + 1] *= keep;
            }
            weights[half] = pack<T>(scores[0][2 * half], scores[0][2 * half + 1]);
            weights[half + 2] = pack<T>(scores[1][2 * half], scores[1][2 * half + 1]);
        }
    }
};

// Where the four warps' parts of a chunk are put together, and chunks folded.
template <int D>
struct Merge {
    float* values;   // [WARPS][group][D]
    Sum* sums;       // [WARPS][group]
    float* running;  // [group][D]
    Sum* total;      // [group]
    int group;

    HEADRACE_DEVICE Merge(uint8_t* memory, int group_size)
        : values(reinterpret_cast<float*>(memory)),
          sums(reinterpret_cast<Sum*>(values + WARPS * group_size * D)),
          running(reinterpret_cast<float*>(sums + WARPS * group_size)),
          total(reinterpret_cast<Sum*>(running + group_size * D)),
          group(group_size) {}

    template <class C>
    HEADRACE_DEVICE void put(const Accumulator<D>& acc, int warp, int lane) {
        const int g = lane / 4, t = lane % 4;
        HEADRACE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = g + 8 * half;
            float sum = acc.total[half] + shuffle_xor(acc.total[half], 1);
            sum += shuffle_xor(sum, 2);
            if (row >= group) continue;
            if (t == 0) sums[warp * group + row] = {acc.largest[half], sum};
            float* const to = values + (warp * group + row) * D;
            HEADRACE_UNROLL
            for (int n = 0; n < D / 8; ++n) {
                HEADRACE_UNROLL
                for (int i = 0; i < 2; ++i)
                    to[accumulator_column<C>(n, t, i)] = acc.values[n][2 * half + i];
            }
        }
    }

    // The chunk's largest score, its sum, and one column's value: the warps' in ascending order.
    HEADRACE_DEVICE Sum chunk(int row, int column, float& value) const {
        float largest = -HEADRACE_INFINITY;
        HEADRACE_UNROLL
        for (int w = 0; w < WARPS; ++w) largest = maximum(sums[w * group + row].largest, largest);
        const float offset = finite_or_zero(largest);
        Sum sum = {largest, 0.0F};
        value = 0.0F;
        HEADRACE_UNROLL
        for (int w = 0; w < WARPS; ++w) {
            const Sum part = sums[w * group + row];
            const float weight = exp2_of(part.largest - offset);
            sum.total = fmaf(part.total, weight, sum.total);
            value = fmaf(values[(w * group + row) * D + column], weight, value);
        }
        return sum;
    }
};

// Writes the partial of a chunk, or folds it into the context's and writes that after the last.
template <int D, class T>
HEADRACE_DEVICE void finish_chunk(const Decode<T>& p, const Merge<D>& merge, const Item& item,
                                  int head, bool first, bool last) {
    const int size = p.group * D;
    for (int e = static_cast<int>(threadIdx.x); e < size; e += ATTENTION_THREADS) {
        const int row = e / D, column = e % D, query_head = head * p.group + row;
        float value;
        const Sum sum = merge.chunk(row, column, value);
        if (item.slot >= 0) {
            const int64_t to = int64_t{item.slot} * p.kv_heads * p.group + query_head;
            p.partials[to * D + column] = value;
            if (column == 0) p.sums[to] = sum;
            continue;
        }
        const Sum old = first ? Sum{-HEADRACE_INFINITY, 0.0F} : merge.total[row];
        const FoldWeights w = fold_weights(old.largest, sum.largest);
        const float folded = fold(w, first ? 0.0F : merge.running[e], value);
        merge.running[e] = folded;
        const float total = fold(w, old.total, sum.total);
        if (last)
            p.out[item.row * p.out_stride + query_head * D + column] =
                from_float<T>(folded / total);
    }
    // Everyone has read the sums; those of a row are kept by one thread.
    sync_threads();
    if (item.slot >= 0) return;
    for (int row = static_cast<int>(threadIdx.x); row < p.group; row += ATTENTION_THREADS) {
        float value;
        const Sum sum = merge.chunk(row, 0, value);
        const Sum old = first ? Sum{-HEADRACE_INFINITY, 0.0F} : merge.total[row];
        const FoldWeights w = fold_weights(old.largest, sum.largest);
        merge.total[row] = {w.largest, fold(w, old.total, sum.total)};
    }
    sync_threads();
}

template <int D, bool WIDE, class T, class C>
HEADRACE_DEVICE void load_query(const Decode<T>& p, const Item& item, int head, int lane,
                                uint32_t (&q)[D / 16][4]) {
    const int g = lane / 4, t = lane % 4;
    HEADRACE_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = g + 8 * half;
        const T* const from = p.q + item.row * p.q_stride + int64_t{head * p.group + row} * D;
        HEADRACE_UNROLL
        for (int step = 0; step < D / 16; ++step) {
            HEADRACE_UNROLL
            for (int part = 0; part < 2; ++part) {
                uint32_t word = 0;
                if (row < p.group && (WIDE || half == 0)) {
                    word = from[query_column<C>(step, t, part, 0)].bits |
                           uint32_t{from[query_column<C>(step, t, part, 1)].bits} << 16;
                }
                q[step][2 * part + half] = word;
            }
        }
    }
}

// One item of one kv head; `loader` is Stage::COUNT - 1 tiles ahead.
template <int D, bool WIDE, class T, class C>
HEADRACE_DEVICE void attend(const Decode<T>& p, const Item& item, int head, Loader<D, T, C>& loader,
                            Merge<D>& merge, int& stage, int warp) {
    using S = Stage<D, C>;
    const int lane = loader.lane;
    uint32_t q[D / 16][4];
    load_query<D, WIDE, T, C>(p, item, head, lane, q);
    Accumulator<D> acc;
    acc.clear();
    bool first = true;
    for (int token = item.begin; token < item.end; token += TILE) {
        copy_async_wait<S::COUNT - 2>();
        sync_warp();
        // Into the stage that was read last: the warp is past it.
        loader.start_next();
        const uint8_t* const from = loader.stages + stage * S::BYTES;
        stage = stage + 1 == S::COUNT ? 0 : stage + 1;
        float scores[2][4] = {};
        multiply_keys<D, T, C>(q, from, lane, scores);
        const auto* const scales = reinterpret_cast<const float*>(from + 2 * S::VALUES);
        const Softmax<D, WIDE, T> softmax = {p,
                                             S::SCALED ? scales : nullptr,
                                             S::SCALED ? scales + WARP_TOKENS : nullptr,
                                             token + loader.first_token,
                                             item.lowest,
                                             item.end};
        uint32_t weights[4];
        softmax(scores, lane % 4, acc, weights);
        add_values<D, T, C>(weights, from + S::VALUES, lane, acc);
        const bool last = token + TILE >= item.end;
        if (!last && (token + TILE) % CHUNK != 0) continue;
        merge.template put<C>(acc, warp, lane);
        sync_threads();
        finish_chunk<D, T>(p, merge, item, head, first, last);
        acc.clear();
        first = false;
    }
}

template <int D, bool WIDE, class T, class C>
HEADRACE_KERNEL_OF(ATTENTION_THREADS, 2)
decode_attention(Decode<T> p) {
    using S = Stage<D, C>;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int works = p.counts[0] * p.kv_heads;
    uint8_t* const memory = shared_memory();
    Loader<D, T, C> loader(p, memory + warp * S::COUNT * S::BYTES, works, warp);
    Merge<D> merge(memory + DecodeMemory<D, C>::STAGES, p.group);
    HEADRACE_UNROLL
    for (int i = 0; i < S::COUNT - 1; ++i) loader.start_next();
    int stage = 0;
    for (int work = static_cast<int>(blockIdx.x); work < works;
         work += static_cast<int>(gridDim.x)) {
        const Item item = p.items[work / p.kv_heads];
        attend<D, WIDE, T, C>(p, item, work % p.kv_heads, loader, merge, stage, warp);
    }
}

template <class T>
struct Combine {
    const int* counts;
    const Fold* folds;
    const int* query_start;  // [requests + 1]
    const float* partials;
    const Sum* sums;
    T* out;
    int64_t out_stride;
    int requests, heads, rows;
};

// The partials of one context and head, by one warp.
template <int D, class T>
HEADRACE_DEVICE void fold_head(const Combine<T>& c, const Fold& which, int head, int lane) {
    constexpr int BATCH = 8, OWN = D / 32;  // BATCH: chunks that are read before the first is used
    Sum total = {-HEADRACE_INFINITY, 0.0F};
    float values[OWN] = {};
    for (int first = 0; first < which.chunks; first += BATCH) {
        Sum sums[BATCH];
        float parts[BATCH][OWN];
        HEADRACE_UNROLL
        for (int i = 0; i < BATCH; ++i) {
            if (first + i >= which.chunks) continue;
            const int64_t from = int64_t{which.slot + first + i} * c.heads + head;
            sums[i] = c.sums[from];
            HEADRACE_UNROLL
            for (int k = 0; k < OWN; ++k) parts[i][k] = c.partials[from * D + 32 * k + lane];
        }
        HEADRACE_UNROLL
        for (int i = 0; i < BATCH; ++i) {
            if (first + i >= which.chunks) continue;
            const FoldWeights w = fold_weights(total.largest, sums[i].largest);
            total = {w.largest, fold(w, total.total, sums[i].total)};
            HEADRACE_UNROLL
            for (int k = 0; k < OWN; ++k) values[k] = fold(w, values[k], parts[i][k]);
        }
    }
    T* const out = c.out + which.row * c.out_stride + head * D;
    HEADRACE_UNROLL
    for (int k = 0; k < OWN; ++k) out[32 * k + lane] = from_float<T>(values[k] / total.total);
}

// Folds what was split, and writes zeros to rows that belong to no request. grid: [any,
// ceil(heads / 4)].
template <int D, class T>
HEADRACE_KERNEL_OF(ATTENTION_THREADS, 1)
combine_chunks(Combine<T> c) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int head = static_cast<int>(blockIdx.y * WARPS + threadIdx.x / 32);
    const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
    if (head >= c.heads) return;
    for (int i = first; i < c.counts[1]; i += step) fold_head<D>(c, c.folds[i], head, lane);
    for (int row = c.query_start[c.requests] + first; row < c.rows; row += step) {
        T* const out = c.out + row * c.out_stride + head * D;
        for (int i = lane; i < D; i += 32) out[i] = from_float<T>(0.0F);
    }
}

}  // namespace headrace::cuda
