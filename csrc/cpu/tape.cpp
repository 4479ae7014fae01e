#include "headrace/cpu/tape.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace headrace::cpu {
namespace {

class Tape {
  public:
    void add(detail::Operation operation, const void* parameters, size_t size) {
        steps_.push_back({operation, parameters_.size()});
        parameters_.resize(parameters_.size() + (size + sizeof(Unit) - 1) / sizeof(Unit));
        std::memcpy(&parameters_[steps_.back().begin], parameters, size);
    }

    void replay() const {
        for (const Step& step : steps_) step.operation(&parameters_[step.begin]);
    }

    int64_t size() const { return static_cast<int64_t>(steps_.size()); }

  private:
    using Unit = std::max_align_t;
    struct Step {
        detail::Operation operation;
        size_t begin;
    };
    std::vector<Step> steps_;
    std::vector<Unit> parameters_;
};

thread_local std::shared_ptr<Tape> recording;

std::mutex tapes_access;
std::unordered_map<int64_t, std::shared_ptr<const Tape>>& tapes() {
    static std::unordered_map<int64_t, std::shared_ptr<const Tape>> all;
    return all;
}

void begin_recording() {
    STD_TORCH_CHECK(!recording, "this thread records already");
    recording = std::make_shared<Tape>();
}

// Ends the recording, of which nothing is kept.
void drop_recording() { recording.reset(); }

// Ends the recording and returns its number, for replay.
int64_t end_recording() {
    STD_TORCH_CHECK(recording, "this thread does not record");
    static int64_t last = 0;
    const std::lock_guard lock(tapes_access);
    tapes()[++last] = std::move(recording);
    recording.reset();
    return last;
}

std::shared_ptr<const Tape> tape(int64_t number) {
    const std::lock_guard lock(tapes_access);
    const auto found = tapes().find(number);
    STD_TORCH_CHECK(found != tapes().end(), "there is no recording ", number);
    return found->second;
}

void replay(int64_t number) { tape(number)->replay(); }

int64_t recorded_operations(int64_t number) { return tape(number)->size(); }

void forget_recording(int64_t number) {
    const std::lock_guard lock(tapes_access);
    tapes().erase(number);
}

}  // namespace

namespace detail {

bool is_recording() { return recording != nullptr; }

void record(Operation operation, const void* parameters, size_t size) {
    recording->add(operation, parameters, size);
}

}  // namespace detail

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def("begin_recording() -> ()");
    m.def("drop_recording() -> ()");
    m.def("end_recording() -> int");
    m.def("replay(int recording) -> ()");
    m.def("recorded_operations(int recording) -> int");
    m.def("forget_recording(int recording) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CompositeExplicitAutograd, m) {
    m.impl("begin_recording", TORCH_BOX(&begin_recording));
    m.impl("drop_recording", TORCH_BOX(&drop_recording));
    m.impl("end_recording", TORCH_BOX(&end_recording));
    m.impl("replay", TORCH_BOX(&replay));
    m.impl("recorded_operations", TORCH_BOX(&recorded_operations));
    m.impl("forget_recording", TORCH_BOX(&forget_recording));
}

}  // namespace headrace::cpu
