"""RMSNorm: a row a program, read once. Adding to the residual moves 12 bytes a value of bf16.

E = 4096: 2k tokens are 100 MB, 23 us at 4.3 TB/s; 64 tokens 3 MB, less than a launch. A row is
batch invariant because a program sees no other, and its sum of squares is added in an order that
depends on E (and on the groups of scales) only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
def _columns_by_four(WIDTH: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, S: tl.constexpr):
    """columns_of_groups(0, ...) as [N * S / 4, 4]: 16 bytes of fp32 a thread.

    As [N, S], a thread would take 16 bytes of the narrowest type, more than a store of fp32 can
    coalesce, and the compiler would move the residual to other threads through shared memory.
    """
    flat = tl.arange(0, N * S // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    if N == 1 or S == GROUP:
        return flat, flat < WIDTH
    columns = flat // S * GROUP + flat % S
    return columns, (flat % S < GROUP) & (columns < WIDTH)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    eps,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    LIMIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns, exists = _columns_by_four(WIDTH, GROUP, N, S)
    x = tl.load(x_ptr + row * X_STRIDE + columns, exists, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, exists, other=0).to(tl.float32)
    if residual_ptr is not None:
        residual = residual_ptr + row * WIDTH + columns
        x += tl.load(residual, exists, other=0)
        tl.store(residual, x, exists)
    mean_square = tl.sum(tl.sum(x * x, 1), 0) / WIDTH
    normed = x * tl.rsqrt(mean_square + eps) * weight
    if LIMIT == 0:
        out = out_ptr + row * OUT_STRIDE + columns
        tl.store(out, normed.to(out_ptr.dtype.element_ty), exists)
    else:
        group, columns, exists = columns_of_groups(0, WIDTH, GROUP, N, S)
        normed = tl.reshape(normed, [N, S])
        store_groups(
            normed, out_ptr, scale_ptr, row, group, columns, exists, OUT_STRIDE, GROUPS, LIMIT
        )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, out_scale: Tensor | None = None
) -> None:
    """See ops/norm.py."""
    _launch(x, None, weight, eps, out, out_scale)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    out_scale: Tensor | None = None,
) -> None:
    """See ops/norm.py."""
    _launch(x, residual, weight, eps, out, out_scale)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    out_scale: Tensor | None,
) -> None:
    if not x.numel():
        return
    check_layout(weight=weight, residual=residual, out_scale=out_scale)
    check_layout(adjacent=True, out=out)
    rows, out_rows = matrix(x), out.view(-1, out.shape[-1])
    constants, num_warps = _configuration(
        rows.shape[1], None if out_scale is None else out_scale.shape[1], out.dtype
    )
    rms_norm_kernel[(len(rows),)](
        rows,
        residual,
        weight,
        out_rows,
        out_scale,
        eps,
        X_STRIDE=rows.stride(0),
        OUT_STRIDE=out_rows.stride(0),
        **constants,
        num_warps=num_warps,
    )


def _configuration(
    width: int, groups: int | None, out_dtype: torch.dtype
) -> tuple[Mapping[str, Any], int]:
    cut = cut_row(width, groups, out_dtype, whole=True)
    return cut.constants, cut.num_warps


def builds(arch: str) -> Iterator[Build]:
    """SmolLM2-135M, Qwen3-0.6B, and 4096 of Llama-3.1-8B and Qwen3-8B."""
    for width in (576, 1024, 4096):
        for residual in (None, "*fp32"):
            yield _build(width, residual, "bf16", torch.bfloat16, "*bf16", None)
        for name, dtype, pointer in output_types(arch):
            for groups in (1, 32) if width == 4096 else (1,):
                yield _build(width, "*fp32", f"{name} {groups}", dtype, pointer, groups)


def _build(
    width: int,
    residual: str | None,
    name: str,
    dtype: torch.dtype,
    pointer: str,
    groups: int | None,
) -> Build:
    constants, num_warps = _configuration(width, groups, dtype)
    # The first layer's norm reads the residual stream itself.
    pointers = {
        "x_ptr": "*fp32" if residual is None else "*bf16",
        "residual_ptr": residual,
        "weight_ptr": "*fp32",
        "out_ptr": pointer,
        "scale_ptr": "*fp32" if groups else None,
    }
    return Build(
        name=f"{'add ' if residual else ''}{width} to {name}",
        kernel=rms_norm_kernel,
        types={key: value for key, value in pointers.items() if value} | {"eps": "fp32"},
        constants={
            **{key: None for key, value in pointers.items() if not value},
            "X_STRIDE": width,
            "OUT_STRIDE": width,
            **constants,
        },
        num_warps=num_warps,
        expects=WIDE_LOADS,
    )
