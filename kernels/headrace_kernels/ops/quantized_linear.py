"""Ops on packed 4- and 8-bit weights: what they take, what they promise, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check
from headrace_kernels.packed_format import COLUMNS, FORMATS, GROUP


def quantized_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor
) -> Tensor:
    """out = x @ weight.T + bias, with x rounded to 8 bits in groups of 32 and the weights exact.

    In each group of 32 inputs, lo = min(0, min x) and hi = max(0, max x) give s = (hi - lo) / 255,
    z = -128 - round(lo / s) and q = clamp(round(x / s) + z, -128, 127): x stands for s * (q - z),
    so that 0 is exact. 1 / s is 255 / (hi - lo), or 0 where that range is below 1e-30. The sums of
    integer products are exact, those of groups are added in fp32 in ascending order: a row's bits
    depend on that row only, for every T. A group with a value that is not finite gives NaN.

    Args:
        x: [T, In], float32 or bfloat16.
        weight: packed, uint8 [ceil(Out / 16), In / 32, bytes]: see packed_format.PackedFormat.
        bias: [Out] float32 or bfloat16, or None.
        out: [T, Out] float32 or bfloat16.
    """
    _check_packed(weight)
    check("x", x, weight, shape=(x.shape[0], weight.shape[1] * GROUP))
    if -(-out.shape[-1] // COLUMNS) != len(weight):
        raise ValueError(
            f"out has {out.shape[-1]} columns, but weight has {len(weight)} blocks of {COLUMNS}"
        )
    check("out", out, x, shape=(x.shape[0], out.shape[-1]))
    if bias is not None:
        check("bias", bias, x, shape=out.shape[1:])
    kernels_for(x).quantized_linear(x, weight, bias, out)
    return out


def quantized_embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of packed weights: token_ids [T] int64 -> [T, In] float32."""
    _check_packed(weight)
    if token_ids.ndim != 1 or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids must be int64 [T], not {token_ids.dtype} {token_ids.shape}")
    shape = (len(token_ids), weight.shape[1] * GROUP)
    out = torch.empty(shape, dtype=torch.float32, device=weight.device)
    kernels_for(out).quantized_embedding(token_ids, weight, out)
    return out


def _check_packed(weight: Tensor) -> None:
    if weight.dtype != torch.uint8 or weight.ndim != 3 or weight.shape[2] not in FORMATS:
        raise ValueError(
            f"weight must be packed: uint8 [ceil(Out / 16), In / 32, bytes] with bytes one of "
            f"{', '.join(map(str, FORMATS))}, not {weight.dtype} {tuple(weight.shape)}"
        )
