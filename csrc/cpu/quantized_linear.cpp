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
#include "headrace/cpu/quantized_linear_scalar.h"
#include "headrace/cpu/tape.h"

namespace headrace {
namespace {

using namespace cpu::quantized;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Enough column blocks at a time to make claiming them cheap: of 576 inputs 4 are 23 KB.
constexpr int64_t BLOCKS_PER_CHUNK = 4;
// Fewer activations than this are quantized sooner than a second thread wakes.
constexpr int64_t VALUES_WORTH_A_THREAD = 8192;

struct Product {
    const void* x;
    bool x_is_bf16;
    int64_t x_stride;
    const uint8_t* weights;
    int64_t block_bytes;
    const void* bias;
    bool bias_is_bf16;
    uint8_t* scratch;
    void* out;
    bool out_is_bf16;
    int64_t out_stride;
    int64_t rows, columns, groups, blocks;
};

// Rows in tiles of nearly equal height, at most MAX_ROWS.
struct Tiles {
    int64_t rows, count;

    Tiles(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
    int64_t begin(int64_t tile) const { return rows * tile / count; }
};

template <class Isa>
void quantize(const Product& p) {
    const Tiles tiles(p.rows, Isa::MAX_ROWS);
    const auto quantize_tile = [&](int64_t tile) {
        const int64_t begin = tiles.begin(tile), rows = tiles.begin(tile + 1) - begin;
        uint8_t* to = p.scratch + begin * p.groups * ROW_BYTES;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = (begin + r) * p.x_stride;
            const int height = static_cast<int>(rows), row = static_cast<int>(r);
            if (p.x_is_bf16) {
                Isa::quantize_row(static_cast<const uint16_t*>(p.x) + at, p.groups, to, height, row);
            } else {
                Isa::quantize_row(static_cast<const float*>(p.x) + at, p.groups, to, height, row);
            }
        }
    };
    if (p.rows * p.groups * GROUP < VALUES_WORTH_A_THREAD) {
        for (int64_t tile = 0; tile < tiles.count; ++tile) quantize_tile(tile);
    } else {
        cpu::parallel_for(tiles.count, quantize_tile);
    }
}

void write_tile(const Product& p, const float* totals, int64_t row, int64_t rows, int64_t column) {
    const int64_t width = std::min<int64_t>(COLUMNS, p.columns - column);
    for (int64_t r = 0; r < rows; ++r, totals += COLUMNS) {
        float values[COLUMNS];
        for (int64_t c = 0; c < COLUMNS; ++c) values[c] = totals[c];
        for (int64_t c = 0; p.bias && c < width; ++c) {
            values[c] += p.bias_is_bf16
                             ? from_bf16(static_cast<const uint16_t*>(p.bias)[column + c])
                             : static_cast<const float*>(p.bias)[column + c];
        }
        const int64_t at = (row + r) * p.out_stride + column;
        if (!p.out_is_bf16) {
            std::memcpy(static_cast<float*>(p.out) + at, values, sizeof(float) * width);
            continue;
        }
        uint16_t rounded[COLUMNS];
        for (int64_t c = 0; c < COLUMNS; ++c) rounded[c] = to_bf16(values[c]);
        std::memcpy(static_cast<uint16_t*>(p.out) + at, rounded, sizeof(uint16_t) * width);
    }
}

template <class Isa, class F, size_t... R>
void multiply(const Product& p, std::index_sequence<R...>) {
    static constexpr std::array PRODUCTS = {&Isa::template product<F, static_cast<int>(R + 1)>...};
    const Tiles tiles(p.rows, Isa::MAX_ROWS);
    const int64_t share = p.blocks / (4 * cpu::num_threads());
    const int64_t step = std::clamp<int64_t>(share, 1, BLOCKS_PER_CHUNK);
    cpu::parallel_for((p.blocks + step - 1) / step, [&](int64_t chunk) {
        float totals[Isa::MAX_ROWS * COLUMNS];
        const int64_t last = std::min(p.blocks, (chunk + 1) * step);
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
            const int64_t begin = tiles.begin(tile), rows = tiles.begin(tile + 1) - begin;
            uint8_t* x = p.scratch + begin * p.groups * ROW_BYTES;
            for (int64_t block = chunk * step; block < last; ++block) {
                const uint8_t* weights = p.weights + block * p.groups * p.block_bytes;
                PRODUCTS[rows - 1](weights, x, p.groups, totals);
                write_tile(p, totals, begin, rows, block * COLUMNS);
            }
        }
    });
}

template <class Isa>
void run_with(const Product& p) {
    constexpr std::make_index_sequence<Isa::MAX_ROWS> ROWS;
    quantize<Isa>(p);
    switch (p.block_bytes) {
        case Q4::BYTES: return multiply<Isa, Q4>(p, ROWS);
        case Q4Minimum::BYTES: return multiply<Isa, Q4Minimum>(p, ROWS);
        case Q8::BYTES: return multiply<Isa, Q8>(p, ROWS);
        case Q8Minimum::BYTES: return multiply<Isa, Q8Minimum>(p, ROWS);
    }
}

void run(const Product& p) {
#if defined(__x86_64__)
    if (cpu::isa() == cpu::Isa::avx512) return run_with<Avx512>(p);
    if (cpu::isa() == cpu::Isa::avx2) return run_with<Avx2>(p);
#endif
    run_with<Scalar>(p);
}

bool is_bf16(const Tensor& tensor, const char* name) {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                    " must be float32 or bfloat16");
    return type == ScalarType::BFloat16;
}

void check_packed(const Tensor& weight) {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Byte && weight.dim() == 3 &&
                        weight.is_contiguous(),
                    "weight must be packed: contiguous uint8 [ceil(Out / 16), In / 32, bytes]");
    const int64_t bytes = weight.size(2);
    STD_TORCH_CHECK(bytes == Q4::BYTES || bytes == Q4Minimum::BYTES ||
                        bytes == Q8::BYTES || bytes == Q8Minimum::BYTES,
                    "weight is in no packed format: groups of ", bytes, " bytes");
}

void quantized_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor scratch,
                      Tensor out) {
    check_packed(weight);
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == weight.size(1) * GROUP && x.stride(1) == 1,
                    "x must be [T, ", weight.size(1) * GROUP, "] with rows of adjacent values");
    STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == x.size(0) && out.stride(1) == 1 &&
                        (out.size(1) + COLUMNS - 1) / COLUMNS == weight.size(0),
                    "out must be [T, Out] with rows of adjacent values");
    STD_TORCH_CHECK(scratch.scalar_type() == ScalarType::Byte && scratch.is_contiguous() &&
                        scratch.numel() >= x.size(0) * weight.size(1) * ROW_BYTES,
                    "scratch must be contiguous uint8, at least [T, In / 32, ", ROW_BYTES, "]");
    if (bias) {
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out.size(1) && bias->is_contiguous(),
                        "bias must be contiguous [Out]");
    }
    const Product product{
        .x = x.data_ptr(),
        .x_is_bf16 = is_bf16(x, "x"),
        .x_stride = x.stride(0),
        .weights = static_cast<const uint8_t*>(weight.data_ptr()),
        .block_bytes = weight.size(2),
        .bias = bias ? bias->data_ptr() : nullptr,
        .bias_is_bf16 = bias && is_bf16(*bias, "bias"),
        .scratch = static_cast<uint8_t*>(scratch.data_ptr()),
        .out = out.data_ptr(),
        .out_is_bf16 = is_bf16(out, "out"),
        .out_stride = out.stride(0),
        .rows = x.size(0),
        .columns = out.size(1),
        .groups = weight.size(1),
        .blocks = weight.size(0),
    };
    if (product.rows > 0) cpu::launch<run>(product);
}

template <class F>
void unpack_row(const uint8_t* group, int column, int64_t groups, float* out) {
    for (int64_t g = 0; g < groups; ++g, group += F::BYTES, out += GROUP) {
        const float d = from_fp16(load<uint16_t>(group + F::SCALES + 2 * column));
        float m = 0.0f;
        if constexpr (F::MINIMUM) m = from_fp16(load<uint16_t>(group + F::MINIMA + 2 * column));
        for (int k = 0; k < GROUP; ++k) {
            out[k] = d * static_cast<float>(Scalar::weight<F>(group, column, k) - F::ZERO) + m;
        }
    }
}

struct Lookup {
    const int64_t* ids;
    int64_t count;
    const uint8_t* weights;
    int64_t block_bytes, groups, blocks;
    float* out;
};

void look_up(const Lookup& l) {
    const int64_t end = l.blocks * COLUMNS;
    for (int64_t i = 0; i < l.count; ++i) {
        const int64_t id = l.ids[i];
        STD_TORCH_CHECK(id >= 0 && id < end, "token id ", id, " is not in [0, ", end, ")");
        const uint8_t* block = l.weights + id / COLUMNS * l.groups * l.block_bytes;
        const int column = static_cast<int>(id % COLUMNS);
        float* out = l.out + i * l.groups * GROUP;
        switch (l.block_bytes) {
            case Q4::BYTES: unpack_row<Q4>(block, column, l.groups, out); break;
            case Q4Minimum::BYTES: unpack_row<Q4Minimum>(block, column, l.groups, out); break;
            case Q8::BYTES: unpack_row<Q8>(block, column, l.groups, out); break;
            case Q8Minimum::BYTES: unpack_row<Q8Minimum>(block, column, l.groups, out); break;
        }
    }
}

void quantized_embedding(Tensor token_ids, Tensor weight, Tensor out) {
    check_packed(weight);
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
        .block_bytes = weight.size(2),
        .groups = groups,
        .blocks = weight.size(0),
        .out = static_cast<float*>(out.data_ptr()),
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def(
        "quantized_linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) scratch, "
        "Tensor(b!) out) -> ()");
    m.def("quantized_embedding(Tensor token_ids, Tensor weight, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) {
    m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
    m.impl("quantized_embedding", TORCH_BOX(&quantized_embedding));
}

}  // namespace headrace
