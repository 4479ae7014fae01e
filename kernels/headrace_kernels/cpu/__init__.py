"""The Python side of the C++ kernels for CPUs: the signatures of KernelSet over torch.ops."""
