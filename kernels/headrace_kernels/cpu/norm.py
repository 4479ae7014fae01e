"""RMSNorm by the C++ kernels: rows of fp32 and bfloat16; the rest, 8-bit rows among it,
goes to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.fallback import FLOATS, log_once
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference import norm as reference

_rms_norm = torch.ops.headrace.rms_norm.default
_add_rms_norm = torch.ops.headrace.add_rms_norm.default


def declines(facts: KernelFacts) -> str | None:
    return None if facts.dtype in FLOATS else f"takes float32 and bfloat16, not {facts.dtype}"


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, out_scale: Tensor | None = None
) -> None:
    """See ops/norm.py."""
    if out_scale is not None:
        return reference.rms_norm(x, weight, eps, out, out_scale)
    try:
        _rms_norm(x, weight, eps, out)
    except RuntimeError as refusal:
        log_once("rms_norm", str(refusal))
        reference.rms_norm(x, weight, eps, out)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    out_scale: Tensor | None = None,
) -> None:
    """See ops/norm.py."""
    if out_scale is not None:
        return reference.add_rms_norm(x, residual, weight, eps, out, out_scale)
    try:
        _add_rms_norm(x, residual, weight, eps, out)
    except RuntimeError as refusal:
        log_once("add_rms_norm", str(refusal))
        reference.add_rms_norm(x, residual, weight, eps, out)
