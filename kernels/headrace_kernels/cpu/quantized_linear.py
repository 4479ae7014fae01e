"""Products of packed weights by the C++ kernels; what they refuse goes to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.fallback import FLOATS, log_once
from headrace_kernels.cpu.scratch import scratch
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.packed_format import GROUP, PackedFormat
from headrace_kernels.reference import quantized_linear as reference

_quantized_linear = torch.ops.headrace.quantized_linear.default
_quantized_embedding = torch.ops.headrace.quantized_embedding.default


def scratch_bytes(rows: int, in_features: int, fmt: PackedFormat, activation_bits: int) -> int:
    """For activations as they are multiplied: 8 bits with a scale and for each part two sums, or
    bf16 with a sum."""
    group = GROUP + 4 + 8 * fmt.parts if activation_bits == 8 else 2 * GROUP + 4 * fmt.parts
    return rows * in_features // GROUP * group


def declines(facts: KernelFacts) -> str | None:
    return None if facts.dtype in FLOATS else f"takes float32 and bfloat16, not {facts.dtype}"


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    fmt: PackedFormat,
    activation_bits: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """See ops/quantized_linear.py."""
    memory = scratch("quantized_linear", scratch_bytes(len(x), x.shape[1], fmt, activation_bits))
    try:
        _quantized_linear(x, weight, fmt.code, activation_bits, bias, memory, out)
    except RuntimeError as refusal:
        log_once("quantized_linear", str(refusal))
        reference.quantized_linear(x, weight, fmt, activation_bits, bias, out)


def quantized_embedding(token_ids: Tensor, weight: Tensor, fmt: PackedFormat, out: Tensor) -> None:
    """See ops/quantized_linear.py."""
    _quantized_embedding(token_ids, weight, fmt.code, out)
