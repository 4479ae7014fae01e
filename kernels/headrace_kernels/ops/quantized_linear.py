"""Ops on packed 4- and 8-bit weights: what they take, what they promise, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check
from headrace_kernels.packed_format import COLUMNS, FORMATS, GROUP, PackedFormat

ACTIVATION_BITS = (8, 16)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    fmt: PackedFormat,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    activation_bits: int = 8,
) -> Tensor:
    """out = x @ weight.T + bias, with the weights exact and x rounded to 8 bits or to bf16.

    8 bits: in each group of 32 inputs, lo = min(0, min x) and hi = max(0, max x) give
    s = (hi - lo) / 255, z = -128 - round(lo / s) and q = clamp(round(x / s) + z, -128, 127): x
    stands for s * (q - z), so that 0 is exact. 1 / s is 255 / (hi - lo), or 0 where that range is
    below 1e-30. The sums of integer products are exact, those of scales are added in fp32 in
    ascending order. A group with a value that is not finite gives NaN.

    16 bits: the products of integers and bf16 are exact in fp32, and so are those of inputs that
    share a scale added up before it is applied.

    `activation_bits` is the least that a kernel keeps: those of a GPU keep 16 where 8 are asked
    for. Their product for many tokens, cublas/, also rounds the weights to bf16.

    A row's bits depend on that row only, for every T, unless the kernel is not batch invariant.

    Args:
        x: [T, In], float32 or bfloat16.
        weight: packed, uint8 [ceil(Out / 16), In / 32, bytes]: see packed_format.PackedFormat.
        fmt: one of packed_format.FORMATS; with 8 bits one whose scales are fp16.
        bias: [Out] float32 or bfloat16, or None.
        out: [T, Out] float32 or bfloat16.
        activation_bits: 8 or 16, at least.
    """
    _check_packed(weight, fmt)
    if activation_bits not in ACTIVATION_BITS or (activation_bits == 8 and fmt.scale_bits == 32):
        raise ValueError(
            f"activation_bits must be 8, for scales in fp16, or 16, not {activation_bits} for "
            f"scales of {fmt.scale_bits} bits"
        )
    check("x", x, weight, shape=(x.shape[0], weight.shape[1] * GROUP))
    if -(-out.shape[-1] // COLUMNS) != len(weight):
        raise ValueError(
            f"out has {out.shape[-1]} columns, but weight has {len(weight)} blocks of {COLUMNS}"
        )
    check("out", out, x, shape=(x.shape[0], out.shape[-1]))
    if bias is not None:
        check("bias", bias, x, shape=out.shape[1:])
    kernels_for(x).quantized_linear(x, weight, fmt, activation_bits, bias, out)
    return out


def quantized_embedding(token_ids: Tensor, weight: Tensor, fmt: PackedFormat) -> Tensor:
    """Rows of packed weights: token_ids [T] int64 -> [T, In] float32.

    A token outside of the table is an IndexError or RuntimeError on a CPU; on a GPU, which cannot
    raise without waiting, its row is NaN.
    """
    _check_packed(weight, fmt)
    if token_ids.ndim != 1 or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids must be int64 [T], not {token_ids.dtype} {token_ids.shape}")
    shape = (len(token_ids), weight.shape[1] * GROUP)
    out = torch.empty(shape, dtype=torch.float32, device=weight.device)
    kernels_for(out).quantized_embedding(token_ids, weight, fmt, out)
    return out


def _check_packed(weight: Tensor, fmt: PackedFormat) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"fmt must be one of packed_format.FORMATS, not {fmt}")
    if weight.dtype != torch.uint8 or weight.ndim != 3 or weight.shape[2] != fmt.block_bytes:
        raise ValueError(
            f"weight must be packed: uint8 [ceil(Out / 16), In / 32, {fmt.block_bytes}], "
            f"not {weight.dtype} {tuple(weight.shape)}"
        )
