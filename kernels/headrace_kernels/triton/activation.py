"""Gated activations: 6 bytes a value of bf16 (F = 14336, 2k tokens: 176 MB, 41 us at 4.3 TB/s).

Rows are cut into chunks that programs take in any order; with one scale a row, a program takes it
whole, so that it is read once. A row is batch invariant because a value depends on nothing but its
gate and its factor, and a scale is a maximum, which has no order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.triton.builds import Build
from headrace_kernels.triton.quantization import (
    WIDE_LOADS,
    check_layout,
    columns_of_groups,
    cut_row,
    matrix,
    output_types,
    store_groups,
)


def declines(facts: KernelFacts) -> str | None:
    return None


@triton.jit
def silu_and_mul_kernel(
    gate_up_ptr,
    out_ptr,
    scale_ptr,
    IN_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    LIMIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group, columns, exists = columns_of_groups(tl.program_id(1) * N, WIDTH, GROUP, N, S)
    gate_ptr = gate_up_ptr + row * IN_STRIDE + columns
    gate = tl.load(gate_ptr, exists, other=0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, exists, other=0).to(tl.float32)
    activated = gate / (1.0 + tl.exp(-gate)) * up
    store_groups(
        activated, out_ptr, scale_ptr, row, group, columns, exists, OUT_STRIDE, GROUPS, LIMIT
    )


def silu_and_mul(gate_up: Tensor, out: Tensor, out_scale: Tensor | None = None) -> None:
    """See ops/activation.py."""
    if not out.numel():
        return
    check_layout(out_scale=out_scale)
    check_layout(adjacent=True, out=out)
    gate_up = matrix(gate_up)
    cut = cut_row(out.shape[1], None if out_scale is None else out_scale.shape[1], out.dtype)
    silu_and_mul_kernel[len(out), cut.programs](
        gate_up,
        out,
        out_scale,
        IN_STRIDE=gate_up.stride(0),
        OUT_STRIDE=out.stride(0),
        **cut.constants,
        num_warps=cut.num_warps,
    )


def builds(arch: str) -> Iterator[Build]:
    """SmolLM2-135M, Qwen3-0.6B, Llama-3.1-8B; Qwen3-8B is between the last two."""
    for width in (1536, 3072, 14336):
        yield _build(width, "bf16", torch.bfloat16, "*bf16", None)
        for name, dtype, pointer in output_types(arch):
            for groups in (1, 112) if width == 14336 else (1,):
                yield _build(width, f"{name} {groups}", dtype, pointer, groups)


def _build(width: int, name: str, dtype: torch.dtype, pointer: str, groups: int | None) -> Build:
    cut = cut_row(width, groups, dtype)
    types = {"gate_up_ptr": "*bf16", "out_ptr": pointer}
    constants = {"IN_STRIDE": 2 * width, "OUT_STRIDE": width, **cut.constants}
    if groups is None:
        constants["scale_ptr"] = None
    else:
        types["scale_ptr"] = "*fp32"
    return Build(
        name=f"{width} to {name}",
        kernel=silu_and_mul_kernel,
        types=types,
        constants=constants,
        num_warps=cut.num_warps,
        expects=WIDE_LOADS,
    )
