// Causal attention of a ragged batch over the paged KV cache: the walk over requests, heads, blocks
// of rows and tiles of tokens. The arithmetic of a tile is in attention_tile.h.
//
// A block is up to 64 rows (query token, head) of one request and one kv head, which read each tile
// of K and V once. Its tokens are cut into splits of 256, counted from position 0, and each split
// into tiles of 64. The tiles of a split follow one another with a running maximum; the partials of
// the splits are merged in ascending order. One thread may walk all splits of a block, or many
// threads some each: the arithmetic is the same, and so is every bit.
//
// q.k is exact products summed in fp32 in ascending order of the channels, of what is stored;
// weights stay fp32 and are multiplied with values widened to fp32. An int8 cache has a scale for
// each token: q.k is multiplied by that of the key, a weight by that of the value.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
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
    TokenScales scales;

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
        plan.blocks = static_cast<int32_t>(round_up(queries * batch.group, batch.block_rows) /
                                           batch.block_rows);
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
    // `plan`: of the request of this item, or of one before.
    Worker(const Batch& batch, const RequestPlan* plans, const RequestPlan* plan, int64_t item)
        : batch_(batch), own_(workspace()) {
        while (plan + 1 < plans + batch.requests && plan[1].first_item <= item) ++plan;
        plan_ = plan;
        request_ = plan - plans;
        item -= plan->first_item;
        item_ = plan->items == 1 ? 0 : item % plan->items;
        unit_ = plan->items == 1 ? item : item / plan->items;
        const int64_t last_first = unit_ / batch.kv_heads;
        head_ = unit_ - last_first * batch.kv_heads;
        // The last block sees most tokens: it comes first.
        block_ = plan->blocks - 1 - last_first;
        pages_ = static_cast<const Cache*>(batch.kv_cache) + head_ * batch.head_stride;
        table_ = batch.block_table + request_ * batch.table_stride;
        locate();
    }

    const RequestPlan* plan() const { return plan_; }

    // `next` is what this thread probably does next, if anything; `fetched`: whether it was `next`
    // for its predecessor.
    void run(const Worker* next, bool fetched) {
        next_ = next != nullptr && next->begin_ < next->end_ ? next : nullptr;
        load_rows();
        if (begin_ < end_) {
            find_tokens(begin_, own_.tokens[0]);
            if (!fetched) {
                ahead(begin_, own_.tokens[0], 0).fetch(0, TILE);
                ahead(begin_, own_.tokens[0], batch_.kv_stride).fetch(0, TILE);
            }
        }
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
        for (int split = begin_ / SPLIT; split * SPLIT < end_; ++split) {
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

    // The rows of the block, the positions that they see together, and those of them in this item.
    void locate() {
        const auto group = static_cast<int32_t>(batch_.group);
        const int32_t token = batch_.query_start_loc[request_];
        const int32_t queries = batch_.query_start_loc[request_ + 1] - token;
        const auto first_row = static_cast<int32_t>(block_ * batch_.block_rows);
        rows_ = std::min(static_cast<int32_t>(batch_.block_rows), queries * group - first_row);
        const int32_t first_query = block_ == 0 ? 0 : first_row / group;
        token_ = token + first_query;
        group_head_ = first_row - first_query * group;
        position_ = batch_.seq_lens[request_] - queries + first_query;
        first_ = batch_.window ? std::max(position_ + 1 - batch_.window, 0) : 0;
        last_ = position_ + (queries == 1 ? 0 : (group_head_ + rows_ - 1) / group) + 1;
        const int split = plan_->first_split + static_cast<int>(item_) * plan_->splits_per_item;
        begin_ = std::max(split * SPLIT, first_ / TILE * TILE);
        end_ = std::min((split + plan_->splits_per_item) * SPLIT, last_);
    }

    void load_rows() {
        const int64_t group = batch_.group;
        int32_t position = position_;
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

    // Calls f(page, offset, first, last) where the tokens [first, last) of a tile that some row sees
    // have their keys in one page, from the row `offset` of it.
    template <class F>
    void for_each_page(int tile, F&& f) const {
        const Span span = seen(tile);
        const auto page_size = static_cast<int>(batch_.page_size);
        int page = (tile + span.first) / page_size;
        int offset = (tile + span.first) % page_size;
        for (int j = span.first; j < span.last; ++page, offset = 0) {
            const int end = std::min(span.last, j + page_size - offset);
            f(pages_ + int64_t{table_[page]} * batch_.block_stride, offset, j, end);
            j = end;
        }
    }

    // The scale of a row of an int8 page.
    const Cache* scale_of(const Cache* page, int offset) const {
        return page + batch_.page_size * batch_.dim + offset * static_cast<int>(sizeof(float));
    }

    // Where the keys of a tile's tokens are; for those that nobody sees, somewhere.
    void find_tokens(int tile, const void** tokens) const {
        const Span span = seen(tile);
        for_each_page(tile, [&](const Cache* page, int offset, int first, int last) {
            const Cache* key = page + offset * batch_.dim;
            for (int j = first; j < last; ++j, key += batch_.dim) tokens[j] = key;
            if constexpr (std::is_same_v<Cache, int8_t>) {
                const Cache* const scales = scale_of(page, offset);
                __builtin_prefetch(scales);
                __builtin_prefetch(scales + batch_.kv_stride);
            }
        });
        std::fill(tokens, tokens + span.first, tokens[span.first]);
        std::fill(tokens + span.last, tokens + TILE, tokens[span.first]);
    }

    // Keys of a tile at 0, values at kv_stride.
    Ahead ahead(int tile, const void* const* tokens, int64_t offset) const {
        const Span span = seen(tile);
        constexpr int64_t SIZE = sizeof(Cache);
        return {tokens, offset * SIZE, batch_.dim * SIZE, span.first, span.last};
    }

    // Those of an int8 cache.
    const TokenScales* load_scales(int tile) {
        if constexpr (std::is_same_v<Cache, int8_t>) {
            for_each_page(tile, [&](const Cache* page, int offset, int first, int last) {
                const Cache* const scales = scale_of(page, offset);
                const size_t bytes = static_cast<size_t>(last - first) * sizeof(float);
                std::memcpy(own_.scales.keys + first, scales, bytes);
                std::memcpy(own_.scales.values + first, scales + batch_.kv_stride, bytes);
            });
            return &own_.scales;
        }
        return nullptr;
    }

    void attend(int split, const Partial& partial) {
        clear(partial);
        const int begin = std::max(split * SPLIT, begin_);
        const int end = std::min((split + 1) * SPLIT, end_);
        for (int tile = begin; tile < end; tile += TILE) {
            const int side = tile / TILE % 2 ^ begin_ / TILE % 2;
            const void** const next = own_.tokens[side ^ 1];
            Ahead keys, values;
            const Worker* const owner = tile + TILE < end_ ? this : next_;
            if (owner != nullptr) {
                const int next_tile = owner == this ? tile + TILE : owner->begin_;
                owner->find_tokens(next_tile, next);
                keys = owner->ahead(next_tile, next, 0);
                values = owner->ahead(next_tile, next, batch_.kv_stride);
            }
            attend_tile(tile, own_.tokens[side], partial, keys, values);
        }
    }

    // `next_keys` and `next_values` are fetched meanwhile.
    void attend_tile(int tile, const void* const* tokens, const Partial& partial,
                     const Ahead& next_keys, const Ahead& next_values) {
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
        // Three vectors take longer than four, whose sums hide more of their latency.
        const int columns = span.last > 2 * LANES ? TILE : span.last;

        Tiles::load_keys(keys, span.first, span.last, dim, own_.keys);
        Tiles::score(own_.queries + begin * Tiles::query_size(dim), rows, columns, dim, own_.keys,
                     own_.scores, next_keys);
        Tiles::soften(own_.scores, rows, span.last, tile, first + begin, last + begin, batch_.scale,
                      batch_.soft_cap, load_scales(tile), of_rows, own_.factor);
        Tiles::weigh(own_.scores, rows, keys, batch_.kv_stride, span.first, span.last, dim,
                     own_.factor, own_.values, of_rows.values, next_values);
        next_values.fetch(0, span.first);
        next_values.fetch(span.last, TILE);
    }

    void finish(const Partial& total) const {
        const int64_t group = batch_.group;
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
    const Worker* next_ = nullptr;
    int rows_ = 0;
    int32_t token_ = 0, group_head_ = 0, position_ = 0;  // of the first row
    int first_ = 0, last_ = 0;                           // what the rows see together
    int begin_ = 0, end_ = 0;  // what this item does of it, from the border of a tile
};

// A thread claims a few neighbouring items at a time, and fetches the beginning of the next while
// it finishes one: where contexts are short, most of the waiting is there. Behind the last it
// guesses that the other threads claim as much as it did.
template <class Tiles>
void attend_all(const Batch& batch) {
    constexpr int64_t CHUNKS_PER_THREAD = 16;
    auto* plans = reinterpret_cast<RequestPlan*>(batch.scratch);
    const int64_t items = plan_items(batch, plans);
    const int64_t threads = num_threads();
    const int64_t run = std::max<int64_t>(1, items / (threads * CHUNKS_PER_THREAD));
    parallel_for((items + run - 1) / run, [&](int64_t chunk) {
        const int64_t begin = chunk * run, end = std::min(begin + run, items);
        std::optional<Worker<Tiles>> workers[2];
        auto *now = &workers[0], *next = &workers[1];
        const RequestPlan* const plan =
            std::upper_bound(plans, plans + batch.requests, begin,
                             [](int64_t i, const RequestPlan& p) { return i < p.first_item; });
        now->emplace(batch, plans, plan - 1, begin);
        for (int64_t item = begin; item < end; ++item, std::swap(now, next)) {
            const int64_t next_item = item + 1 < end ? item + 1 : begin + threads * run;
            if (next_item < items) {
                next->emplace(batch, plans, (*now)->plan(), next_item);
            } else {
                next->reset();
            }
            (*now)->run(next->has_value() ? &**next : nullptr, item > begin);
        }
    });
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
