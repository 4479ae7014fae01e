"""Dense matrix products by the C++ kernel: fp32 and bfloat16; the rest goes to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.fallback import FLOATS, log_once
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference import linear as reference

_linear = torch.ops.headrace.linear.default


def declines(facts: KernelFacts) -> str | None:
    return None if facts.dtype in FLOATS else f"takes float32 and bfloat16, not {facts.dtype}"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ops/linear.py."""
    try:
        _linear(x, weight, bias, out)
    except RuntimeError as refusal:
        log_once("linear", str(refusal))
        reference.linear(x, weight, bias, out)
