// The threads of the CPU kernels. Chunks of work are claimed from a counter, and an operation is
// over when its chunks are finished: a thread that the system holds up delays nobody but the chunk
// it is in, and one that wakes late finds less to do.
#pragma once

#include <cstdint>
#include <type_traits>

namespace headrace::cpu {

// Threads that work on an operation, its caller included; those of the machine at first.
int num_threads();
void set_num_threads(int threads);

namespace detail {
using Chunk = void (*)(void* context, int64_t chunk);
void run_on_pool(int64_t chunks, Chunk function, void* context);
}  // namespace detail

// Calls f(chunk) once for each chunk in [0, chunks), in any order and on any thread, and returns
// when all calls have. f must not throw; inside f, and while another thread is in here, it runs on
// the caller alone. At most 2^32 - 2 chunks.
template <class F>
void parallel_for(int64_t chunks, F&& f) {
    if (chunks <= 1 || num_threads() == 1) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) f(chunk);
        return;
    }
    using Callable = std::remove_reference_t<F>;
    detail::run_on_pool(
        chunks,
        [](void* context, int64_t chunk) { (*static_cast<Callable*>(context))(chunk); },
        const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace headrace::cpu
