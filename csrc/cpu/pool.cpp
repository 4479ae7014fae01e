#include "headrace/cpu/pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace headrace::cpu {
namespace {

// Longer than the gap between two operations of a step, shorter than anyone would notice.
constexpr auto SPIN = std::chrono::microseconds(50);
constexpr int POLLS_PER_CLOCK_READ = 32;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Polls until `ready` or the time is up; returns the last answer.
template <class Ready>
bool spin_until(Ready&& ready) {
    const auto end = std::chrono::steady_clock::now() + SPIN;
    do {
        for (int poll = 0; poll < POLLS_PER_CLOCK_READ; ++poll) {
            if (ready()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return ready();
}

thread_local bool inside_a_job = false;

// One job at a time. Its generation and its next free chunk share a word, `claims_`, so that a thread
// which read the fields of a job can claim only a chunk of that same job: before they change, the
// word does.
class Pool {
  public:
    void run(int workers, int64_t chunks, detail::Chunk function, void* context) {
        std::unique_lock lock(owner_, std::try_to_lock);
        if (inside_a_job || !lock.owns_lock()) {
            for (int64_t chunk = 0; chunk < chunks; ++chunk) function(context, chunk);
            return;
        }
        resize(workers);
        const uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
        claims_.store(uint64_t{generation} << 32 | NONE_LEFT, std::memory_order_release);
        finished_.store(0, std::memory_order_release);
        function_.store(function, std::memory_order_release);
        context_.store(context, std::memory_order_release);
        chunks_.store(static_cast<uint32_t>(chunks), std::memory_order_release);
        claims_.store(uint64_t{generation} << 32, std::memory_order_release);
        generation_.store(generation, std::memory_order_release);
        wake(chunks - 1);

        inside_a_job = true;
        work();
        inside_a_job = false;
        wait_for(static_cast<uint32_t>(chunks));
    }

    // Ends the workers; later jobs run on their callers.
    void close() {
        std::lock_guard lock(owner_);
        resize(0);
        closed_ = true;
    }

  private:
    static constexpr uint32_t NONE_LEFT = UINT32_MAX;

    void resize(int workers) {
        if (closed_ || workers == static_cast<int>(workers_.size())) return;
        stop_.store(true, std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
        stop_.store(false, std::memory_order_relaxed);
        const uint32_t generation = generation_.load(std::memory_order_relaxed);
        for (int i = 0; i < workers; ++i) {
            workers_.emplace_back([this, generation] { serve(generation); });
        }
    }

    // A notification costs a system call only if somebody sleeps.
    void wake(int64_t useful) {
        if (useful >= static_cast<int64_t>(workers_.size())) {
            generation_.notify_all();
        } else {
            for (int64_t i = 0; i < useful; ++i) generation_.notify_one();
        }
    }

    void serve(uint32_t seen) {
        inside_a_job = true;
        for (;;) {
            const auto posted = [&] { return generation_.load(std::memory_order_acquire) != seen; };
            if (!spin_until(posted)) generation_.wait(seen, std::memory_order_acquire);
            seen = generation_.load(std::memory_order_acquire);
            if (stop_.load(std::memory_order_relaxed)) return;
            work();
        }
    }

    void work() {
        uint64_t claim = claims_.load(std::memory_order_acquire);
        for (;;) {
            const detail::Chunk function = function_.load(std::memory_order_acquire);
            void* const context = context_.load(std::memory_order_acquire);
            const uint32_t chunks = chunks_.load(std::memory_order_acquire);
            const auto chunk = static_cast<uint32_t>(claim);
            if (chunk >= chunks) return;
            if (!claims_.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel,
                                               std::memory_order_acquire)) {
                continue;
            }
            function(context, chunk);
            // Behind the last chunk the caller may be gone: nothing of the job is touched then.
            if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) {
                finished_.notify_all();
            }
            claim = claims_.load(std::memory_order_acquire);
        }
    }

    void wait_for(uint32_t chunks) {
        if (spin_until([&] { return finished_.load(std::memory_order_acquire) == chunks; })) return;
        for (;;) {
            const uint32_t finished = finished_.load(std::memory_order_acquire);
            if (finished == chunks) return;
            finished_.wait(finished, std::memory_order_acquire);
        }
    }

    std::mutex owner_;
    std::vector<std::thread> workers_;
    bool closed_ = false;
    std::atomic<bool> stop_{false};
    std::atomic<detail::Chunk> function_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<uint32_t> chunks_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<uint64_t> claims_{0};
    alignas(64) std::atomic<uint32_t> finished_{0};
};

std::atomic<Pool*> current{nullptr};

// Never freed: a thread that still computes while the process exits must find it.
Pool& pool() {
    if (Pool* existing = current.load(std::memory_order_acquire)) return *existing;
    static std::mutex creation;
    std::lock_guard lock(creation);
    if (Pool* existing = current.load(std::memory_order_acquire)) return *existing;
    static const bool registered = [] {
        std::atexit([] {
            if (Pool* last = current.load(std::memory_order_acquire)) last->close();
        });
#if defined(__unix__) || defined(__APPLE__)
        // A child process has no workers: it makes its own.
        pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_release); });
#endif
        return true;
    }();
    static_cast<void>(registered);
    Pool* created = new Pool;
    current.store(created, std::memory_order_release);
    return *created;
}

std::atomic<int>& threads() {
    static std::atomic<int> count{
        std::max(1, static_cast<int>(std::thread::hardware_concurrency()))};
    return count;
}

}  // namespace

int num_threads() { return threads().load(std::memory_order_relaxed); }

void set_num_threads(int count) { threads().store(std::max(1, count), std::memory_order_relaxed); }

namespace detail {

void run_on_pool(int64_t chunks, Chunk function, void* context) {
    pool().run(num_threads() - 1, chunks, function, context);
}

}  // namespace detail
}  // namespace headrace::cpu
