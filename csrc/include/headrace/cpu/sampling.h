// Sampling on a CPU: the phases of a batch of rows, and the cut of top_k and top_p.
//
// 1. The largest logit of each row. Greedy rows end here.
// 2. For top_p alone: the sum of the row's masses.
// 3. For top_k and top_p: the cut, a scaled logit and a token that part survivors from the rest. A
//    bound that all survivors reach leaves few tokens, among which a radix selection finds it.
// 4. The draw, in which a row of any filters differs from another by its cut alone.
//
// Rows are cut into chunks, so that few rows occupy all threads too. Everything that is summed over
// chunks is whole numbers, everything else a maximum under a total order.
#pragma once

#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "headrace/cpu/pool.h"
#include "headrace/cpu/sampling_types.h"
#include "headrace/cpu/sampling_vec.h"

#define HEADRACE_KERNELS "headrace/cpu/sampling_chunk.h"
#include "headrace/cpu/foreach_isa.h"
#undef HEADRACE_KERNELS

namespace headrace::cpu::sampling {

constexpr Scored NOTHING = {-1e30F, INT32_MAX};

struct Batch {
    Row* rows;
    Chunk* chunks;  // of each row, one row after the other
    int64_t num_rows, vocab_size;

    int64_t chunks_per_row() const { return (vocab_size + CHUNK - 1) / CHUNK; }
    Chunk* chunks_of(int64_t row) const { return chunks + row * chunks_per_row(); }
};

// Calls f(row, chunk, begin, end) for the chunks of the rows that `wanted` is true of, in any order.
template <class Wanted, class F>
void for_each_chunk(const Batch& batch, Wanted&& wanted, F&& f) {
    if (std::none_of(batch.rows, batch.rows + batch.num_rows, wanted)) return;
    const int64_t per_row = batch.chunks_per_row();
    parallel_for(batch.num_rows * per_row, [&](int64_t index) {
        Row& row = batch.rows[index / per_row];
        if (!wanted(row)) return;
        const int64_t begin = index % per_row * CHUNK;
        f(row, batch.chunks[index], begin, std::min(begin + CHUNK, batch.vocab_size));
    });
}

// Phase 1: sets `best`, `best_id` and `valid`, and the groups of chunks of rows that are `grouped`.
template <class Grouped>
void find_best(const Batch& batch, Grouped&& grouped) {
    for_each_chunk(
        batch, [](const Row&) { return true; },
        [&](Row& row, Chunk& chunk, int64_t begin, int64_t end) {
            HEADRACE_DISPATCH(best_of_chunk, row.logits, begin, end, grouped(row), chunk);
        });
    for (int64_t i = 0; i < batch.num_rows; ++i) {
        Row& row = batch.rows[i];
        const Chunk* const chunks = batch.chunks_of(i);
        row.best = chunks[0].best;
        row.best_id = chunks[0].best_id;
        bool has_nan = chunks[0].has_nan;
        for (int64_t j = 1; j < batch.chunks_per_row(); ++j) {
            has_nan |= chunks[j].has_nan;
            if (!(chunks[j].best > row.best)) continue;
            row.best = chunks[j].best;
            row.best_id = chunks[j].best_id;
        }
        row.valid = !has_nan && std::isfinite(row.best);
    }
}

// Tokens of a row that may survive, in ascending order. A thread has one, which grows to the largest
// vocabulary.
struct Candidates {
    std::vector<float> values;  // logits, then minus scaled logits
    std::vector<float> masses;
    std::vector<int32_t> tokens;
    std::vector<int32_t> left;  // in a selection
    std::vector<float> packed;  // values of what is left
    std::vector<float> groups;
    int64_t count = 0;

    void reserve(int64_t vocab_size) {
        const auto room = static_cast<size_t>(vocab_size + LANES);
        if (values.size() >= room) return;
        values.resize(room);
        masses.resize(room);
        tokens.resize(room);
        left.resize(room);
        packed.resize(room);
    }
};

inline Candidates& candidates(int64_t vocab_size) {
    thread_local Candidates own;
    own.reserve(vocab_size);
    return own;
}

// A logit that at least k of the row's reach: the k-th largest of its groups'.
inline float kth_bound(const Chunk* chunks, int64_t num_chunks, int64_t k,
                       std::vector<float>& groups) {
    const int64_t count = num_chunks * GROUPS_PER_CHUNK;
    if (k > count) return -INFINITY;
    groups.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < num_chunks; ++i) {
        std::copy_n(chunks[i].groups, GROUPS_PER_CHUNK, groups.begin() + i * GROUPS_PER_CHUNK);
    }
    const auto kth = groups.begin() + (k - 1);
    std::nth_element(groups.begin(), kth, groups.end(), std::greater<>());
    return *kth;
}

struct Left {
    int64_t count;
    double before;  // the weight of all that is more likely
};

// Those in `left` are around the value at which the masses reach `limit`, by bisection of the values:
// vectors of them are faster than a radix pass. The candidates weigh at least `limit`.
inline Left narrow(Candidates& all, double limit) {
    constexpr int64_t FEW = 256;
    constexpr int MAX_ROUNDS = 24;  // equal values cannot be parted
    Left left = {all.count, 0};
    // Beyond this a candidate has no mass, but is left in as long as nothing shows that it is not
    // the last.
    float low = 0, high = -mass::LEAST, end = INFINITY;
    int64_t below_low = 0, below_end = all.count;
    for (int round = 0; round < MAX_ROUNDS && below_end - below_low > FEW; ++round) {
        const float middle = low + (high - low) / 2;
        double mass = 0;
        int64_t number = 0;
        HEADRACE_DISPATCH(weight_below, all.values.data(), all.masses.data(), all.count, middle,
                          mass, number);
        if (mass < limit) {
            low = middle;
            below_low = number;
            left.before = mass;
        } else {
            high = end = middle;
            below_end = number;
        }
    }
    HEADRACE_DISPATCH(find_between, all.values.data(), all.count, low, end, all.packed.data(),
                      all.left.data(), left.count);
    return left;
}

// The index of the last candidate, from the most likely one and the lower token of equals on, before
// which the others weigh less than `limit` together; the first always is one. Weights are masses, or
// 1 each. A radix selection, eight bits of the value's pattern at a time: what is left is in the
// digit in which the limit is reached.
template <bool BY_MASS>
int64_t last_within(Candidates& all, double limit) {
    constexpr int DIGITS = 256;
    Left left = {all.count, 0};
    if constexpr (BY_MASS) {
        left = narrow(all, limit);
    } else {
        std::iota(all.left.begin(), all.left.begin() + all.count, 0);
    }
    auto [count, before] = left;
    for (int shift = 24; shift >= 0; shift -= 8) {
        const auto digit_of = [&](int32_t i) {
            return std::bit_cast<uint32_t>(all.values[i]) >> shift & (DIGITS - 1);
        };
        int32_t counts[DIGITS] = {};
        double weights[DIGITS] = {};
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t digit = digit_of(all.left[i]);
            ++counts[digit];
            weights[digit] += BY_MASS ? all.masses[all.left[i]] : 1.0F;
        }
        uint32_t chosen = DIGITS;
        double reached = before;
        for (uint32_t digit = 0; digit < DIGITS; ++digit) {
            if (counts[digit] == 0) continue;
            if (chosen != DIGITS && !(reached < limit)) break;
            chosen = digit;
            before = reached;
            reached += weights[digit];
        }
        if (counts[chosen] == count) continue;
        int64_t kept = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (digit_of(all.left[i]) == chosen) all.left[kept++] = all.left[i];
        }
        count = kept;
    }
    // What is left is of one value, and so of one mass.
    const double weight = BY_MASS ? all.masses[all.left[0]] : 1.0F;
    int64_t last = 0;
    while (last + 1 < count && before + static_cast<double>(last + 1) * weight < limit) ++last;
    return all.left[last];
}

// Leaves the candidates up to candidate `last` in their order; returns their mass.
inline double keep_up_to(Candidates& all, int64_t last) {
    const float value = all.values[last];
    const int32_t token = all.tokens[last];
    double total = 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < all.count; ++i) {
        if (!(all.values[i] < value || (all.values[i] == value && all.tokens[i] <= token))) continue;
        all.values[kept] = all.values[i];
        all.masses[kept] = all.masses[i];
        all.tokens[kept++] = all.tokens[i];
        total += all.masses[i];
    }
    all.count = kept;
    return total;
}

// Phase 3 for a row: raises its cut to that of top_k and top_p.
inline void find_cut(const Batch& batch, int64_t index) {
    Row& row = batch.rows[index];
    const Chunk* const chunks = batch.chunks_of(index);
    Candidates& all = candidates(row.size);
    double total = 0;
    float bound = -INFINITY;
    if (row.limited) {
        const float kth = kth_bound(chunks, batch.chunks_per_row(), row.top_k, all.groups);
        bound = row.logit_bound(row.scaled(kth));
    } else {
        for (int64_t i = 0; i < batch.chunks_per_row(); ++i) total += chunks[i].sum;
        // Tokens of less mass than this weigh less than 1 - top_p together: none is in the nucleus.
        // One unit more than the rounding of a mass, and more than the error of its exponential.
        const double least = (1 - row.top_p) * total / static_cast<double>(row.size);
        const double scaled = std::log(std::max(least - 1, 0.25) * mass::UNIT);
        bound = row.logit_bound(static_cast<float>(scaled - 1e-4));
    }
    HEADRACE_DISPATCH(gather, row, bound, all.values.data(), all.tokens.data(), all.count);
    HEADRACE_DISPATCH(weigh, row, all.values.data(), all.masses.data(), all.count);

    int64_t last = 0;
    if (row.limited) {
        last = last_within<false>(all, static_cast<double>(row.top_k));
        if (row.top_p < 1) {
            total = keep_up_to(all, last);
            last = last_within<true>(all, row.top_p * total);
        }
    } else {
        last = last_within<true>(all, row.top_p * total);
    }
    const float cut = -all.values[last];
    if (cut < row.cut) return;  // of min_p
    row.cut = cut;
    row.cut_id = all.tokens[last];
}

// One token of each row; -1 where there is no distribution.
inline void sample(const Batch& batch, int64_t* out) {
    find_best(batch, [](const Row& row) { return row.limited; });
    for (int64_t i = 0; i < batch.num_rows; ++i) {
        Row& row = batch.rows[i];
        row.random &= row.valid;
        row.ordered &= row.valid;
    }
    for_each_chunk(
        batch, [](const Row& row) { return row.ordered && !row.limited; },
        [](Row& row, Chunk& chunk, int64_t begin, int64_t end) {
            HEADRACE_DISPATCH(mass_of_chunk, row, begin, end, chunk.sum);
        });
    const auto is_ordered = [](const Row& row) { return row.ordered; };
    if (std::any_of(batch.rows, batch.rows + batch.num_rows, is_ordered)) {
        parallel_for(batch.num_rows, [&](int64_t i) {
            if (batch.rows[i].ordered) find_cut(batch, i);
        });
    }
    for (int64_t i = 0; i < batch.num_rows; ++i) {
        Row& row = batch.rows[i];
        row.first = NOTHING;
        if (row.random && row.survives(0.0F, row.best_id)) {
            row.first = {gumbel_of_token(row.best_id, row.noise), row.best_id};
        }
    }
    for_each_chunk(
        batch, [](const Row& row) { return row.random; },
        [](Row& row, Chunk& chunk, int64_t begin, int64_t end) {
            chunk.drawn = row.first;
            HEADRACE_DISPATCH(draw_from_chunk, row, begin, end, chunk.drawn);
        });
    for (int64_t i = 0; i < batch.num_rows; ++i) {
        const Row& row = batch.rows[i];
        out[i] = row.valid ? row.best_id : -1;
        if (!row.random) continue;
        Scored best = row.first;
        const Chunk* const chunks = batch.chunks_of(i);
        for (int64_t j = 0; j < batch.chunks_per_row(); ++j) best.take(chunks[j].drawn);
        out[i] = best.token;
    }
}

// Where log-probabilities go: of the token of each row, and of its k most likely ones.
struct Logprobs {
    const int64_t* tokens;
    float* of_token;
    int64_t k;
    int64_t* top_tokens;
    float* top;
};

inline void write_logprobs(const Batch& batch, int64_t index, const Logprobs& to) {
    const Row& row = batch.rows[index];
    const Chunk* const chunks = batch.chunks_of(index);
    int64_t* const top_tokens = to.top_tokens + index * to.k;
    float* const top = to.top + index * to.k;
    if (!row.valid) {
        to.of_token[index] = NAN;
        std::fill_n(top_tokens, to.k, 0);
        std::fill_n(top, to.k, NAN);
        return;
    }
    double sum = 0;
    for (int64_t i = 0; i < batch.chunks_per_row(); ++i) sum += chunks[i].sum;
    const double log_sum = row.best + std::log(sum);
    to.of_token[index] = static_cast<float>(row.logits[to.tokens[index]] - log_sum);
    if (to.k == 0) return;
    Candidates& all = candidates(row.size);
    const float bound = kth_bound(chunks, batch.chunks_per_row(), to.k, all.groups);
    HEADRACE_DISPATCH(gather, row, bound, all.values.data(), all.tokens.data(), all.count);
    const auto begin = all.tokens.begin();
    std::partial_sort(begin, begin + to.k, begin + all.count, [&](int32_t a, int32_t b) {
        return row.logits[a] > row.logits[b] || (row.logits[a] == row.logits[b] && a < b);
    });
    for (int64_t i = 0; i < to.k; ++i) {
        top_tokens[i] = all.tokens[i];
        top[i] = static_cast<float>(row.logits[all.tokens[i]] - log_sum);
    }
}

inline void log_probabilities(const Batch& batch, const Logprobs& to) {
    find_best(batch, [&](const Row&) { return to.k > 0; });
    for_each_chunk(
        batch, [](const Row& row) { return row.valid; },
        [](Row& row, Chunk& chunk, int64_t begin, int64_t end) {
            HEADRACE_DISPATCH(exponentials_of_chunk, row, begin, end, chunk.sum);
        });
    parallel_for(batch.num_rows, [&](int64_t i) { write_logprobs(batch, i, to); });
}

}  // namespace headrace::cpu::sampling
