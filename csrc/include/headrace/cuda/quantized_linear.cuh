// Products of packed 4- and 8-bit weights with bf16 activations: packed_format.py's layout as it
// is.
//
// Each warp makes 32 outputs. Weights stream into its own stages of shared memory by asynchronous
// copies. An integer of a weight is a bf16, so a tensor core's products are exact; those of inputs
// that share a scale are added up in fp32 before it is applied.
//
// The order of a sum does not depend on the number of tokens: inputs are cut into units of 128, and
// lane w of 8 adds the units w, w + 8, ... in ascending order; then the lanes are added likewise.
// For few tokens the weights are what is read: a block's 8 warps are the lanes of 32 outputs. For
// more it is the activations: a block's warps take the same lanes of 256 outputs, and find each
// other's activations in the first-level cache.
#pragma once

#include "headrace/cuda/simt.cuh"

namespace headrace::cuda {

constexpr int GROUP = 32, COLUMNS = 16;
constexpr int LANES = 8, LINEAR_WARPS = 8, LINEAR_THREADS = 32 * LINEAR_WARPS;
constexpr int UNIT = 4;    // groups
constexpr int STRIPS = 2;  // column blocks of 16 outputs
constexpr int TILE_TOKENS = 8;
constexpr int OUTPUTS = STRIPS * COLUMNS;  // of a warp
// Tiles of 8 tokens of a block: of few tokens, and of more.
constexpr int FEW_TOKENS = 16, WIDE_TILES = 4;

// packed_format.PackedFormat.
template <int BITS_, bool MINIMUM_, int PARTS_, int SCALE_BITS_>
struct Packed {
    static constexpr int BITS = BITS_, PARTS = PARTS_, SCALE_BITS = SCALE_BITS_;
    static constexpr bool MINIMUM = MINIMUM_;
    static constexpr int CODE = BITS + 16 * MINIMUM + 32 * (PARTS == 2) + SCALE_BITS * 4 - 64;
    static constexpr int INTEGERS = COLUMNS * GROUP * BITS / 8;
    static constexpr int SCALES = COLUMNS * PARTS * SCALE_BITS / 8;
    static constexpr int BYTES = INTEGERS + SCALES * (MINIMUM ? 2 : 1);
    static constexpr int VECTORS = BYTES / 16;
    static constexpr int STAGE = STRIPS * UNIT * BYTES;
    static constexpr int STAGES = STAGE <= 2560 ? 4 : 3;
    static_assert(BYTES % 16 == 0);

    // Where a vector of a group goes. Lane 4 g + t reads words 2 g and 2 g + 1 of row t, of 16
    // words: so the vectors that half a warp reads, two of each of four rows, stand together.
    static HEADRACE_HOST_DEVICE int place(int vector) {
        if (vector >= INTEGERS / 16) return vector;
        const int row = vector / 4 % 4, quarter = vector % 4;
        return vector / 16 * 16 + quarter / 2 * 8 + row * 2 + quarter % 2;
    }
};

// Calls f with the format of this code, if there is a kernel of it.
template <class F>
bool with_packed_format(int64_t code, F&& f) {
    const auto is = [&](auto format) {
        if (code != decltype(format)::CODE) return false;
        f(format);
        return true;
    };
    return is(Packed<4, false, 1, 16>{}) || is(Packed<4, true, 1, 16>{}) ||
           is(Packed<4, true, 1, 32>{}) || is(Packed<8, false, 1, 16>{});
}

struct Linear {
    const bf16* x;  // [tokens, inputs]
    const uint8_t* weight;
    const float* bias;  // null, or fp32, or bf16
    void* out;          // [tokens, outputs]
    int64_t x_stride, out_stride, tokens;
    int groups, outputs;
    bool bias_is_bf16, out_is_bf16;
    float* partials;  // null, or [LANES, tokens, outputs]
};

// The stages of all warps; later the sums of the lanes go where they were.
template <class F>
constexpr int LINEAR_MEMORY = LINEAR_WARPS * F::STAGES * F::STAGE;
static_assert(LANES * OUTPUTS * FEW_TOKENS * 4 <= LINEAR_MEMORY<Packed<4, false, 1, 16>>);

// The units of the lanes [lane, end), one after another.
struct UnitWalk {
    int lane, end, groups, unit;

    HEADRACE_DEVICE UnitWalk(int first_lane, int end_lane, int all_groups)
        : lane(first_lane), end(end_lane), groups(all_groups), unit(first_lane) {}
    // Lanes that have no unit are the last ones.
    HEADRACE_DEVICE bool exists() const { return lane < end && unit * UNIT < groups; }
    HEADRACE_DEVICE void advance() {
        unit += LANES;
        if (unit * UNIT >= groups) unit = ++lane;
    }
};

// The units that a warp adds up, copied ahead.
template <class F>
struct WeightLoader {
    const uint8_t* const weight;  // of the warp's first strip
    uint8_t* const stages;
    const int strips, lane;  // strips: those that exist
    UnitWalk walk;
    int stage = 0;

    HEADRACE_DEVICE void start_next() {
        uint8_t* const to = stages + stage * F::STAGE;
        stage = stage + 1 == F::STAGES ? 0 : stage + 1;
        if (walk.exists()) {
            const int groups = walk.groups, first = walk.unit * UNIT, count = groups - first;
            walk.advance();
            HEADRACE_UNROLL
            for (int strip = 0; strip < STRIPS; ++strip) {
                const uint8_t* const from = weight + (int64_t{strip} * groups + first) * F::BYTES;
                for (int i = lane; i < UNIT * F::VECTORS; i += 32) {
                    const int group = i / F::VECTORS, vector = i % F::VECTORS;
                    copy_async_16(to + (strip * UNIT + group) * F::BYTES + F::place(vector) * 16,
                                  from + i * 16, group < count && strip < strips);
                }
            }
        }
        copy_async_commit();
    }
};

struct alignas(8) Word2 {
    uint32_t x, y;
};

// The weights of outputs 2 g (rows g of a) and 2 g + 1 (rows g + 8), of both halves of a group:
// places 2 t and 2 t + 1 hold inputs 4 t and 4 t + 2, places 2 t + 8 and 2 t + 9 the two others.
template <class F>
HEADRACE_DEVICE void widen_weights(const uint8_t* group, int g, int t, uint32_t (&a)[2][4]) {
    const auto read = [&](int row) {
        const int vector = F::place(row * 4 + g / 2);
        return *reinterpret_cast<const Word2*>(group + vector * 16 + g % 2 * 8);
    };
    const Word2 low = read(t);
    if constexpr (F::BITS == 4) {
        HEADRACE_UNROLL
        for (int half = 0; half < 2; ++half) {
            a[half][0] = widen_nibbles<bf16>(low.x >> 4 * half, !F::MINIMUM);
            a[half][1] = widen_nibbles<bf16>(low.y >> 4 * half, !F::MINIMUM);
            a[half][2] = widen_nibbles<bf16>(low.x >> (4 * half + 8), !F::MINIMUM);
            a[half][3] = widen_nibbles<bf16>(low.y >> (4 * half + 8), !F::MINIMUM);
        }
    } else {
        static_assert(!F::MINIMUM);
        const Word2 high = read(t + 4);
        HEADRACE_UNROLL
        for (int half = 0; half < 2; ++half) {
            // u - 128 as a signed number is u with its highest bit turned.
            const uint32_t x = (half ? high.x : low.x) ^ 0x80808080U;
            const uint32_t y = (half ? high.y : low.y) ^ 0x80808080U;
            a[half][0] = widen_even<bf16, int8_t>(x);
            a[half][1] = widen_even<bf16, int8_t>(y);
            a[half][2] = widen_odd<bf16, int8_t>(x);
            a[half][3] = widen_odd<bf16, int8_t>(y);
        }
    }
}

// Scales (index 0) or minima (1) of outputs 2 g and 2 g + 1.
struct Pair {
    float first, second;
};
template <class F>
HEADRACE_DEVICE Pair scales_of(const uint8_t* group, int index, int part, int g) {
    const uint8_t* const from =
        group + F::INTEGERS + index * F::SCALES + (part * COLUMNS + 2 * g) * F::SCALE_BITS / 8;
    if constexpr (F::SCALE_BITS == 32) {
        return *reinterpret_cast<const Pair*>(from);
    } else {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
        return {to_float(fp16{static_cast<uint16_t>(word)}),
                to_float(fp16{static_cast<uint16_t>(word >> 16)})};
    }
}

// Inputs of one token in the order of widen_weights: of both halves of a group.
struct Inputs {
    uint32_t b[2][2];
};
HEADRACE_DEVICE Inputs load_inputs(const bf16* x, bool exists, int t) {
    Inputs in = {};
    if (!exists) return in;
    HEADRACE_UNROLL
    for (int half = 0; half < 2; ++half) {
        const Word2 words = *reinterpret_cast<const Word2*>(x + 16 * half + 4 * t);
        in.b[half][0] = (words.x & 0xffffU) | words.y << 16;
        in.b[half][1] = words.x >> 16 | (words.y & 0xffff0000U);
    }
    return in;
}

// sums[strip][tile]: (output 2 g, tokens 2 t and 2 t + 1), (output 2 g + 1, the same).
template <class F, int TILES>
struct Sums {
    float values[STRIPS][TILES][4];

    HEADRACE_DEVICE void add(const Sums& other) {
        HEADRACE_UNROLL
        for (int i = 0; i < STRIPS * TILES * 4; ++i)
            values[i / (TILES * 4)][i / 4 % TILES][i % 4] +=
                other.values[i / (TILES * 4)][i / 4 % TILES][i % 4];
    }

    HEADRACE_DEVICE void add_group(const uint8_t* stage, int group, const Inputs (&in)[TILES],
                                   int g, int t) {
        [[maybe_unused]] float of_inputs[TILES][F::PARTS][4] = {};
        if constexpr (F::MINIMUM) {
            // A minimum is a factor of the sum of its inputs, which is a product with ones.
            constexpr uint32_t ONES[4] = {0x3f803f80U, 0x3f803f80U, 0x3f803f80U, 0x3f803f80U};
            HEADRACE_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                HEADRACE_UNROLL
                for (int half = 0; half < 2; ++half)
                    multiply_add<bf16>(of_inputs[tile][half * (F::PARTS - 1)], ONES,
                                       in[tile].b[half][0], in[tile].b[half][1]);
            }
        }
        HEADRACE_UNROLL
        for (int strip = 0; strip < STRIPS; ++strip) {
            const uint8_t* const from = stage + (strip * UNIT + group) * F::BYTES;
            uint32_t a[2][4];
            widen_weights<F>(from, g, t, a);
            HEADRACE_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                float products[F::PARTS][4] = {};
                HEADRACE_UNROLL
                for (int half = 0; half < 2; ++half)
                    multiply_add<bf16>(products[half * (F::PARTS - 1)], a[half],
                                       in[tile].b[half][0], in[tile].b[half][1]);
                HEADRACE_UNROLL
                for (int part = 0; part < F::PARTS; ++part) {
                    const Pair d = scales_of<F>(from, 0, part, g);
                    float (&to)[4] = values[strip][tile];
                    HEADRACE_UNROLL
                    for (int i = 0; i < 4; ++i)
                        to[i] = fmaf(i < 2 ? d.first : d.second, products[part][i], to[i]);
                    if constexpr (F::MINIMUM) {
                        const Pair m = scales_of<F>(from, 1, part, g);
                        HEADRACE_UNROLL
                        for (int i = 0; i < 4; ++i)
                            to[i] = fmaf(i < 2 ? m.first : m.second, of_inputs[tile][part][i % 2],
                                         to[i]);
                    }
                }
            }
        }
    }
};

// What the lanes came to, with the bias.
HEADRACE_DEVICE void store_output(const Linear& p, float sum, int output, int64_t token) {
    if (p.bias) {
        sum += p.bias_is_bf16 ? to_float(reinterpret_cast<const bf16*>(p.bias)[output])
                              : p.bias[output];
    }
    const int64_t to = token * p.out_stride + output;
    if (p.out_is_bf16)
        static_cast<bf16*>(p.out)[to] = from_float<bf16>(sum);
    else
        static_cast<float*>(p.out)[to] = sum;
}

// A warp's place, and the sums of one lane after another.
template <class F, int TILES>
struct LaneSums {
    // Groups whose activations are read before the first of them is used.
    static constexpr int AHEAD = TILES > 2 ? 2 : UNIT;
    const Linear& p;
    const int g, t, first_output;
    const int64_t first_token;
    WeightLoader<F> loader;
    UnitWalk walk;
    int stage = 0;

    HEADRACE_DEVICE LaneSums(const Linear& params, uint8_t* memory, int warp, int lane, int number,
                             int first_lane, int end_lane)
        : p(params),
          g(lane / 4),
          t(lane % 4),
          first_output(number * OUTPUTS),
          first_token(int64_t{blockIdx.y} * TILES * TILE_TOKENS),
          loader{params.weight + int64_t{number} * STRIPS * params.groups * F::BYTES,
                 memory + warp * F::STAGES * F::STAGE,
                 (params.outputs + COLUMNS - 1) / COLUMNS - number * STRIPS, lane,
                 UnitWalk(first_lane, end_lane, params.groups)},
          walk(first_lane, end_lane, params.groups) {
        HEADRACE_UNROLL
        for (int i = 0; i < F::STAGES - 1; ++i) loader.start_next();
    }

    // Those of AHEAD groups; zeros of groups that do not exist, whose weights are zeros too.
    HEADRACE_DEVICE void load(Inputs (&in)[AHEAD][TILES], int first) const {
        HEADRACE_UNROLL
        for (int i = 0; i < AHEAD; ++i) {
            const int group = walk.unit * UNIT + first + i;
            const bf16* const x = p.x + (first_token + g) * p.x_stride + group * GROUP;
            HEADRACE_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                const bool exists =
                    group < p.groups && first_token + tile * TILE_TOKENS + g < p.tokens;
                in[i][tile] = load_inputs(x + tile * TILE_TOKENS * p.x_stride, exists, t);
            }
        }
    }

    HEADRACE_DEVICE void add_unit(Sums<F, TILES>& sums) {
        Inputs in[AHEAD][TILES];
        load(in, 0);
        copy_async_wait<F::STAGES - 2>();
        sync_warp();
        // Into the stage that was read last: the warp is past it.
        loader.start_next();
        const uint8_t* const from = loader.stages + stage * F::STAGE;
        stage = stage + 1 == F::STAGES ? 0 : stage + 1;
        HEADRACE_UNROLL
        for (int first = 0; first < UNIT; first += AHEAD) {
            if (first > 0) load(in, first);
            HEADRACE_UNROLL
            for (int i = 0; i < AHEAD; ++i) sums.add_group(from, first + i, in[i], g, t);
        }
        walk.advance();
    }

    HEADRACE_DEVICE Sums<F, TILES> next_lane() {
        Sums<F, TILES> sums = {};
        for (const int lane = walk.lane; walk.exists() && walk.lane == lane;) add_unit(sums);
        return sums;
    }

    // Calls f(value, output of the warp's, token of the block's) for each that this thread holds.
    template <class Call>
    HEADRACE_DEVICE void for_each(const Sums<F, TILES>& sums, Call&& f) const {
        HEADRACE_UNROLL
        for (int strip = 0; strip < STRIPS; ++strip) {
            HEADRACE_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                HEADRACE_UNROLL
                for (int i = 0; i < 4; ++i)
                    f(sums.values[strip][tile][i], strip * COLUMNS + 2 * g + i / 2,
                      tile * TILE_TOKENS + 2 * t + i % 2);
            }
        }
    }
};

// Of few tokens. grid: [ceil(column blocks / 2), ceil(tokens / (8 TILES))].
template <class F, int TILES>
HEADRACE_KERNEL_OF(LINEAR_THREADS, 2)
packed_linear(Linear p) {
    constexpr int TOKENS = TILES * TILE_TOKENS;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    uint8_t* const memory = shared_memory();
    LaneSums<F, TILES> own(p, memory, warp, lane, static_cast<int>(blockIdx.x), warp, warp + 1);
    const Sums<F, TILES> sums = own.next_lane();
    copy_async_wait<0>();
    sync_threads();
    auto* const of_lanes = reinterpret_cast<float*>(memory);
    own.for_each(sums, [&](float value, int output, int token) {
        of_lanes[(warp * TOKENS + token) * OUTPUTS + output] = value;
    });
    sync_threads();
    for (int i = static_cast<int>(threadIdx.x); i < OUTPUTS * TOKENS; i += LINEAR_THREADS) {
        const int output = own.first_output + i % OUTPUTS;
        const int64_t token = own.first_token + i / OUTPUTS;
        if (output >= p.outputs || token >= p.tokens) continue;
        float sum = of_lanes[i];
        HEADRACE_UNROLL
        for (int other = 1; other < LANES; ++other) sum += of_lanes[other * OUTPUTS * TOKENS + i];
        store_output(p, sum, output, token);
    }
}

// Of more tokens. grid: [ceil(column blocks / 16), ceil(tokens / 32), 1, 2, 4 or 8]; a block of
// several of the third dimension writes the partials of its lanes.
template <class F>
HEADRACE_KERNEL_OF(LINEAR_THREADS, 1)
packed_linear_wide(Linear p) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int lanes = LANES / static_cast<int>(gridDim.z);
    const int first_lane = static_cast<int>(blockIdx.z) * lanes;
    LaneSums<F, WIDE_TILES> own(p, shared_memory(), warp, lane,
                                static_cast<int>(blockIdx.x) * LINEAR_WARPS + warp, first_lane,
                                first_lane + lanes);
    Sums<F, WIDE_TILES> total;
    for (int i = 0; i < lanes; ++i) {
        const Sums<F, WIDE_TILES> sums = own.next_lane();
        if (p.partials) {
            float* const to = p.partials + (first_lane + i) * p.tokens * p.outputs;
            own.for_each(sums, [&](float value, int in_warp, int in_block) {
                const int output = own.first_output + in_warp;
                const int64_t token = own.first_token + in_block;
                if (output < p.outputs && token < p.tokens) to[token * p.outputs + output] = value;
            });
        } else if (i == 0) {
            total = sums;
        } else {
            total.add(sums);
        }
    }
    if (p.partials) return;
    own.for_each(total, [&](float value, int in_warp, int in_block) {
        const int output = own.first_output + in_warp;
        const int64_t token = own.first_token + in_block;
        if (output < p.outputs && token < p.tokens) store_output(p, value, output, token);
    });
}

// Adds the lanes' partials. grid: [ceil(tokens * outputs / LINEAR_THREADS)].
HEADRACE_KERNEL_OF(LINEAR_THREADS, 1) add_lanes(Linear p) {
    const int64_t size = p.tokens * p.outputs;
    const int64_t i = int64_t{blockIdx.x} * LINEAR_THREADS + threadIdx.x;
    if (i >= size) return;
    float sum = p.partials[i];
    HEADRACE_UNROLL
    for (int lane = 1; lane < LANES; ++lane) sum += p.partials[lane * size + i];
    store_output(p, sum, static_cast<int>(i % p.outputs), i / p.outputs);
}

}  // namespace headrace::cuda
