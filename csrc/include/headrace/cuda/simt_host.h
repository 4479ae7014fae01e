// Runs the CUDA kernels on a host: one block after another, its threads as coroutines. For tests:
// what they compute, not how fast. It also finds what a correct result of a lucky schedule hides:
// shared memory is poisoned, its end is guarded, threads run in a chosen order, warps side by side
// or far ahead of each other, and asynchronous copies are made as late or as early as the rules
// allow.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "headrace/cuda/numbers.cuh"

#define HEADRACE_KERNEL inline
#define HEADRACE_KERNEL_OF(threads, blocks) inline void

namespace headrace::cuda {

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct int2 {
    int x, y;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

// How a run is scheduled; every choice must give the same bits.
struct Schedule {
    enum Order { ASCENDING, DESCENDING, RANDOM } order = ASCENDING;
    bool early_copies = false;
    // A warp runs on until it has to wait for another one.
    bool far_ahead = false;
};

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "simt_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
    std::abort();
}

struct Barrier {
    int arrived = 0;
    int64_t generation = 0;
};

constexpr int LANES = 32, SLOT = 64, STACK_BYTES = 128 << 10, GUARD_BYTES = 256;

struct Warp {
    Barrier barrier;
    uint8_t slots[2][LANES][SLOT];
};

struct Copy {
    uint8_t* to;
    const uint8_t* from;
};

struct Thread {
    ucontext_t start;
    jmp_buf where;
    bool started = false, done = false;
    int collectives = 0;
    std::unique_ptr<uint8_t[]> stack = std::make_unique<uint8_t[]>(STACK_BYTES);
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> group;
};

struct Machine {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<uint8_t> memory;
    uint8_t* shared = nullptr;
    Barrier barrier;
    jmp_buf scheduler;
    Thread* current = nullptr;
    const std::function<void()>* kernel = nullptr;
    Schedule schedule;
    int64_t progress = 0;
    // What asynchronous copies may read, if a test says so.
    const uint8_t* readable_begin = nullptr;
    const uint8_t* readable_end = nullptr;
};
inline Machine machine;

inline void yield() {
    Thread* const self = machine.current;
    if (_setjmp(self->where) == 0) _longjmp(machine.scheduler, 1);
}

inline void wait_at(Barrier& barrier, int expected) {
    ++machine.progress;
    const int64_t generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline int this_lane() { return static_cast<int>(threadIdx.x % LANES); }
inline Warp& this_warp() { return machine.warps[threadIdx.x / LANES]; }

// Every lane gives an operand; f sees all of them. Two sets of slots: a lane may be one call ahead.
template <class T, class F>
auto exchange(const T& operand, F&& f) {
    static_assert(sizeof(T) <= SLOT);
    Warp& warp = this_warp();
    auto& slots = warp.slots[machine.current->collectives++ % 2];
    std::memcpy(slots[this_lane()], &operand, sizeof operand);
    wait_at(warp.barrier, LANES);
    return f([&](int lane) {
        T other;
        std::memcpy(&other, slots[lane], sizeof other);
        return other;
    });
}

inline void run_copies(std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        if (copy.from)
            std::memcpy(copy.to, copy.from, 16);
        else
            std::memset(copy.to, 0, 16);
    }
    copies.clear();
}

inline void run_thread() {
    (*machine.kernel)();
    machine.current->done = true;
    ++machine.progress;
    _longjmp(machine.scheduler, 1);
}

inline void resume(Thread& thread, unsigned index) {
    machine.current = &thread;
    threadIdx = {index, 0, 0};
    if (_setjmp(machine.scheduler) != 0) return;
    if (thread.started) _longjmp(thread.where, 1);
    thread.started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = STACK_BYTES;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, run_thread, 0);
    setcontext(&thread.start);
}

inline void start_block(unsigned threads, size_t shared_bytes) {
    if (machine.threads.size() != threads) machine.threads = std::vector<Thread>(threads);
    machine.warps.assign((threads + LANES - 1) / LANES, Warp{});
    machine.barrier = {};
    machine.memory.assign(shared_bytes + GUARD_BYTES + 128, 0xff);
    const auto address = reinterpret_cast<uintptr_t>(machine.memory.data());
    machine.shared = machine.memory.data() + (128 - address % 128) % 128;
    for (Thread& thread : machine.threads) {
        thread.started = thread.done = false;
        thread.collectives = 0;
        thread.groups.clear();
        thread.group.clear();
    }
}

// Lets each of the threads run until it waits; whether any is left.
inline bool run_threads(const unsigned* threads, unsigned count) {
    bool left = false;
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = machine.threads[threads[i]];
        if (!thread.done) resume(thread, threads[i]);
        left |= !thread.done;
    }
    return left;
}

inline void run_block(unsigned threads, size_t shared_bytes, std::mt19937& random) {
    start_block(threads, shared_bytes);
    std::vector<unsigned> order(threads);
    for (unsigned i = 0; i < threads; ++i) {
        order[i] = machine.schedule.order == Schedule::DESCENDING ? threads - 1 - i : i;
    }
    const unsigned step = machine.schedule.far_ahead ? LANES : threads;
    for (bool left = true; left;) {
        if (machine.schedule.order == Schedule::RANDOM)
            std::shuffle(order.begin(), order.end(), random);
        const int64_t before = machine.progress;
        left = false;
        for (unsigned first = 0; first < threads; first += step) {
            int64_t last = -1;
            bool left_here = true;
            while (left_here && machine.progress != last) {
                last = machine.progress;
                left_here = run_threads(order.data() + first, std::min(step, threads - first));
                if (!machine.schedule.far_ahead) break;
            }
            left |= left_here;
        }
        if (left && machine.progress == before) fail("threads wait for each other");
    }
    for (int i = 0; i < GUARD_BYTES; ++i) {
        if (machine.shared[shared_bytes + i] != 0xff) fail("wrote beyond the shared memory");
    }
}

// `kernel` calls the kernel with its arguments. Not reentrant.
inline void launch(Dim3 grid, unsigned threads, size_t shared_bytes,
                   const std::function<void()>& kernel, Schedule schedule) {
    std::mt19937 random(1);
    machine.schedule = schedule;
    machine.kernel = &kernel;
    gridDim = grid;
    blockDim = {threads, 1, 1};
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; ++i) {
        const unsigned block = schedule.order == Schedule::DESCENDING ? blocks - 1 - i : i;
        blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        run_block(threads, shared_bytes, random);
    }
}

}  // namespace host

inline uint8_t* shared_memory() { return host::machine.shared; }

inline void sync_threads() {
    host::wait_at(host::machine.barrier, static_cast<int>(host::machine.threads.size()));
}
inline void sync_warp() { host::wait_at(host::this_warp().barrier, host::LANES); }

template <class T>
T shuffle(T value, int lane) {
    return host::exchange(value, [&](auto of) { return of(lane); });
}
template <class T>
T shuffle_xor(T value, int mask) {
    return host::exchange(value, [&](auto of) { return of(host::this_lane() ^ mask); });
}

inline void copy_async_16(void* to, const void* from, bool exists) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (exists && reinterpret_cast<uintptr_t>(from) % 16))
        host::fail("an asynchronous copy is not aligned to 16 bytes");
    const auto* const begin = static_cast<const uint8_t*>(from);
    const host::Machine& m = host::machine;
    if (exists && m.readable_end && (begin < m.readable_begin || begin + 16 > m.readable_end))
        host::fail("an asynchronous copy reads beyond its tensor");
    auto& group = host::machine.current->group;
    group.push_back(
        {static_cast<uint8_t*>(to), exists ? static_cast<const uint8_t*>(from) : nullptr});
    if (host::machine.schedule.early_copies) host::run_copies(group);
}
inline void copy_async_commit() {
    host::Thread& thread = *host::machine.current;
    thread.groups.push_back(std::move(thread.group));
    thread.group.clear();
}
template <int PENDING>
void copy_async_wait() {
    auto& groups = host::machine.current->groups;
    while (groups.size() > PENDING) {
        host::run_copies(groups.front());
        groups.erase(groups.begin());
    }
}

namespace host {

struct MatrixRow {
    uint16_t values[8];
};

// Lane 8 i + r names row r of matrix i.
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row is not aligned to 16 bytes");
    MatrixRow own;
    std::memcpy(&own, row, sizeof own);
    const int g = this_lane() / 4, t = this_lane() % 4;
    exchange(own, [&](auto of) {
        for (int i = 0; i < 4; ++i) {
            const auto element = [&](int r, int c) { return uint32_t{of(8 * i + r).values[c]}; };
            to[i] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                               : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
        }
    });
}

struct MmaOperands {
    uint32_t a[4], b[2];
};

}  // namespace host

inline void load_matrices(uint32_t (&to)[4], const void* row) {
    host::load_matrices(to, row, false);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
    host::load_matrices(to, row, true);
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const host::MmaOperands own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const int g = host::this_lane() / 4, t = host::this_lane() % 4;
    host::exchange(own, [&](auto of) {
        const auto half = [](uint32_t word, int k) {
            return to_float(T{static_cast<uint16_t>(word >> 16 * (k % 2))});
        };
        const auto a_at = [&](int row, int k) {
            return half(of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k);
        };
        const auto b_at = [&](int k, int column) {
            return half(of(column * 4 + k % 8 / 2).b[k / 8], k);
        };
        for (int i = 0; i < 4; ++i) {
            const int row = g + i / 2 * 8, column = 2 * t + i % 2;
            for (int k = 0; k < 16; ++k) c[i] += a_at(row, k) * b_at(k, column);
        }
    });
}

inline float exp2_of(float x) { return std::exp2(x); }

}  // namespace headrace::cuda
