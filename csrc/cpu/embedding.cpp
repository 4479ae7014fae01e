#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "headrace/cpu/tape.h"

#define HEADRACE_KERNELS "headrace/cpu/embedding.h"
#include "headrace/cpu/foreach_isa.h"

namespace headrace::cpu {
namespace {

template <class W>
struct Lookup {
    const int64_t* token_ids;
    const W* weight;
    float* out;
    int64_t tokens, size, vocab_size, weight_stride, out_stride;
};

template <class W>
void look_up(const Lookup<W>& l) {
    for (int64_t i = 0; i < l.tokens; ++i) {
        const int64_t id = l.token_ids[i];
        STD_TORCH_CHECK(id >= 0 && id < l.vocab_size, "token id ", id, " is not in [0, ",
                        l.vocab_size, ")");
        const W* const row = l.weight + id * l.weight_stride;
        HEADRACE_DISPATCH(widen_row, row, l.size, l.out + i * l.out_stride);
    }
}

void embedding(const Tensor& token_ids, const Tensor& weight, const Tensor& out) {
    STD_TORCH_CHECK(weight.dim() == 2, "weight must have 2 dimensions");
    const int64_t tokens = token_ids.numel(), vocab_size = weight.size(0), size = weight.size(1);
    check_vector("token_ids", token_ids, ScalarType::Long, tokens);
    check_matrix("weight", weight, vocab_size, size);
    check_matrix("out", out, tokens, size);
    check_type("out", out, ScalarType::Float);
    with_float_type("weight", weight, [&](auto type) {
        using W = decltype(type);
        launch<look_up<W>>(Lookup<W>{
            .token_ids = data<const int64_t>(token_ids),
            .weight = data<const W>(weight),
            .out = data<float>(out),
            .tokens = tokens,
            .size = size,
            .vocab_size = vocab_size,
            .weight_stride = weight.stride(0),
            .out_stride = out.stride(0),
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def("embedding(Tensor token_ids, Tensor weight, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) { m.impl("embedding", TORCH_BOX(&embedding)); }

}  // namespace headrace::cpu
