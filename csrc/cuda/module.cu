// The Python module `headrace_kernels._CUDA`, empty: loading it registers the ops of
// torch.ops.headrace_cuda. Each is in the file of its kernel; here is what belongs to none.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <string>

namespace headrace::cuda {
namespace {

// What nvcc.digest said when this was built: verified.json names the sources that were checked.
std::string sources() { return HEADRACE_CUDA_SOURCES; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headrace_cuda, m) { m.def("sources() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(headrace_cuda, CompositeExplicitAutograd, m) {
    m.impl("sources", TORCH_BOX(&sources));
}

}  // namespace headrace::cuda

PyMODINIT_FUNC PyInit__CUDA() {
    static PyModuleDef definition = {
        PyModuleDef_HEAD_INIT, "_CUDA", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&definition);
}
