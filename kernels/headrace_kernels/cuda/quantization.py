"""Rounding to 8 bits by the CUDA C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.fallback import log_once
from headrace_kernels.cuda.fallback import other
from headrace_kernels.dispatch import KernelFacts


def declines(facts: KernelFacts) -> str | None:
    return None


def quantize_rows(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """See ops/quantization.py. Groups that are no multiple of 8 inputs go elsewhere."""
    try:
        torch.ops.headrace_cuda.quantize_rows(x, out, scale)
    except RuntimeError as refusal:
        log_once("quantize_rows", str(refusal))
        other("quantization", "quantize_rows")(x, out, scale)
