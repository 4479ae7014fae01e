"""Products of packed weights by the CUDA C++ kernel; what it refuses goes to another.

At one token time is that of reading the weights: 4096 x 4096 of 4 bits and a scale are 9.4 MB, 2.2
us at 4.3 TB/s; the products of 64 tokens are 2.1 GFLOP, 2.7 us at 790 TFLOP/s. A row's bits depend
on that row only: csrc/include/headrace/cuda/quantized_linear.cuh says in which order inputs are
added, which the number of tokens does not change.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from headrace_kernels.cpu.fallback import log_once
from headrace_kernels.cuda.fallback import other
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.packed_format import PackedFormat

FORMATS = (
    PackedFormat(4, False),
    PackedFormat(4, True),
    PackedFormat(4, True, scale_bits=32),
    PackedFormat(8, False),
)
"""Those that there is a kernel of (with_packed_format)."""

LANES = 8
"""Partial sums of an output, where several blocks make them."""


def declines(facts: KernelFacts) -> str | None:
    return None


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    fmt: PackedFormat,
    activation_bits: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """See ops/quantized_linear.py; activations of 8 bits go elsewhere."""
    if activation_bits == 16 and fmt in FORMATS:
        try:
            _multiply(x.to(torch.bfloat16), weight, fmt, bias, out)
            return
        except RuntimeError as refusal:
            log_once("quantized_linear", str(refusal))
    multiply = other("quantized_linear", "quantized_linear")
    multiply(x, weight, fmt, activation_bits, bias, out)


def _multiply(
    x: Tensor, weight: Tensor, fmt: PackedFormat, bias: Tensor | None, out: Tensor
) -> None:
    ops = torch.ops.headrace_cuda
    splits = ops.linear_splits(*out.shape, _multiprocessors(x.device))
    partials = x.new_empty(LANES * out.numel() if splits > 1 else 0, dtype=torch.float32)
    ops.quantized_linear(x, weight, fmt.code, bias, splits, partials, out)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def quantized_embedding(token_ids: Tensor, weight: Tensor, fmt: PackedFormat, out: Tensor) -> None:
    """See ops/quantized_linear.py."""
    other("quantized_linear", "quantized_embedding")(token_ids, weight, fmt, out)
