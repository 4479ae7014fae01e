"""Products of packed weights: of the integers for few tokens, of weights made bf16 for many.

Making 4096 x 4096 weights bf16 moves 76 MB there and back, 18 us at 4.3 TB/s; 2048 tokens take 87
us at 790 TFLOP/s to multiply with them. From somewhat over a hundred tokens on, by estimate, that
costs less than the small tiles of Triton's kernel. Weights are rounded to bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cublas import linear as dense
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.packed_format import COLUMNS, PackedFormat
from headrace_kernels.triton import linear as few_dense
from headrace_kernels.triton import quantized_linear as few
from headrace_kernels.triton.gemm_packed import dequantize

FEW_TOKENS = 128
DENSE_BYTES = 256 * 1024 * 1024
"""Of weights that are made bf16 at once: any matrix of an 8B model but its head."""

quantized_embedding = few.quantized_embedding


def declines(facts: KernelFacts) -> str | None:
    return few.declines(facts)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    fmt: PackedFormat,
    activation_bits: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """See ops/quantized_linear.py."""
    if len(x) <= FEW_TOKENS:
        few.quantized_linear(x, weight, fmt, activation_bits, bias, out)
        return
    inputs, outputs = x.shape[1], out.shape[1]
    rounded = x.to(torch.bfloat16)
    blocks = max(1, DENSE_BYTES // (2 * COLUMNS * inputs))
    for first in range(0, len(weight), blocks):
        packed = weight[first : first + blocks]
        begin, end = first * COLUMNS, min((first + blocks) * COLUMNS, outputs)
        matrix = torch.empty((len(packed) * COLUMNS, inputs), dtype=rounded.dtype, device=x.device)
        dequantize(packed, fmt, matrix)
        # A bias of another type is added in fp32, by Triton's kernel.
        own_bias = None if bias is None else bias[begin:end]
        multiply = (
            dense.linear if own_bias is None or own_bias.dtype == out.dtype else few_dense.linear
        )
        multiply(rounded, matrix[: end - begin], own_bias, out[:, begin:end])
