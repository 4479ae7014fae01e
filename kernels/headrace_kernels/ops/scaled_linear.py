"""Product of 8-bit rows with 8-bit weights: what it takes, what it promises, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check
from headrace_kernels.reference.quantization import LIMITS
from headrace_kernels.reference.scaled_linear import BLOCK


def scaled_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor,
) -> Tensor:
    """out = (x * x_scale) @ (weight * weight_scale).T + bias: W8A8, int8 or e4m3.

    Products are summed in int32 or fp32 and scaled in fp32: once a row and output, or, with block
    scales, once for each 128 inputs (DeepSeek-V3, arXiv 2412.19437, section 3.3).

    Args:
        x: [T, In], int8 or float8_e4m3fn.
        x_scale: [T, 1] float32, or [T, In / 128] with block scales.
        weight: [Out, In] in the dtype of x.
        weight_scale: [Out, 1] float32, or [ceil(Out / 128), In / 128]: one for 128 x 128 weights.
        bias: [Out], any float dtype, or None.
        out: [T, Out], any float dtype.
    """
    if x.dtype not in LIMITS:
        raise ValueError(f"x must be int8 or float8_e4m3fn, not {x.dtype}")
    (tokens, inputs), outputs = x.shape, len(weight)
    check("weight", weight, x, shape=(outputs, inputs), dtype=x.dtype)
    rowwise, blocks = (outputs, 1), (-(-outputs // BLOCK), inputs // BLOCK)
    if tuple(weight_scale.shape) not in (rowwise, blocks) or (
        weight_scale.shape != rowwise and inputs % BLOCK
    ):
        raise ValueError(
            f"weight_scale must be {list(rowwise)} or, of blocks, {list(blocks)} for a multiple of "
            f"{BLOCK} inputs, not {list(weight_scale.shape)}"
        )
    groups = 1 if weight_scale.shape == rowwise else blocks[1]
    check("x_scale", x_scale, x, shape=(tokens, groups), dtype=torch.float32)
    check("weight_scale", weight_scale, x, shape=weight_scale.shape, dtype=torch.float32)
    check("out", out, x, shape=(tokens, outputs))
    if bias is not None:
        check("bias", bias, x, shape=(outputs,))
    kernels_for(x).scaled_linear(x, x_scale, weight, weight_scale, bias, out)
    return out
