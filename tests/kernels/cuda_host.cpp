// The CUDA kernels as a library for the host, run by simt_host.h: what tests/kernels/test_cuda_*.py
// call through ctypes. Pointers are those of CPU tensors.
#include <cstdint>

#include "headrace/cuda/attention.cuh"
#include "headrace/cuda/kv_copy.cuh"
#include "headrace/cuda/quantization.cuh"
#include "headrace/cuda/quantized_linear.cuh"

using namespace headrace::cuda;

namespace {

// 0 to 2: the orders; 3 to 5: with early copies; 6 and 7: warps far ahead of each other.
host::Schedule schedule_of(int number) {
    if (number >= 6) return {static_cast<host::Schedule::Order>(number - 6), number == 7, true};
    return {static_cast<host::Schedule::Order>(number % 3), number >= 3};
}

// Codes of dtypes: 0 float32, 1 bf16, 2 fp16, 3 int8, 4 e4m3.
template <class F>
void with_float(int code, F&& f) {
    if (code == 0) f(float{});
    if (code == 1) f(bf16{});
    if (code == 2) f(fp16{});
}
template <class F>
void with_eight_bits(int code, F&& f) {
    if (code == 3) f(int8_t{});
    if (code == 4) f(e4m3{});
}

template <class T>
void round_trip(const float* x, int64_t count, uint8_t* bits, float* back) {
    for (int64_t i = 0; i < count; ++i) {
        const T value = from_float<T>(x[i]);
        std::memcpy(bits + i * sizeof(T), &value, sizeof(T));
        back[i] = to_float(value);
    }
}

}  // namespace

extern "C" {

void convert(int code, const float* x, int64_t count, uint8_t* bits, float* back) {
    with_float(code, [&](auto type) { round_trip<decltype(type)>(x, count, bits, back); });
    with_eight_bits(code, [&](auto type) { round_trip<decltype(type)>(x, count, bits, back); });
}

// The two values of bytes 0 and 2, and of bytes 1 and 3, of each word.
void widen(int to, int from, const uint32_t* words, int64_t count, uint32_t* even, uint32_t* odd) {
    with_float(to, [&](auto wide) {
        with_eight_bits(from, [&](auto narrow) {
            using T = decltype(wide);
            using C = decltype(narrow);
            if constexpr (sizeof(T) == 2) {
                for (int64_t i = 0; i < count; ++i) {
                    even[i] = widen_even<T, C>(words[i]);
                    odd[i] = widen_odd<T, C>(words[i]);
                }
            }
        });
    });
}

void copy_blocks(const void* src, void* dst, const int64_t* pairs, int64_t count,
                 const int64_t* layout, int schedule) {
    const BlockCopy c = {static_cast<const Vector16*>(src),
                         static_cast<Vector16*>(dst),
                         pairs,
                         layout[0],
                         layout[1],
                         layout[2],
                         layout[3],
                         layout[4]};
    const int64_t chunks = (c.size + COPY_CHUNK - 1) / COPY_CHUNK;
    host::launch(
        {static_cast<unsigned>(count), static_cast<unsigned>(chunks), 1}, COPY_THREADS, 0,
        [&] { headrace::cuda::copy_blocks(c); }, schedule_of(schedule));
}

void quantize(int x_code, int out_code, const void* x, void* out, float* scale, int64_t rows,
              int groups, int group_size, int schedule) {
    const int64_t row = int64_t{groups} * group_size;
    with_float(x_code, [&](auto in) {
        with_eight_bits(out_code, [&](auto result) {
            using X = decltype(in);
            using Out = decltype(result);
            const Quantize<X, Out> q = {static_cast<const X*>(x),
                                        static_cast<Out*>(out),
                                        scale,
                                        row,
                                        row,
                                        rows,
                                        groups,
                                        group_size};
            with_quantize_team(group_size, [&](auto team) {
                constexpr int TEAM = decltype(team)::value, TEAMS = QUANTIZE_THREADS / TEAM;
                const int64_t blocks = (rows * groups + TEAMS - 1) / TEAMS;
                host::launch(
                    {static_cast<unsigned>(blocks), 1, 1}, QUANTIZE_THREADS, 64,
                    [&] { quantize_groups<TEAM, X, Out>(q); }, schedule_of(schedule));
            });
        });
    });
}

int shared_memory_of_attention(int head_dim, int cache_code, int group) {
    if (head_dim == 64) {
        return cache_code == 1 ? DecodeMemory<64, bf16>::bytes(group)
                               : DecodeMemory<64, int8_t>::bytes(group);
    }
    return cache_code == 1 ? DecodeMemory<128, bf16>::bytes(group)
                           : DecodeMemory<128, int8_t>::bytes(group);
}

struct LinearArguments {
    const void* x;
    const uint8_t* weight;
    const void* bias;
    void* out;
    float* partials;
    int64_t tokens;
    // tiles: 1 or 2 of few tokens, or 4.
    int groups, outputs, code, tiles, splits, bias_is_bf16, out_is_bf16;
};
}

namespace {

template <class F>
void multiply(const LinearArguments& a, int schedule) {
    const Linear p = {static_cast<const bf16*>(a.x),
                      a.weight,
                      static_cast<const float*>(a.bias),
                      a.out,
                      int64_t{a.groups} * GROUP,
                      a.outputs,
                      a.tokens,
                      a.groups,
                      a.outputs,
                      a.bias_is_bf16 != 0,
                      a.out_is_bf16 != 0,
                      a.splits > 1 ? a.partials : nullptr};
    const int outputs = a.tiles < WIDE_TILES ? OUTPUTS : OUTPUTS * LINEAR_WARPS;
    const int tokens = a.tiles * TILE_TOKENS;
    const auto launch = [&](const std::function<void()>& kernel) {
        host::launch({static_cast<unsigned>((a.outputs + outputs - 1) / outputs),
                      static_cast<unsigned>((a.tokens + tokens - 1) / tokens),
                      static_cast<unsigned>(a.splits)},
                     LINEAR_THREADS, LINEAR_MEMORY<F>, kernel, schedule_of(schedule));
    };
    if (a.tiles == 1) launch([&] { packed_linear<F, 1>(p); });
    if (a.tiles == 2) launch([&] { packed_linear<F, 2>(p); });
    if (a.tiles == 4) launch([&] { packed_linear_wide<F>(p); });
    if (a.splits == 1) return;
    const int64_t size = a.tokens * a.outputs;
    host::launch(
        {static_cast<unsigned>((size + LINEAR_THREADS - 1) / LINEAR_THREADS), 1, 1}, LINEAR_THREADS,
        0, [&] { add_lanes(p); }, schedule_of(schedule));
}

}  // namespace

extern "C" {

// The bytes of shared memory that the kernel takes, or 0 if there is none.
int linear(const LinearArguments* a, int schedule) {
    int bytes = 0;
    with_packed_format(a->code, [&](auto format) {
        const int64_t blocks = (a->outputs + COLUMNS - 1) / COLUMNS;
        host::machine.readable_begin = a->weight;
        host::machine.readable_end = a->weight + blocks * a->groups * decltype(format)::BYTES;
        multiply<decltype(format)>(*a, schedule);
        host::machine.readable_begin = host::machine.readable_end = nullptr;
        bytes = LINEAR_MEMORY<decltype(format)>;
    });
    return bytes;
}

struct AttentionArguments {
    const void* q;
    void* out;
    const void* cache;
    const int* query_start;
    const int* seq_lens;
    const int* block_table;
    int* counts;
    void* items;
    void* folds;
    float* partials;
    void* sums;
    int64_t q_stride, out_stride, block_stride, kv_stride, head_stride, table_stride;
    int requests, rows, kv_heads, group, page_size, window, capacity, blocks;
    float scale, soft_cap;
};

void plan(const AttentionArguments* a, int schedule) {
    const Plan p = {a->query_start,
                    a->seq_lens,
                    a->requests,
                    a->window,
                    a->capacity,
                    a->counts,
                    static_cast<Item*>(a->items),
                    static_cast<Fold*>(a->folds)};
    host::launch({}, PLAN_THREADS, 64, [&] { plan_decode(p); }, schedule_of(schedule));
}
}

namespace {

template <int D, class T, class C>
void attend(const AttentionArguments& a, int schedule) {
    const Decode<T> p = {
        .q = static_cast<const T*>(a.q),
        .out = static_cast<T*>(a.out),
        .cache = static_cast<const uint8_t*>(a.cache),
        .block_table = a.block_table,
        .counts = a.counts,
        .items = static_cast<const Item*>(a.items),
        .partials = a.partials,
        .sums = static_cast<Sum*>(a.sums),
        .q_stride = a.q_stride,
        .out_stride = a.out_stride,
        .block_stride = a.block_stride,
        .kv_stride = a.kv_stride,
        .head_stride = a.head_stride,
        .table_stride = a.table_stride,
        .kv_heads = a.kv_heads,
        .group = a.group,
        .page_size = a.page_size,
        .scale = a.scale,
        .soft_cap = a.soft_cap,
    };
    const auto launch = [&](const std::function<void()>& kernel) {
        host::launch({static_cast<unsigned>(a.blocks), 1, 1}, ATTENTION_THREADS,
                     DecodeMemory<D, C>::bytes(a.group), kernel, schedule_of(schedule));
    };
    if (a.group > 8)
        launch([&] { decode_attention<D, true, T, C>(p); });
    else
        launch([&] { decode_attention<D, false, T, C>(p); });
    const int heads = a.kv_heads * a.group;
    const Combine<T> c = {
        .counts = a.counts,
        .folds = static_cast<const Fold*>(a.folds),
        .query_start = a.query_start,
        .partials = a.partials,
        .sums = static_cast<const Sum*>(a.sums),
        .out = static_cast<T*>(a.out),
        .out_stride = a.out_stride,
        .requests = a.requests,
        .heads = heads,
        .rows = a.rows,
    };
    host::launch(
        {static_cast<unsigned>(a.blocks), static_cast<unsigned>((heads + WARPS - 1) / WARPS), 1},
        ATTENTION_THREADS, 0, [&] { combine_chunks<D, T>(c); }, schedule_of(schedule));
}

}  // namespace

extern "C" void attention(int head_dim, int q_code, int cache_code, const AttentionArguments* a,
                          int schedule) {
    const int code = head_dim * 100 + q_code * 10 + cache_code;
    if (code == 6411) attend<64, bf16, bf16>(*a, schedule);
    if (code == 6422) attend<64, fp16, fp16>(*a, schedule);
    if (code == 6413) attend<64, bf16, int8_t>(*a, schedule);
    if (code == 6424) attend<64, fp16, e4m3>(*a, schedule);
    if (code == 12811) attend<128, bf16, bf16>(*a, schedule);
    if (code == 12823) attend<128, fp16, int8_t>(*a, schedule);
    if (code == 12814) attend<128, bf16, e4m3>(*a, schedule);
}
