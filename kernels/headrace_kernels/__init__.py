"""Kernels for paged attention and quantized matrix products; useful without the server."""
