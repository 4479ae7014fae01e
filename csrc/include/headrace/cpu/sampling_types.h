// What the sampling kernels share on every instruction set: the state of a row and of its chunks,
// and the arithmetic of one token. Its definition is reference/sampling.py.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>

namespace headrace::cpu::sampling {

// A row is worked on in chunks of this many tokens, by any threads; their results are merged by
// rules that know no order. Largest logits are kept of 16 groups of tokens in each block.
constexpr int64_t CHUNK = 8192;
constexpr int64_t BLOCK = 1024;
constexpr int64_t GROUPS_PER_BLOCK = 16;
constexpr int64_t GROUPS_PER_CHUNK = CHUNK / BLOCK * GROUPS_PER_BLOCK;

// The tokens whose noise is made together: 16 Philox counters of four words.
constexpr int64_t NOISE_BLOCK = 64;

// Masses are multiples of 2^-34, so that the sum of this many, at most 1 each, is exact in float64.
constexpr int64_t MAX_VOCABULARY = int64_t{1} << 19;

// Gumbel noise of a word is at most -log(-log(1 - 2^-33)) = 22.874.
constexpr float LARGEST_NOISE = 22.88F;
// Far above the rounding of float32 sums of numbers below 64, and of exp: what the vector filter of
// `draw_chunk` may err by. Nothing within it of the best score is passed over.
constexpr float SCORE_SLACK = 1e-4F;

// exp(x) for -32 <= x <= 0, from multiplications and additions that each round to float32, so that
// every implementation gets the same bits; the constants are those of vec.h. Times 2^34, and rounded
// to an integer, ties to even.
namespace mass {
constexpr float LEAST = -32.0F;
constexpr int32_t FRACTION_BITS = 34;
constexpr double UNIT = 0x1p-34;
}  // namespace mass

struct NoiseKey {
    uint32_t seed[2], position[2];  // low and high words
};

struct Scored {
    float score;
    int32_t token;

    // A total order: merged results do not depend on the order of merging.
    void take(Scored other) {
        if (other.score > score || (other.score == score && other.token < token)) *this = other;
    }
};

struct alignas(64) Row {
    const float* logits;
    int64_t size;
    float best;       // the largest logit
    int32_t best_id;  // its lowest token
    // Finite, and without NaN beside it.
    bool valid;
    bool random, ordered, limited;
    float temperature;
    int64_t top_k;  // of a limited row
    double top_p;
    NoiseKey noise;
    // The survivors of the filters: scaled logits above `cut`, and equal to it up to `cut_id`.
    float cut;
    int32_t cut_id;
    Scored first;  // the best token, if it survives

    float scaled(float logit) const { return (logit - best) / temperature; }

    bool survives(float scaled, int32_t token) const {
        return scaled > cut || (scaled == cut && token <= cut_id);
    }

    // A logit below which none has a scaled value of `least` or more: the two roundings of `scaled`
    // and that of a quotient below the normal numbers are allowed for.
    float logit_bound(float least) const {
        const double bound =
            best + static_cast<double>(least) * temperature * (1 + 1e-6) - temperature * double{FLT_MIN};
        if (!(bound > -FLT_MAX)) return -INFINITY;
        return std::nextafterf(static_cast<float>(bound), -INFINITY);
    }
};

struct alignas(64) Chunk {
    float groups[GROUPS_PER_CHUNK];
    double sum;  // of the masses or of the exponentials
    float best;
    int32_t best_id;
    bool has_nan;
    Scored drawn;
};

constexpr int64_t ROW_BYTES = sizeof(Row), CHUNK_BYTES = sizeof(Chunk);

// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
namespace philox {
constexpr int ROUNDS = 10;
constexpr uint32_t MULTIPLIERS[2] = {0xD2511F53, 0xCD9E8D57};
constexpr uint32_t WEYL[2] = {0x9E3779B9, 0xBB67AE85};
}  // namespace philox

// The four words of a counter: the noise of tokens 4 counter to 4 counter + 3.
inline void philox_words(uint32_t counter, const NoiseKey& key, uint32_t* words) {
    uint32_t word[4] = {counter, key.position[0], key.position[1], 0};
    uint32_t round_key[2] = {key.seed[0], key.seed[1]};
    for (int round = 0; round < philox::ROUNDS; ++round) {
        const uint64_t first = uint64_t{word[0]} * philox::MULTIPLIERS[0];
        const uint64_t second = uint64_t{word[2]} * philox::MULTIPLIERS[1];
        word[0] = static_cast<uint32_t>(second >> 32) ^ word[1] ^ round_key[0];
        word[1] = static_cast<uint32_t>(second);
        word[2] = static_cast<uint32_t>(first >> 32) ^ word[3] ^ round_key[1];
        word[3] = static_cast<uint32_t>(first);
        for (int i = 0; i < 2; ++i) round_key[i] += philox::WEYL[i];
    }
    for (int i = 0; i < 4; ++i) words[i] = word[i];
}

inline float gumbel(uint32_t word) {
    const double uniform = (word + 0.5) * 0x1p-32;
    return static_cast<float>(-std::log(-std::log(uniform)));
}

inline float gumbel_of_token(int32_t token, const NoiseKey& key) {
    uint32_t words[4];
    philox_words(static_cast<uint32_t>(token) >> 2, key, words);
    return gumbel(words[token & 3]);
}

}  // namespace headrace::cpu::sampling
