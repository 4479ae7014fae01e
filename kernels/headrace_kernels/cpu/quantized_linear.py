"""Products of packed weights by the C++ kernels; what they refuse goes to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.fallback import FLOATS, log_once
from headrace_kernels.cpu.scratch import scratch
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference import quantized_linear as reference

_quantized_linear = torch.ops.headrace.quantized_linear.default
_quantized_embedding = torch.ops.headrace.quantized_embedding.default

ROW_BYTES = 44
"""Scratch for 32 activations: themselves in 8 bits, their scale and two sums."""


def declines(facts: KernelFacts) -> str | None:
    return None if facts.dtype in FLOATS else f"takes float32 and bfloat16, not {facts.dtype}"


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ops/quantized_linear.py."""
    memory = scratch("quantized_linear", x.shape[0] * weight.shape[1] * ROW_BYTES)
    try:
        _quantized_linear(x, weight, bias, memory, out)
    except RuntimeError as refusal:
        log_once("quantized_linear", str(refusal))
        reference.quantized_linear(x, weight, bias, out)


def quantized_embedding(token_ids: Tensor, weight: Tensor, out: Tensor) -> None:
    """See ops/quantized_linear.py."""
    _quantized_embedding(token_ids, weight, out)
