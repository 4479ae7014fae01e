// Which work the decode attention of a step consists of, made on the device from its lengths.
//
// A context is cut into chunks of CHUNK tokens counted from position 0. Each chunk has one partial
// result, and they are folded in ascending order: by one block that walks a context, or by another
// kernel once several blocks have written them to memory. Both fold with the same operations, so
// how a context was cut, and which block took what, is not to be seen in a result.
#pragma once

#include "headrace/cuda/simt.cuh"

namespace headrace::cuda {

constexpr int CHUNK = 512;
constexpr int TILE = 64;
constexpr int PLAN_THREADS = 256;

// Tokens [begin, end) of a context, for every kv head; those before `lowest` are not seen.
struct alignas(32) Item {
    int request, row, begin, end, lowest;
    // Of its partial, or -1: then it is a whole context.
    int slot;
    int unused[2];
};

// A context whose partials are folded by another kernel.
struct alignas(16) Fold {
    int row, slot, chunks, unused;
};

// What a plan is made from and where it goes. A request of another number of query tokens than one
// is left to another kernel.
struct Plan {
    const int* query_start;  // [requests + 1]
    const int* seq_lens;
    int requests;
    int window;    // tokens that are seen; 0: all
    int capacity;  // partials that there is memory for
    int* counts;   // [2]: items, folds
    Item* items;   // [capacity + requests]
    Fold* folds;   // [requests]
};

// Chunks that a context's newest token sees, and the first token.
struct Span {
    int first, chunks, lowest;
};

HEADRACE_HOST_DEVICE Span visible_span(int length, int window) {
    const int lowest = window > 0 && length > window ? length - window : 0;
    const int first = lowest / CHUNK;
    return {first, (length - 1) / CHUNK - first + 1, lowest};
}

// The sum of the values of all threads before this one, and of all; every thread calls it.
HEADRACE_DEVICE int2 scan_block(int value, int* shared) {
    constexpr int WARPS = PLAN_THREADS / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    int sum = value;
    HEADRACE_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
        const int before = shuffle(sum, (lane - distance) & 31);
        if (lane >= distance) sum += before;
    }
    if (lane == 31) shared[warp] = sum;
    sync_threads();
    int2 result = {sum - value, 0};
    HEADRACE_UNROLL
    for (int other = 0; other < WARPS; ++other) {
        if (other < warp) result.x += shared[other];
        result.y += shared[other];
    }
    sync_threads();
    return result;
}

// One block.
HEADRACE_KERNEL_OF(PLAN_THREADS, 1) plan_decode(Plan p) {
    int* const shared = reinterpret_cast<int*>(shared_memory());
    int partials = 0, items = 0, folds = 0;
    for (int start = 0; start < p.requests; start += PLAN_THREADS) {
        const int request = start + static_cast<int>(threadIdx.x);
        int row = 0, length = 0;
        if (request < p.requests) {
            row = p.query_start[request];
            if (p.query_start[request + 1] - row == 1) length = p.seq_lens[request];
        }
        const Span span = length > 0 ? visible_span(length, p.window) : Span{0, 0, 0};
        const int2 before = scan_block(span.chunks > 1 ? span.chunks : 0, shared);
        // Those behind one without room have none either, even if they would fit.
        const int slot = partials + before.x;
        const bool split = span.chunks > 1 && slot + span.chunks <= p.capacity;
        partials += before.y;
        const int own = split ? span.chunks : span.chunks > 0;
        const int2 items_before = scan_block(own, shared);
        Item* const to = p.items + items + items_before.x;
        items += items_before.y;
        const int2 folds_before = scan_block(split, shared);
        if (split) p.folds[folds + folds_before.x] = {row, slot, span.chunks, 0};
        folds += folds_before.y;
        for (int i = 0; i < own; ++i) {
            const int chunk = span.first + i;
            to[i].request = request;
            to[i].row = row;
            to[i].begin = i == 0 ? span.lowest / TILE * TILE : chunk * CHUNK;
            to[i].end = split && (chunk + 1) * CHUNK < length ? (chunk + 1) * CHUNK : length;
            to[i].lowest = span.lowest;
            to[i].slot = split ? slot + i : -1;
        }
    }
    if (threadIdx.x == 0) p.counts[0] = items;
    if (threadIdx.x == 0) p.counts[1] = folds;
}

// The state of a sum of exponentials: values that were scaled by 2^-largest.
struct Sum {
    float largest, total;
};

HEADRACE_HOST_DEVICE float finite_or_zero(float largest) {
    return largest == -HEADRACE_INFINITY ? 0.0F : largest;
}
HEADRACE_HOST_DEVICE float maximum(float a, float b) { return a > b ? a : b; }

// How a partial is added to what was folded before it: weights of both.
struct FoldWeights {
    float largest, of_old, of_new;
};
HEADRACE_DEVICE FoldWeights fold_weights(float old_largest, float new_largest) {
    const float largest = maximum(old_largest, new_largest), offset = finite_or_zero(largest);
    return {largest, exp2_of(old_largest - offset), exp2_of(new_largest - offset)};
}
HEADRACE_DEVICE float fold(const FoldWeights& w, float old_value, float new_value) {
    return fmaf(old_value, w.of_old, new_value * w.of_new);
}

}  // namespace headrace::cuda
