// quantized_linear and quantized_embedding: checks, the split into chunks, and the choice of the
// instruction set.
#include "headrace/cpu/quantized_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "headrace/cpu/isa.h"
#include "headrace/cpu/pool.h"
#include "headrace/cpu/quantized_linear_avx2.h"
#include "headrace/cpu/quantized_linear_avx512.h"
#include "headrace/cpu/quantized_linear_exact.h"
#include "headrace/cpu/quantized_linear_exact_avx512.h"
#include "headrace/cpu/quantized_linear_scalar.h"
#include "headrace/cpu/tape.h"

namespace headrace {
namespace {

using namespace cpu::quantized;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Enough column blocks at a time to make claiming them cheap: of 576 inputs 4 are 23 KB.
constexpr int64_t BLOCKS_PER_CHUNK = 4;
// Fewer activations than this are quantized sooner than a second thread helps.
constexpr int64_t VALUES_WORTH_A_THREAD = 32768;
// Of two column blocks, unpacked at a time: they stay in the nearest cache.
constexpr int64_t BYTES_UNPACKED = 26 << 10;
// Tiles that share what is unpacked; bounds their totals.
constexpr int64_t TILES_TOGETHER = 44;

struct Product {
    const void* x;
    bool x_is_bf16;
    int64_t x_stride;
    const uint8_t* weights;
    int64_t format;
    bool exact;
    uint8_t* scratch;
    Output out;
    int64_t rows, groups, blocks;
};

// Parts of nearly equal size, at most `most`, of which there is a multiple of a number: rows in
// tiles, column blocks in chunks.
struct Split {
    int64_t size, count;

    Split(int64_t size, int64_t most, int64_t multiple = 1)
        : size(size), count(((size + most - 1) / most + multiple - 1) / multiple * multiple) {}
    int64_t begin(int64_t part) const { return size * part / count; }
    int64_t size_of(int64_t part) const { return begin(part + 1) - begin(part); }
};

template <class Isa, int PARTS>
void quantize(const Product& p) {
    const Split tiles(p.rows, Isa::MAX_ROWS);
    const auto quantize_tile = [&](int64_t tile) {
        const int64_t begin = tiles.begin(tile), at = begin * p.x_stride;
        const int rows = static_cast<int>(tiles.size_of(tile));
        uint8_t* to = p.scratch + begin * p.groups * Isa::row_bytes(PARTS);
        if (p.x_is_bf16) {
            const auto* x = static_cast<const uint16_t*>(p.x) + at;
            Isa::template quantize_tile<uint16_t, PARTS>(x, p.x_stride, p.groups, to, rows);
        } else {
            const auto* x = static_cast<const float*>(p.x) + at;
            Isa::template quantize_tile<float, PARTS>(x, p.x_stride, p.groups, to, rows);
        }
    };
    if (p.rows * p.groups * GROUP < VALUES_WORTH_A_THREAD) {
        for (int64_t tile = 0; tile < tiles.count; ++tile) quantize_tile(tile);
    } else {
        cpu::parallel_for(tiles.count, quantize_tile);
    }
}

// Each tile of each column block on its own.
template <class Isa, class F, size_t... R>
void multiply(const Product& p, std::index_sequence<R...>) {
    static constexpr std::array PRODUCTS = {&Isa::template product<F, static_cast<int>(R + 1)>...};
    const Split tiles(p.rows, Isa::MAX_ROWS);
    const Split chunks(p.blocks, BLOCKS_PER_CHUNK, cpu::num_threads());
    cpu::parallel_for(chunks.count, [&](int64_t chunk) {
        float totals[Isa::MAX_ROWS * COLUMNS];
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
            const int64_t begin = tiles.begin(tile), rows = tiles.size_of(tile);
            uint8_t* x = p.scratch + begin * p.groups * Isa::row_bytes(F::PARTS);
            for (int64_t block = chunks.begin(chunk); block < chunks.begin(chunk + 1); ++block) {
                const uint8_t* weights = p.weights + block * p.groups * F::BYTES;
                PRODUCTS[rows - 1](weights, x, p.groups, totals);
                Isa::write(p.out, totals, COLUMNS, begin, rows, block * COLUMNS);
            }
        }
    });
}

// Tiles [first, last) of two column blocks, which are unpacked once. Meanwhile the weights that
// come next, or with which this thread is likely to go on, are fetched.
template <class Isa, class F, size_t... R>
void multiply_pair(const Product& p, int64_t block, int64_t first, int64_t last,
                   std::index_sequence<R...>) {
    static constexpr std::array PRODUCTS = {
        &Isa::template product_of_two<F::MINIMUM, F::PARTS, static_cast<int>(R + 1)>...};
    using Unpacked = typename Isa::template Unpacked<F::PARTS>;
    constexpr int64_t GROUPS_UNPACKED = BYTES_UNPACKED / (2 * sizeof(Unpacked));
    Unpacked unpacked[GROUPS_UNPACKED * 2];
    alignas(64) float totals[TILES_TOGETHER * Isa::MAX_ROWS * 2 * COLUMNS];
    const Split tiles(p.rows, Isa::MAX_ROWS), parts(p.groups, GROUPS_UNPACKED);
    const int64_t row = tiles.begin(first), rows = tiles.begin(last) - row;
    const int64_t width = std::min<int64_t>(2, p.blocks - block), stride = p.groups * F::BYTES;
    const uint8_t* weights = p.weights + block * stride;
    const int64_t lines = F::BYTES / 64, lines_a_tile = (lines + last - first - 1) / (last - first);
    std::fill(totals, totals + rows * 2 * COLUMNS, 0.0f);
    for (int64_t part = 0; part < parts.count; ++part) {
        const int64_t group = parts.begin(part), groups = parts.size_of(part);
        for (int64_t b = 0; b < width; ++b) {
            Isa::template unpack<F>(weights + b * stride + group * F::BYTES, groups, unpacked + b);
        }
        const uint8_t* next = weights + (part + 1 < parts.count ? parts.begin(part + 1) * F::BYTES
                                                                : 2 * cpu::num_threads() * stride);
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t begin = tiles.begin(tile), height = tiles.size_of(tile);
            const int64_t done = (tile - first) * lines_a_tile;
            const Ahead ahead{next + done * groups * 64, stride, done < lines ? lines_a_tile : 0};
            const uint8_t* x =
                p.scratch + (begin * p.groups + group * height) * Isa::row_bytes(F::PARTS);
            float* to = totals + (begin - row) * 2 * COLUMNS;
            PRODUCTS[height - 1](unpacked, x, groups, ahead, to);
        }
    }
    for (int64_t b = 0; b < width; ++b) {
        Isa::write(p.out, totals + b * COLUMNS, 2 * COLUMNS, row, rows, (block + b) * COLUMNS);
    }
}

template <class Isa, class F>
void run_with(const Product& p) {
    constexpr std::make_index_sequence<Isa::MAX_ROWS> ROWS;
    quantize<Isa, F::PARTS>(p);
    if constexpr (Isa::UNPACKS) {
        if (Isa::EXACT || p.rows > Isa::MAX_ROWS) {
            const int64_t tiles = Split(p.rows, Isa::MAX_ROWS).count;
            return cpu::parallel_for((p.blocks + 1) / 2, [&](int64_t pair) {
                for (int64_t tile = 0; tile < tiles; tile += TILES_TOGETHER) {
                    const int64_t end = std::min(tiles, tile + TILES_TOGETHER);
                    multiply_pair<Isa, F>(p, 2 * pair, tile, end, ROWS);
                }
            });
        }
    }
    if constexpr (!Isa::EXACT) multiply<Isa, F>(p, ROWS);
}

void run(const Product& p) {
    with_format(p.format, [&]<class F>(F) {
#if defined(__x86_64__)
        const bool avx512 = cpu::isa() == cpu::Isa::avx512, avx2 = cpu::isa() == cpu::Isa::avx2;
        if (p.exact && avx512) return run_with<exact::Avx512, F>(p);
        if (p.exact && avx2) return run_with<exact::Avx2, F>(p);
#endif
        if (p.exact) return run_with<exact::Scalar, F>(p);
        if constexpr (!F::WIDE) {
#if defined(__x86_64__)
            if (avx512) return run_with<Avx512, F>(p);
            if (avx2) return run_with<Avx2, F>(p);
#endif
            run_with<Scalar, F>(p);
        }
    });
}

bool is_bf16(const Tensor& tensor, const char* name) {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                    " must be float32 or bfloat16");
    return type == ScalarType::BFloat16;
}

// What the checks need of a format.
struct FormatFacts {
    int64_t bytes = 0;
    int parts = 1;
    bool wide = false;
};

FormatFacts check_packed(const Tensor& weight, int64_t format) {
    FormatFacts facts;
    const bool known = with_format(format, [&]<class F>(F) {
        facts = {.bytes = F::BYTES, .parts = F::PARTS, .wide = F::WIDE};
    });
    STD_TORCH_CHECK(known, "there is no packed format ", format);
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Byte && weight.dim() == 3 &&
                        weight.is_contiguous() && weight.size(2) == facts.bytes,
                    "weight must be packed: contiguous uint8 [ceil(Out / 16), In / 32, ",
                    facts.bytes, "]");
    return facts;
}

void quantized_linear(Tensor x, Tensor weight, int64_t format, int64_t activation_bits,
                      std::optional<Tensor> bias, Tensor scratch, Tensor out) {
    const FormatFacts facts = check_packed(weight, format);
    STD_TORCH_CHECK(activation_bits == 16 || (activation_bits == 8 && !facts.wide),
                    "activation_bits must be 8, if scales are fp16, or 16, not ", activation_bits);
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == weight.size(1) * GROUP && x.stride(1) == 1,
                    "x must be [T, ", weight.size(1) * GROUP, "] with rows of adjacent values");
    STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == x.size(0) && out.stride(1) == 1 &&
                        (out.size(1) + COLUMNS - 1) / COLUMNS == weight.size(0),
                    "out must be [T, Out] with rows of adjacent values");
    const int64_t needed =
        activation_bits == 8 ? row_bytes(facts.parts) : exact::row_bytes(facts.parts);
    STD_TORCH_CHECK(scratch.scalar_type() == ScalarType::Byte && scratch.is_contiguous() &&
                        scratch.numel() >= x.size(0) * weight.size(1) * needed,
                    "scratch must be contiguous uint8, at least [T, In / 32, ", needed, "]");
    if (bias) {
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out.size(1) && bias->is_contiguous(),
                        "bias must be contiguous [Out]");
    }
    const Product product{
        .x = x.data_ptr(),
        .x_is_bf16 = is_bf16(x, "x"),
        .x_stride = x.stride(0),
        .weights = static_cast<const uint8_t*>(weight.data_ptr()),
        .format = format,
        .exact = activation_bits == 16,
        .scratch = static_cast<uint8_t*>(scratch.data_ptr()),
        .out = {.out = out.data_ptr(),
                .stride = out.stride(0),
                .columns = out.size(1),
                .bias = bias ? bias->data_ptr() : nullptr,
                .is_bf16 = is_bf16(out, "out"),
                .bias_is_bf16 = bias && is_bf16(*bias, "bias")},
        .rows = x.size(0),
        .groups = weight.size(1),
        .blocks = weight.size(0),
    };
    if (product.rows > 0) cpu::launch<run>(product);
}

template <class F>
void unpack_row(const uint8_t* group, int column, int64_t groups, float* out) {
    for (int64_t g = 0; g < groups; ++g, group += F::BYTES, out += GROUP) {
        for (int k = 0; k < GROUP; ++k) {
            const int part = k / (GROUP / F::PARTS);
            const float d = scale_of<F>(group + F::scales(part), column);
            float m = 0.0f;
            if constexpr (F::MINIMUM) m = scale_of<F>(group + F::minima(part), column);
            out[k] = d * static_cast<float>(integer_of<F>(group, column, k) - F::ZERO) + m;
        }
    }
}

struct Lookup {
    const int64_t* ids;
    int64_t count;
    const uint8_t* weights;
    int64_t format, groups, blocks;
    float* out;
};

void look_up(const Lookup& l) {
    const int64_t end = l.blocks * COLUMNS;
    with_format(l.format, [&]<class F>(F) {
        for (int64_t i = 0; i < l.count; ++i) {
            const int64_t id = l.ids[i];
            STD_TORCH_CHECK(id >= 0 && id < end, "token id ", id, " is not in [0, ", end, ")");
            const uint8_t* block = l.weights + id / COLUMNS * l.groups * F::BYTES;
            unpack_row<F>(block, static_cast<int>(id % COLUMNS), l.groups,
                          l.out + i * l.groups * GROUP);
        }
    });
}

void quantized_embedding(Tensor token_ids, Tensor weight, int64_t format, Tensor out) {
    check_packed(weight, format);
    const int64_t groups = weight.size(1), width = groups * GROUP, count = token_ids.numel();
    STD_TORCH_CHECK(token_ids.scalar_type() == ScalarType::Long && token_ids.is_contiguous() &&
                        token_ids.dim() == 1,
                    "token_ids must be contiguous int64 [T]");
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.is_contiguous() &&
                        out.dim() == 2 && out.size(0) == count && out.size(1) == width,
                    "out must be contiguous float32 [T, In]");
    cpu::launch<look_up>(Lookup{
        .ids = static_cast<const int64_t*>(token_ids.data_ptr()),
        .count = count,
        .weights = static_cast<const uint8_t*>(weight.data_ptr()),
        .format = format,
        .groups = groups,
        .blocks = weight.size(0),
        .out = static_cast<float*>(out.data_ptr()),
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def(
        "quantized_linear(Tensor x, Tensor weight, int format, int activation_bits, Tensor? bias, "
        "Tensor(a!) scratch, Tensor(b!) out) -> ()");
    m.def("quantized_embedding(Tensor token_ids, Tensor weight, int format, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) {
    m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
    m.impl("quantized_embedding", TORCH_BOX(&quantized_embedding));
}

}  // namespace headrace
