// The passes of sampling over a part of a row; compiled by foreach_isa.h.

namespace headrace::cpu::HEADRACE_ISA {

// The first `count` of 16 values; the rest is `missing`.
HEADRACE_INLINE Vec load_or(const float* from, int64_t count, float missing) {
    if (count >= LANES) return Vec::load(from);
    float padded[LANES];
    for (float& value : padded) value = missing;
    if (count > 0) std::memcpy(padded, from, count * sizeof(float));
    return Vec::load(padded);
}

HEADRACE_INLINE Vec load_logits(const float* from, int64_t count) {
    return load_or(from, count, -INFINITY);
}

// Four maxima hide the latency of the comparison. Sets bits of `nan` if there is any.
HEADRACE_INLINE Vec block_max(const float* x, int64_t size, uint32_t& nan) {
    const Vec least = Vec::set(-INFINITY);
    Vec largest[4] = {least, least, least, least};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) {
        Vec value[4];
        for (int part = 0; part < 4; ++part) {
            value[part] = Vec::load(x + i + part * LANES);
            largest[part] = Vec::max(value[part], largest[part]);
        }
        nan |= lanes::unordered(value[0], value[1]) | lanes::unordered(value[2], value[3]);
    }
    for (; i < size; i += LANES) {
        const Vec value = load_logits(x + i, size - i);
        largest[0] = Vec::max(value, largest[0]);
        nan |= lanes::unordered(value, value);
    }
    return Vec::max(Vec::max(largest[0], largest[1]), Vec::max(largest[2], largest[3]));
}

// The index of the first of `size` logits that equals `value`; one does.
HEADRACE_INLINE int64_t find_first(const float* x, int64_t size, float value) {
    for (int64_t i = 0; i < size; i += LANES) {
        const uint32_t mask = lanes::equal(load_logits(x + i, size - i), Vec::set(value));
        if (mask != 0) return i + std::countr_zero(mask);
    }
    return 0;
}

// The largest logit of [begin, end), its lowest token, and whether there is NaN; of each block the
// largest logits of 16 groups too, if they are asked for.
inline void best_of_chunk(const float* logits, int64_t begin, int64_t end, bool with_groups,
                   sampling::Chunk& chunk) {
    using namespace sampling;
    float best = -INFINITY;
    int64_t best_block = begin;
    uint32_t nan = 0;
    if (with_groups) std::fill_n(chunk.groups, GROUPS_PER_CHUNK, -INFINITY);
    for (int64_t i = begin; i < end; i += BLOCK) {
        const Vec largest = block_max(logits + i, std::min(BLOCK, end - i), nan);
        if (with_groups) largest.store(chunk.groups + (i - begin) / BLOCK * GROUPS_PER_BLOCK);
        // Rarely true after the first blocks; an equal one comes too late.
        const Vec so_far = Vec::set(best);
        if (lanes::at_least(so_far, largest) == (1U << LANES) - 1) continue;
        float lane[LANES];
        largest.store(lane);
        best = *std::max_element(lane, lane + LANES);
        best_block = i;
    }
    chunk.best = best;
    chunk.best_id = static_cast<int32_t>(
        best_block + find_first(logits + best_block, std::min(BLOCK, end - best_block), best));
    chunk.has_nan = nan != 0;
}

HEADRACE_INLINE Vec scaled_logits(const sampling::Row& row, Vec logits) {
    return (logits - Vec::set(row.best)) / Vec::set(row.temperature);
}

// exp of scaled logits as whole numbers of mass::UNIT. No multiplication is fused with an addition:
// see sampling_types.h.
HEADRACE_INLINE Vec masses(Vec scaled) {
    using namespace exponential;
    const Vec x = Vec::max(scaled, Vec::set(sampling::mass::LEAST));
    const Vec n = (x * Vec::set(LOG2_E)).round();
    const Vec r = (x - n * Vec::set(LN2_HIGH)) - n * Vec::set(LN2_LOW);
    Vec p = Vec::set(POLYNOMIAL[0]);
    for (int i = 1; i < 5; ++i) p = p * r + Vec::set(POLYNOMIAL[i]);
    p = p * (r * r) + (r + Vec::set(1.0F));
    const Vec unit = Vec::set(static_cast<float>(sampling::mass::FRACTION_BITS));
    return lanes::to_integers(p * (n + unit).exp2_of_integer());
}

inline void mass_of_chunk(const sampling::Row& row, int64_t begin, int64_t end, double& sum) {
    lanes::IntegerSum masses_so_far;
    for (int64_t i = begin; i < end; i += LANES) {
        const Vec logits = load_logits(row.logits + i, end - i);
        masses_so_far.add(masses(scaled_logits(row, logits)));
    }
    sum = masses_so_far.total();
}

// The sum of exp(logit - best). Its order is fixed: it depends on the row alone.
inline void exponentials_of_chunk(const sampling::Row& row, int64_t begin, int64_t end, double& sum) {
    const Vec best = Vec::set(row.best);
    Vec sums[4] = {Vec::set(0.0F), Vec::set(0.0F), Vec::set(0.0F), Vec::set(0.0F)};
    int64_t i = begin;
    for (; i + 4 * LANES <= end; i += 4 * LANES) {
        for (int part = 0; part < 4; ++part) {
            sums[part] = sums[part] + exp(Vec::load(row.logits + i + part * LANES) - best);
        }
    }
    for (; i < end; i += LANES) {
        sums[0] = sums[0] + exp(load_logits(row.logits + i, end - i) - best);
    }
    sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The tokens of the row whose logit is `bound` or more, in ascending order, with their logits; there
// is room for 16 more than the row has. Sets `count`.
inline void gather(const sampling::Row& row, float bound, float* logits, int32_t* tokens, int64_t& count) {
    int64_t found = 0;
    for (int64_t i = 0; i < row.size; i += LANES) {
        const Vec values = load_logits(row.logits + i, row.size - i);
        uint32_t mask = lanes::at_least(values, Vec::set(bound));
        // The missing ones reach a bound of minus infinity.
        if (row.size - i < LANES) mask &= (1U << (row.size - i)) - 1;
        if (mask == 0) continue;
        found += lanes::pack(values, mask, static_cast<int32_t>(i), logits + found, tokens + found);
    }
    count = found;
}

// From logits to minus scaled logits, in place, and their masses; both have room for whole vectors.
inline void weigh(const sampling::Row& row, float* logits, float* masses_out, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const Vec scaled = scaled_logits(row, load_logits(logits + i, count - i));
        masses(scaled).store(masses_out + i);
        (Vec::set(0.0F) - scaled).store(logits + i);
    }
}

// The mass of the candidates whose value is below `bound`, and how many they are.
inline void weight_below(const float* values, const float* weights, int64_t count, float bound,
                         double& mass, int64_t& number) {
    lanes::IntegerSum sum;
    int64_t below = 0;
    for (int64_t i = 0; i < count; i += LANES) {
        const Vec value = load_or(values + i, count - i, INFINITY);
        const Vec weight = load_first(weights + i, count - i);
        below += LANES - std::popcount(lanes::at_least(value, Vec::set(bound)));
        sum.add(lanes::where_less(value, Vec::set(bound), weight));
    }
    mass = sum.total();
    number = below;
}

// The indices of the candidates whose value is in [low, high), in order; `values_out` and `indices`
// have room for 16 more than there are candidates.
inline void find_between(const float* values, int64_t count, float low, float high,
                         float* values_out, int32_t* indices, int64_t& number) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += LANES) {
        const Vec value = load_logits(values + i, count - i);
        const uint32_t mask =
            lanes::at_least(value, Vec::set(low)) & ~lanes::at_least(value, Vec::set(high));
        if (mask == 0) continue;
        found += lanes::pack(value, mask, static_cast<int32_t>(i), values_out + found,
                             indices + found);
    }
    number = found;
}

// The survivor of [begin, end) with the largest scaled logit + noise, if it beats `drawn`.
//
// Noise is -log(E) of an exponential variate E = -log(u), so that a token beats the score b only if
// E < exp(scaled - b). E >= 1 - u, and 1 - u is the complement of the noise's word: that comparison,
// with some slack, costs one exp in float32 a token. What passes, a few tokens a row, is scored as
// the reference does.
inline void draw_from_chunk(const sampling::Row& row, int64_t begin, int64_t end,
                     sampling::Scored& drawn) {
    using namespace sampling;
    const auto reach = [&]() HEADRACE_INLINE_LAMBDA {
        return row.logit_bound(std::max(row.cut, drawn.score - LARGEST_NOISE));
    };
    float bound = reach();
    uint32_t words[NOISE_BLOCK];
    for (int64_t i = begin; i < end; i += NOISE_BLOCK) {
        constexpr int PARTS = NOISE_BLOCK / LANES;
        Vec logits[PARTS];
        uint32_t reaching[PARTS];
        for (int part = 0; part < PARTS; ++part) {
            const int64_t first = i + part * LANES;
            logits[part] = load_logits(row.logits + first, end - first);
            reaching[part] = lanes::at_least(logits[part], Vec::set(bound));
        }
        if ((reaching[0] | reaching[1] | reaching[2] | reaching[3]) == 0) continue;
        lanes::philox_block(static_cast<uint32_t>(i / 4), row.noise, words);
        for (int part = 0; part < PARTS; ++part) {
            if (reaching[part] == 0) continue;
            const Vec lead = scaled_logits(row, logits[part]) - Vec::set(drawn.score - SCORE_SLACK);
            const Vec most = exp(lead) * Vec::set(0x1p24F);
            uint32_t mask = reaching[part] &
                            lanes::at_least(most, lanes::complements(words + part * LANES));
            for (; mask != 0; mask &= mask - 1) {
                const int lane = part * LANES + std::countr_zero(mask);
                if (i + lane >= end) break;
                const auto token = static_cast<int32_t>(i + lane);
                const float scaled = row.scaled(row.logits[token]);
                if (!row.survives(scaled, token)) continue;
                const float before = drawn.score;
                drawn.take({scaled + gumbel(words[lane]), token});
                if (drawn.score > before) bound = reach();
            }
        }
    }
}

}  // namespace headrace::cpu::HEADRACE_ISA
