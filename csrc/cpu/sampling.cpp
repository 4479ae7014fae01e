// headrace::sample_tokens and headrace::token_logprobs for CPUs: their schemas and their checks.
#include "headrace/cpu/sampling.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace headrace::cpu {
namespace {

using sampling::Batch;
using sampling::Chunk;
using sampling::Row;

// Lays out the state of the rows in `scratch`, and sets what a row is without sampling columns.
Batch lay_out(const Tensor& logits, const Tensor& scratch) {
    STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits must be [rows, vocabulary]");
    const int64_t rows = logits.size(0), vocab_size = logits.size(1);
    check_matrix("logits", logits, rows, vocab_size);
    check_type("logits", logits, ScalarType::Float);
    STD_TORCH_CHECK(vocab_size <= sampling::MAX_VOCABULARY, "a vocabulary of ", vocab_size,
                    " is larger than ", sampling::MAX_VOCABULARY);
    Batch batch = {.num_rows = rows, .vocab_size = vocab_size};
    const int64_t row_bytes = sampling::ROW_BYTES + batch.chunks_per_row() * sampling::CHUNK_BYTES;
    check_vector("scratch", scratch, ScalarType::Byte, scratch.numel());
    STD_TORCH_CHECK(scratch.numel() >= rows * row_bytes, "scratch has ", scratch.numel(),
                    " bytes, too few for ", rows, " rows of ", row_bytes);
    auto* const start = static_cast<std::byte*>(scratch.mutable_data_ptr());
    STD_TORCH_CHECK(rows == 0 || reinterpret_cast<uintptr_t>(start) % alignof(Row) == 0,
                    "scratch must begin at a multiple of ", alignof(Row));
    batch.rows = reinterpret_cast<Row*>(start);
    batch.chunks = reinterpret_cast<Chunk*>(start + rows * sampling::ROW_BYTES);
    for (int64_t i = 0; i < rows; ++i) {
        Row* const row = new (batch.rows + i) Row{};
        row->logits = data<const float>(logits) + i * logits.stride(0);
        row->size = vocab_size;
        for (int64_t j = 0; j < batch.chunks_per_row(); ++j) new (batch.chunks_of(i) + j) Chunk;
    }
    return batch;
}

void sample_tokens(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                   const Tensor& top_p, const Tensor& min_p, const Tensor& seeds,
                   const Tensor& positions, const Tensor& scratch, const Tensor& out) {
    const Batch batch = lay_out(logits, scratch);
    check_vector("temperature", temperature, ScalarType::Float, batch.num_rows);
    check_vector("top_k", top_k, ScalarType::Int, batch.num_rows);
    check_vector("top_p", top_p, ScalarType::Float, batch.num_rows);
    check_vector("min_p", min_p, ScalarType::Float, batch.num_rows);
    check_vector("seeds", seeds, ScalarType::Long, batch.num_rows);
    check_vector("positions", positions, ScalarType::Long, batch.num_rows);
    check_vector("out", out, ScalarType::Long, batch.num_rows);
    for (int64_t i = 0; i < batch.num_rows; ++i) {
        Row& row = batch.rows[i];
        row.temperature = data<const float>(temperature)[i];
        row.random = row.temperature > 0;
        row.top_k = data<const int32_t>(top_k)[i];
        row.top_p = data<const float>(top_p)[i];
        row.limited = row.random && row.top_k > 0 && row.top_k < batch.vocab_size;
        row.ordered = row.limited || (row.random && row.top_p < 1);
        row.cut = static_cast<float>(std::log(double{data<const float>(min_p)[i]}));
        row.cut_id = INT32_MAX;
        const auto seed = static_cast<uint64_t>(data<const int64_t>(seeds)[i]);
        const auto position = static_cast<uint64_t>(data<const int64_t>(positions)[i]);
        for (int word = 0; word < 2; ++word) {
            row.noise.seed[word] = static_cast<uint32_t>(seed >> 32 * word);
            row.noise.position[word] = static_cast<uint32_t>(position >> 32 * word);
        }
    }
    sampling::sample(batch, data<int64_t>(out));
}

void token_logprobs(const Tensor& logits, const Tensor& token_ids, const Tensor& scratch,
                    const Tensor& logprobs, const Tensor& top_ids, const Tensor& top_logprobs) {
    const Batch batch = lay_out(logits, scratch);
    check_vector("token_ids", token_ids, ScalarType::Long, batch.num_rows);
    check_vector("logprobs", logprobs, ScalarType::Float, batch.num_rows);
    STD_TORCH_CHECK(top_ids.dim() == 2 && top_ids.size(1) <= batch.vocab_size,
                    "top_ids must have as many columns as there are tokens, or fewer");
    const int64_t k = top_ids.size(1);
    check_matrix("top_ids", top_ids, batch.num_rows, k);
    check_type("top_ids", top_ids, ScalarType::Long);
    check_matrix("top_logprobs", top_logprobs, batch.num_rows, k);
    check_type("top_logprobs", top_logprobs, ScalarType::Float);
    STD_TORCH_CHECK(top_ids.is_contiguous() && top_logprobs.is_contiguous(),
                    "top_ids and top_logprobs must be contiguous");
    const auto* const tokens = data<const int64_t>(token_ids);
    for (int64_t i = 0; i < batch.num_rows; ++i) {
        STD_TORCH_CHECK(tokens[i] >= 0 && tokens[i] < batch.vocab_size, "token id ", tokens[i],
                        " of row ", i, " is not in the vocabulary of ", batch.vocab_size);
    }
    sampling::log_probabilities(batch, {.tokens = tokens,
                                        .of_token = data<float>(logprobs),
                                        .k = k,
                                        .top_tokens = data<int64_t>(top_ids),
                                        .top = data<float>(top_logprobs)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def(
        "sample_tokens(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor "
        "min_p, Tensor seeds, Tensor positions, Tensor(a!) scratch, Tensor(b!) out) -> ()");
    m.def(
        "token_logprobs(Tensor logits, Tensor token_ids, Tensor(a!) scratch, Tensor(b!) logprobs, "
        "Tensor(c!) top_ids, Tensor(d!) top_logprobs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CPU, m) {
    m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
    m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
}

}  // namespace headrace::cpu
