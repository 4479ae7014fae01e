// The Python module `headrace_kernels._C`, empty: loading it registers the ops of torch.ops.headrace.
// Here are those that belong to no kernel; the others are in the file of their kernel.
#if !defined(Py_LIMITED_API)
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <cstdint>
#include <string>

#include "headrace/cpu/isa.h"
#include "headrace/cpu/pool.h"

namespace headrace {
namespace {

constexpr std::array<const char*, 3> ISA_NAMES = {"scalar", "avx2", "avx512"};

std::string cpu_isa() { return ISA_NAMES[static_cast<size_t>(cpu::isa())]; }

void set_cpu_isa(std::string name) {
    for (size_t level = 0; level < ISA_NAMES.size(); ++level) {
        if (name != ISA_NAMES[level]) continue;
        const auto isa = static_cast<cpu::Isa>(level);
        STD_TORCH_CHECK(isa <= cpu::best_isa(), "this CPU has no ", name);
        cpu::set_isa(isa);
        return;
    }
    STD_TORCH_CHECK(false, "there is no instruction set ", name, "; it is scalar, avx2 or avx512");
}

int64_t num_threads() { return cpu::num_threads(); }

void set_num_threads(int64_t threads) {
    STD_TORCH_CHECK(threads >= 1 && threads <= 4096, "threads must be 1 to 4096, not ", threads);
    cpu::set_num_threads(static_cast<int>(threads));
}

// Advice only: a system without large pages, or with none left, takes small ones.
void advise_huge_pages(torch::stable::Tensor memory) {
    STD_TORCH_CHECK(memory.is_cpu() && memory.is_contiguous(), "memory must be a contiguous CPU tensor");
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    const auto begin = reinterpret_cast<uintptr_t>(memory.data_ptr());
    const uintptr_t end = begin + memory.numel() * memory.element_size();
    const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, last = end / PAGE * PAGE;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace, m) {
    m.def("cpu_isa() -> str");
    m.def("set_cpu_isa(str name) -> ()");
    m.def("num_threads() -> int");
    m.def("set_num_threads(int threads) -> ()");
    m.def("advise_huge_pages(Tensor memory) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headrace, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
    m.impl("num_threads", TORCH_BOX(&num_threads));
    m.impl("set_num_threads", TORCH_BOX(&set_num_threads));
    m.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages));
}

}  // namespace headrace

PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                     nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&definition);
}
