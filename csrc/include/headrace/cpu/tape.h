// What a step of one batch shape runs, recorded once and replayed in one call: the CPU's counterpart
// of a CUDA graph. An operation checks its arguments, gathers pointers and sizes in a struct, and
// launches a function of that struct; a recording keeps both.
#pragma once

#include <cstddef>
#include <type_traits>

namespace headrace::cpu {

namespace detail {
using Operation = void (*)(const void* parameters);
bool is_recording();
void record(Operation operation, const void* parameters, size_t size);
}  // namespace detail

// Runs run(parameters), and keeps both if this thread records. What `parameters` points to must be
// valid, and hold what it should, whenever the recording is replayed.
template <auto run, class Parameters>
void launch(const Parameters& parameters) {
    static_assert(std::is_trivially_copyable_v<Parameters>);
    static_assert(alignof(Parameters) <= alignof(std::max_align_t));
    run(parameters);
    if (detail::is_recording()) {
        detail::record(
            [](const void* recorded) { run(*static_cast<const Parameters*>(recorded)); },
            &parameters, sizeof(Parameters));
    }
}

}  // namespace headrace::cpu
