"""Products of 8-bit rows and weights: torch._scaled_mm for many tokens of e4m3, Triton's else.

What torch multiplies depends on its version, its CUDA and the GPU, so each mode is tried when the
kernels are chosen; what failed goes to Triton. torch._int_mm is not used: it leaves int32 sums in
memory, 4 bytes a result to write and to read again, where Triton's kernel scales them in registers.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference import scaled_linear as reference
from headrace_kernels.reference.scaled_linear import BLOCK
from headrace_kernels.triton import scaled_linear as few

logger = logging.getLogger(__name__)

FEW_TOKENS = 64
MULTIPLE = 16
"""Of inputs and outputs, that torch._scaled_mm takes."""
SCALES_MULTIPLE = 4
"""Of the scales of a row of blocks: theirs begin at multiples of 16 bytes."""


def declines(facts: KernelFacts) -> str | None:
    if reason := few.declines(facts):
        return reason
    if facts.device != "cuda" or not torch.cuda.is_available():
        return "torch sees no GPU"
    refusals = {mode: refusal(mode, facts.device) for mode in ("rows", "blocks")}
    if all(refusals.values()):
        return "; ".join(f"scales of {mode}: {reason}" for mode, reason in refusals.items())
    return None


@functools.cache
def refusal(mode: str, device: str) -> str | None:
    """Why torch does not multiply e4m3 with scales of `mode`, rows or blocks, or None if it does.

    A small product is computed and compared: this waits for the device, once for each mode.
    """
    tokens, outputs, inputs = 128, 256, 512
    x, weight = (
        torch.randn((rows, inputs), device=device).to(torch.float8_e4m3fn)
        for rows in (tokens, outputs)
    )
    groups, blocks = (1, outputs) if mode == "rows" else (inputs // BLOCK, outputs // BLOCK)
    x_scale = torch.rand((tokens, groups), device=device)
    weight_scale = torch.rand((blocks, groups), device=device)
    out = torch.empty((tokens, outputs), dtype=torch.bfloat16, device=device)
    expected = torch.empty_like(out)
    try:
        _scaled_mm(x, x_scale, weight, weight_scale, None, out)
    except (RuntimeError, ValueError) as refused:
        reason = str(refused).partition("\n")[0]
        logger.info("torch._scaled_mm does not take scales of %s here: %s", mode, reason)
        return reason
    reference.scaled_linear(x, x_scale, weight, weight_scale, None, expected)
    error = (out.float() - expected.float()).abs().max() / expected.abs().max()
    if not error < 0.01:
        logger.warning("torch._scaled_mm is off by %g with scales of %s: unused", error, mode)
        return f"is off by {error:g}"
    return None


def scaled_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """See ops/scaled_linear.py."""
    if len(x) > FEW_TOKENS and _takes(x, weight, weight_scale, bias, out):
        _scaled_mm(x, x_scale, weight, weight_scale, bias, out)
    else:
        few.scaled_linear(x, x_scale, weight, weight_scale, bias, out)


def _takes(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor
) -> bool:
    """Whether torch multiplies these, as far as it is known to."""
    outputs, inputs = weight.shape
    if x.dtype != torch.float8_e4m3fn or out.dtype != torch.bfloat16 or not out.is_contiguous():
        return False
    if inputs % MULTIPLE or outputs % MULTIPLE or not x.is_contiguous():
        return False
    if weight_scale.shape == (outputs, 1):
        return refusal("rows", x.device.type) is None and (bias is None or bias.dtype == out.dtype)
    whole = outputs % BLOCK == 0 and inputs % (BLOCK * SCALES_MULTIPLE) == 0
    return whole and bias is None and refusal("blocks", x.device.type) is None


def _scaled_mm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Sums are promoted to fp32 (no fast accumulation). Scales of blocks lie token by token."""
    if x_scale.shape[1] > 1:
        x_scale = x_scale.t().contiguous().t()
    torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=False,
        out=out,
    )
