// Causal attention of a ragged batch over the paged KV cache: the walk over requests, heads, blocks
// of rows and tiles of tokens. The arithmetic of a tile is in attention_tile.h.
//
// A block is up to 64 rows (query token, head) of one request and one kv head, which read each tile
// of K and V once. Its tokens are cut into splits of 256, counted from position 0, and each split
// into tiles of 64. The tiles of a split follow one another with a running maximum; the partials of
// the splits are merged in ascending order. One thread may walk all splits of a block, or many
// threads some each: the arithmetic is the same, and so is every bit.
//
// q.k is exact products summed in fp32 in ascending order of the channels, from bf16 or fp32;
// weights stay fp32 and are multiplied with values widened to fp32.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <type_traits>

#include "headrace/cpu/attention_types.h"
#include "headrace/cpu/attention_vec.h"
#include "headrace/cpu/pool.h"

#define HEADRACE_KERNELS "headrace/cpu/attention_tile.h"
#include "headrace/cpu/foreach_isa.h"
#undef HEADRACE_KERNELS
#include "headrace/cpu/attention_pairs.h"

namespace headrace::cpu::attention {

// How the blocks of a request are cut into items of work.
struct alignas(64) RequestPlan {
    int64_t first_item;
    int32_t blocks;
    int32_t items;  // of each (block, kv head)
    int32_t splits_per_item;
    int32_t first_split, last_split;
    // Where several items share a block: a counter for each (block, kv head), then partials.
    std::atomic<int32_t>* finished_items;
    float* partials;
};

// What one thread works on.
struct Workspace {
    alignas(64) float keys[TILE * MAX_DIM];
    alignas(64) float values[TILE * MAX_DIM];
    alignas(64) float queries[MAX_ROW_ELEMENTS];
    alignas(64) float scores[MAX_ROWS * TILE];
    alignas(64) float split_values[MAX_ROW_ELEMENTS];
    alignas(64) float total_values[MAX_ROW_ELEMENTS];
    float split_max[MAX_ROWS], split_sum[MAX_ROWS];
    float total_max[MAX_ROWS], total_sum[MAX_ROWS];
    float factor[MAX_ROWS];
    // The positions that a row sees are [first[r], last[r]).
    int32_t first[MAX_ROWS], last[MAX_ROWS];
    const void* tokens[2][TILE];

    Partial split() { return {split_values, split_max, split_sum}; }
    Partial total() { return {total_values, total_max, total_sum}; }
};

inline Workspace& workspace() {
    thread_local const std::unique_ptr<Workspace> own = std::make_unique<Workspace>();
    return *own;
}

inline int64_t round_up(int64_t x, int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

// Floats of a partial of `rows` rows.
inline int64_t partial_size(int64_t rows, int64_t dim) { return round_up(rows * (dim + 2), 16); }

// Cuts the batch into items, about eight for each thread if the splits allow that and the scratch
// memory holds the partials. Returns their number.
inline int64_t plan_items(const Batch& batch, RequestPlan* plans) {
    constexpr int64_t ITEMS_PER_THREAD = 8;
    int64_t splits = 0;
    for (int64_t request = 0; request < batch.requests; ++request) {
        RequestPlan& plan = plans[request];
        const int32_t queries = batch.query_start_loc[request + 1] - batch.query_start_loc[request];
        // The length of a request without rows may be anything.
        const int32_t length = queries == 0 ? 0 : batch.seq_lens[request];
        const int32_t hidden = batch.window ? std::max(length - queries + 1 - batch.window, 0) : 0;
        plan.blocks = static_cast<int32_t>(round_up(queries * batch.group(), batch.block_rows()) /
                                           batch.block_rows());
        plan.first_split = hidden / SPLIT;
        plan.last_split = (length + SPLIT - 1) / SPLIT;
        splits += plan.blocks * batch.kv_heads * (plan.last_split - plan.first_split);
    }
    const int64_t threads = num_threads();
    const int64_t most = std::max<int64_t>(1, splits / (threads * ITEMS_PER_THREAD));

    std::byte* free = reinterpret_cast<std::byte*>(plans + batch.requests);
    const std::byte* const end = batch.scratch + batch.scratch_bytes;
    int64_t items = 0;
    for (int64_t request = 0; request < batch.requests; ++request) {
        RequestPlan& plan = plans[request];
        const int64_t own_splits = plan.last_split - plan.first_split;
        const int64_t units = plan.blocks * batch.kv_heads;
        const int64_t counters = round_up(units * sizeof(std::atomic<int32_t>), 64);
        const int64_t partials = units * own_splits *
                                 partial_size(batch.block_rows_of(request), batch.dim) *
                                 static_cast<int64_t>(sizeof(float));
        plan.first_item = items;
        plan.items = 1;
        plan.splits_per_item = static_cast<int32_t>(own_splits);
        if (threads > 1 && own_splits > most && counters + partials <= end - free) {
            plan.splits_per_item = static_cast<int32_t>(most);
            plan.items = static_cast<int32_t>((own_splits + most - 1) / most);
            plan.finished_items = new (free) std::atomic<int32_t>[static_cast<size_t>(units)] {};
            plan.partials = reinterpret_cast<float*>(free + counters);
            free += counters + partials;
        }
        items += units * plan.items;
    }
    return items;
}

template <class Tiles>
class Worker {
  public:
    Worker(const Batch& batch, const RequestPlan* plans, int64_t item)
        : batch_(batch), own_(workspace()) {
        const RequestPlan* plan =
            std::upper_bound(plans, plans + batch.requests, item,
                             [](int64_t i, const RequestPlan& p) { return i < p.first_item; });
        plan_ = --plan;
        request_ = plan - plans;
        item -= plan->first_item;
        item_ = item % plan->items;
        unit_ = item / plan->items;
        head_ = unit_ % batch.kv_heads;
        // The last block sees most tokens: it comes first.
        block_ = plan->blocks - 1 - unit_ / batch.kv_heads;
        pages_ = static_cast<const Cache*>(batch.kv_cache) + head_ * batch.head_stride;
        table_ = batch.block_table + request_ * batch.table_stride;
    }

    void run() {
        load_rows();
        const int first_split = first_ / SPLIT;
        const int last_split = (last_ + SPLIT - 1) / SPLIT;
        if (plan_->items == 1) {
            if (last_split - first_split == 1) {
                attend(first_split, own_.split());
                return finish(own_.split());
            }
            clear(own_.total());
            for (int split = first_split; split < last_split; ++split) {
                attend(split, own_.split());
                Tiles::merge(own_.split(), rows_, batch_.dim, own_.total());
            }
            return finish(own_.total());
        }
        const int begin = plan_->first_split + static_cast<int>(item_) * plan_->splits_per_item;
        const int end = std::min(begin + plan_->splits_per_item, last_split);
        for (int split = std::max(begin, first_split); split < end; ++split) {
            attend(split, partial(split));
        }
        std::atomic<int32_t>& finished = plan_->finished_items[unit_];
        if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 < plan_->items) return;
        clear(own_.total());
        for (int split = first_split; split < last_split; ++split) {
            Tiles::merge(partial(split), rows_, batch_.dim, own_.total());
        }
        finish(own_.total());
    }

  private:
    using Query = typename Tiles::Query;
    using Cache = typename Tiles::Cache;

    // The rows of the block, and the positions that any of them sees.
    void load_rows() {
        const int64_t group = batch_.group();
        const int32_t begin = batch_.query_start_loc[request_];
        const int32_t queries = batch_.query_start_loc[request_ + 1] - begin;
        const int64_t first_row = block_ * batch_.block_rows();
        rows_ = static_cast<int>(std::min(batch_.block_rows(), queries * group - first_row));
        token_ = begin + first_row / group;
        group_head_ = first_row % group;
        int32_t position =
            static_cast<int32_t>(batch_.seq_lens[request_] - queries + first_row / group);
        int64_t token = token_, head = group_head_;
        for (int r = 0; r < rows_; ++r) {
            const auto* q = static_cast<const Query*>(batch_.q) + token * batch_.q_stride +
                            (head_ * group + head) * batch_.dim;
            Tiles::load_query(q, batch_.dim, own_.queries + r * Tiles::query_size(batch_.dim));
            own_.last[r] = position + 1;
            own_.first[r] = batch_.window ? std::max(position + 1 - batch_.window, 0) : 0;
            if (++head == group) {
                head = 0;
                ++token;
                ++position;
            }
        }
        first_ = own_.first[0];
        last_ = own_.last[rows_ - 1];
    }

    void clear(const Partial& partial) const {
        std::fill_n(partial.values, rows_ * batch_.dim, 0.0F);
        std::fill_n(partial.max, rows_, LOWEST);
        std::fill_n(partial.sum, rows_, 0.0F);
    }

    Partial partial(int split) const {
        const int64_t rows = batch_.block_rows_of(request_);
        const int64_t splits = plan_->last_split - plan_->first_split;
        const int64_t index = unit_ * splits + split - plan_->first_split;
        float* values = plan_->partials + index * partial_size(rows, batch_.dim);
        float* max = values + rows * batch_.dim;
        return {values, max, max + rows};
    }

    // The tokens [first, last) of a tile that some row sees.
    struct Span {
        int first, last;
    };
    Span seen(int tile) const { return {std::max(first_ - tile, 0), std::min(last_ - tile, TILE)}; }

    // Where the keys of a tile's tokens are; for those that nobody sees, somewhere.
    void find_tokens(int tile, const void** tokens) const {
        const Span span = seen(tile);
        int j = span.first;
        while (j < span.last) {
            const int64_t page = (tile + j) / batch_.page_size;
            const int64_t offset = (tile + j) % batch_.page_size;
            const Cache* key =
                pages_ + int64_t{table_[page]} * batch_.block_stride + offset * batch_.dim;
            const int end =
                static_cast<int>(std::min<int64_t>(span.last, j + batch_.page_size - offset));
            for (; j < end; ++j, key += batch_.dim) tokens[j] = key;
        }
        std::fill(tokens, tokens + span.first, tokens[span.first]);
        std::fill(tokens + span.last, tokens + TILE, tokens[span.first]);
    }

    void prefetch(const void* const* tokens, const Span& span, int64_t offset) const {
        const int64_t bytes = batch_.dim * static_cast<int64_t>(sizeof(Cache));
        for (int j = span.first; j < span.last; ++j) {
            const char* from =
                static_cast<const char*>(tokens[j]) + offset * static_cast<int64_t>(sizeof(Cache));
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
        }
    }

    void attend(int split, const Partial& partial) {
        clear(partial);
        const int begin = std::max(split * SPLIT, first_ / TILE * TILE);
        const int end = std::min((split + 1) * SPLIT, last_);
        find_tokens(begin, own_.tokens[0]);
        int side = 0;
        for (int tile = begin; tile < end; tile += TILE, side ^= 1) {
            const void* const* next = nullptr;
            if (tile + TILE < end) {
                find_tokens(tile + TILE, own_.tokens[side ^ 1]);
                next = own_.tokens[side ^ 1];
            }
            attend_tile(tile, own_.tokens[side], next, partial);
        }
    }

    void attend_tile(int tile, const void* const* tokens, const void* const* next,
                     const Partial& partial) {
        const auto* keys = reinterpret_cast<const Cache* const*>(tokens);
        const Span span = seen(tile);
        const int64_t dim = batch_.dim;
        // Rows ascend in position: those that see the tile are neighbours.
        const int32_t* const last = own_.last;
        const int32_t* const first = own_.first;
        const int begin = static_cast<int>(std::upper_bound(last, last + rows_, tile) - last);
        const int end =
            static_cast<int>(std::lower_bound(first, first + rows_, tile + TILE) - first);
        const int rows = end - begin;
        const Partial of_rows = {partial.values + begin * dim, partial.max + begin,
                                 partial.sum + begin};

        prefetch(tokens, span, batch_.kv_stride);
        Tiles::load_keys(keys, span.first, span.last, dim, own_.keys);
        Tiles::score(own_.queries + begin * Tiles::query_size(dim), rows, dim, own_.keys,
                     own_.scores);
        Tiles::soften(own_.scores, rows, tile, first + begin, last + begin, batch_.scale,
                      batch_.soft_cap, of_rows, own_.factor);
        if (next) prefetch(next, seen(tile + TILE), 0);
        Tiles::weigh(own_.scores, rows, keys, batch_.kv_stride, span.first, span.last, dim,
                     own_.factor, own_.values, of_rows.values);
    }

    void finish(const Partial& total) const {
        const int64_t group = batch_.group();
        int64_t token = token_, head = group_head_;
        for (int r = 0; r < rows_; ++r) {
            auto* to = static_cast<Query*>(batch_.out) + token * batch_.out_stride +
                       (head_ * group + head) * batch_.dim;
            Tiles::finish(total.values + r * batch_.dim, total.sum[r], batch_.dim, to);
            if (++head == group) {
                head = 0;
                ++token;
            }
        }
    }

    const Batch& batch_;
    Workspace& own_;
    const RequestPlan* plan_;
    int64_t request_, item_, unit_, head_, block_;
    const Cache* pages_;
    const int32_t* table_;
    int rows_ = 0;
    int64_t token_ = 0, group_head_ = 0;  // of the first row
    int first_ = 0, last_ = 0;            // what the rows see together
};

template <class Tiles>
void attend_all(const Batch& batch) {
    auto* plans = reinterpret_cast<RequestPlan*>(batch.scratch);
    const int64_t items = plan_items(batch, plans);
    parallel_for(items, [&](int64_t item) { Worker<Tiles>(batch, plans, item).run(); });
}

template <class Q, class KV>
void attend_on_this_cpu(const Batch& batch) {
    switch (isa()) {
#if defined(__x86_64__)
        case Isa::avx512:
            return attend_all<avx512::tiles::Tiles<Q, KV>>(batch);
        case Isa::avx2:
            return attend_all<avx2::tiles::Tiles<Q, KV>>(batch);
#endif
        default:
            return attend_all<scalar::tiles::Tiles<Q, KV>>(batch);
    }
}

}  // namespace headrace::cpu::attention
