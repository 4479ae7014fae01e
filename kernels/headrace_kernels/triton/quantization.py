"""Rows to 8 bits: 3 bytes a value of bf16 (In = 4096, 2k tokens: 25 MB, 6 us at 4.3 TB/s).

A scale is the largest of its group, so a group stays in the registers of one program: read once,
written once. What the kernels that make 8-bit rows share, norm, activation and rope, is here too.
A row is batch invariant because no program sees two, and how it is cut depends on its width only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference.quantization import LIMITS
from headrace_kernels.triton.builds import Build

CHUNK = 2048
"""Values that a program takes where a row may be cut."""
LARGEST_ROW = 1 << 15
E4M3_ARCHES = frozenset(("sm_89", "sm_90", "sm_100", "sm_120"))
"""Those that convert to float8_e4m3fn; Triton refuses it on others."""
WIDE_LOADS = ("ld.global.v4.b32",)
"""Of 16 bytes a thread, which need rows whose length and distance the compiler knows."""

_INT8_ROUNDING = tl.constexpr(1.5 * 2**23)
_INFINITY_BITS = tl.constexpr(0x7F800000)


def declines(facts: KernelFacts) -> str | None:
    return None


@triton.jit
def magnitude_bits(y):
    """|y| as integers, which order as |y| does, with NaN above all."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def factor_and_scale(top_bits, LIMIT: tl.constexpr):
    """What multiplies a group whose largest magnitude this is, and the scale that undoes it."""
    largest = top_bits.to(tl.float32, bitcast=True)
    limit = tl.full(largest.shape, LIMIT, tl.float32)
    factor = tl.where(largest > 0, tl.div_rn(limit, largest), 0.0)
    scale = tl.where(top_bits < _INFINITY_BITS, tl.div_rn(largest, limit), float("nan"))
    return factor, scale


@triton.jit
def round_to_8_bits(y, factor, LIMIT: tl.constexpr):
    """y * factor as the nearest values, ties to even, that the 8 bits of this limit hold; fp32.

    Adding what has no room for the bits to lose rounds in hardware and interpreter alike; their
    conversions to e4m3 would differ. What is clamped cannot be fused with the sum.
    """
    y = y * factor
    y = tl.where(y == y, y, 0.0)
    y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
    if LIMIT == 127.0:
        return (y + _INT8_ROUNDING) - _INT8_ROUNDING
    bits = y.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits & 0x7F800000, (127 - 6) << 23)  # that of the smallest normal
    rounding = (exponent + (20 << 23) | 0x400000).to(tl.float32, bitcast=True)
    rounded = ((y + rounding) - rounding).to(tl.int32, bitcast=True)
    return (rounded | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def store_groups(
    y,
    out_ptr,
    scale_ptr,
    row,
    group,
    columns,
    exists,
    OUT_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Groups [N, S] of a row: as they are (LIMIT 0), or in 8 bits and their scales."""
    out_ptr += row * OUT_STRIDE
    if LIMIT == 0:
        tl.store(out_ptr + columns, y.to(out_ptr.dtype.element_ty), exists)
    else:
        top = tl.max(tl.where(exists, magnitude_bits(y), 0), 1)
        factor, scale = factor_and_scale(top, LIMIT)
        rounded = round_to_8_bits(y, factor[:, None], LIMIT)
        tl.store(out_ptr + columns, rounded.to(out_ptr.dtype.element_ty), exists)
        tl.store(scale_ptr + row * GROUPS + group, scale, group < GROUPS)


@triton.jit
def columns_of_groups(
    first, WIDTH: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, S: tl.constexpr
):
    """The groups [N] from `first` on, their columns [N, S] of a row, and which of them exist."""
    group = first + tl.arange(0, N)
    inside = tl.arange(0, S)
    columns = group[:, None] * GROUP + inside[None, :]
    return group, columns, (inside < GROUP)[None, :] & (columns < WIDTH)


@triton.jit
def quantize_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    X_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    LIMIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group, columns, exists = columns_of_groups(tl.program_id(1) * N, WIDTH, GROUP, N, S)
    x = tl.load(x_ptr + row * X_STRIDE + columns, exists, other=0).to(tl.float32)
    store_groups(x, out_ptr, scale_ptr, row, group, columns, exists, WIDTH, GROUPS, LIMIT)


@dataclass(frozen=True)
class RowCut:
    """How a row of WIDTH values is cut: GROUPS groups, N of which one program takes."""

    constants: Mapping[str, Any]
    programs: int
    num_warps: int


def cut_row(
    width: int, groups: int | None, out_dtype: torch.dtype | None, *, whole: bool = False
) -> RowCut:
    """Groups of one scale each, or any chunks if `groups` is None; all in one program if `whole`.

    Raises ValueError for a group, or a whole row, of more than LARGEST_ROW values.
    """
    if groups is None:
        group = width if whole else CHUNK
        groups = triton.cdiv(width, group)
    else:
        group = width // groups
    size = max(4, triton.next_power_of_2(group))
    taken = triton.next_power_of_2(groups) if whole else max(1, CHUNK // size)
    taken = min(taken, triton.next_power_of_2(groups))
    if size * taken > LARGEST_ROW:
        raise ValueError(f"a row of {width} values does not fit a program: at most {LARGEST_ROW}")
    limit = LIMITS.get(out_dtype, 0.0) if out_dtype is not None else 0.0
    constants = {
        "WIDTH": width,
        "GROUPS": groups,
        "GROUP": group,
        "N": taken,
        "S": size,
        "LIMIT": limit,
    }
    # Of 16 warps with 32 values a thread an SM takes two at a time, of 32 with 16 values one.
    num_warps = min(16, max(4, size * taken // 512))
    return RowCut(constants, triton.cdiv(groups, taken), num_warps)


def matrix(x: Tensor) -> Tensor:
    """x [..., E] as rows [T, E] of adjacent values, which may lie apart."""
    x = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def check_layout(*, adjacent: bool = False, **tensors: Tensor | None) -> None:
    """Raise ValueError for one that is not contiguous, or whose rows are not if `adjacent`."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.is_contiguous() or (adjacent and tensor.stride(-1) == 1):
            continue
        what = "have adjacent values in its rows" if adjacent else "be contiguous"
        raise ValueError(f"{name} must {what}; its strides are {tensor.stride()}")


def quantize_rows(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """See ops/quantization.py."""
    if not x.numel():
        return
    check_layout(out=out, scale=scale)
    x = matrix(x)
    cut = cut_row(x.shape[1], scale.shape[1], out.dtype)
    quantize_kernel[len(x), cut.programs](
        x, out, scale, X_STRIDE=x.stride(0), **cut.constants, num_warps=cut.num_warps
    )


def output_types(arch: str) -> Iterator[tuple[str, torch.dtype, str]]:
    """(name, dtype, pointer type) of the 8-bit rows that kernels write on this architecture."""
    yield "int8", torch.int8, "*i8"
    if arch in E4M3_ARCHES:
        yield "e4m3", torch.float8_e4m3fn, "*fp8e4nv"


def builds(arch: str) -> Iterator[Build]:
    """What attention gives in SmolLM2-135M, and in Llama-3.1-8B and Qwen3-8B."""
    for width in (576, 4096):
        for groups in (1, 32) if width == 4096 else (1,):
            for name, dtype, pointer in output_types(arch):
                cut = cut_row(width, groups, dtype)
                yield Build(
                    name=f"{width} in {groups} {name}",
                    kernel=quantize_kernel,
                    types={"x_ptr": "*bf16", "out_ptr": pointer, "scale_ptr": "*fp32"},
                    constants={"X_STRIDE": width, **cut.constants},
                    num_warps=cut.num_warps,
                    expects=WIDE_LOADS,
                )
