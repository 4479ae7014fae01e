"""Gated activations by the C++ kernels: fp32 and bfloat16; the rest, 8-bit rows among it, goes
to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.fallback import FLOATS, log_once
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference import activation as reference

_silu_and_mul = torch.ops.headrace.silu_and_mul.default


def declines(facts: KernelFacts) -> str | None:
    return None if facts.dtype in FLOATS else f"takes float32 and bfloat16, not {facts.dtype}"


def silu_and_mul(gate_up: Tensor, out: Tensor, out_scale: Tensor | None = None) -> None:
    """See ops/activation.py."""
    if out_scale is not None:
        return reference.silu_and_mul(gate_up, out, out_scale)
    try:
        _silu_and_mul(gate_up, out)
    except RuntimeError as refusal:
        log_once("silu_and_mul", str(refusal))
        reference.silu_and_mul(gate_up, out)
