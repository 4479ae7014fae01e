"""The Python side of the CUDA C++ kernels, one file per operation, and how they are compiled."""
