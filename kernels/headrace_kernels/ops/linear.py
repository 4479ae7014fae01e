"""Matrix product op: what it takes, what it promises, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """out = x @ weight.T + bias, accumulated in fp32.

    A batch-invariant kernel computes a row to the same bits in every batch whose T is a multiple
    of 8, to which callers pad; the native one and Triton's do so for every T.

    Args:
        x: [T, In], float32, bfloat16 or float16.
        weight: [Out, In] in the dtype of x.
        bias: [Out] in the dtype of x, or None.
        out: [T, Out]; in the dtype of x (also if None), or float32: then results are not rounded to
            that of x (the reference keeps 16 bits of mantissa for bfloat16).
    """
    shape = (x.shape[0], weight.shape[0])
    out = x.new_empty(shape) if out is None else out
    check("weight", weight, x, shape=(weight.shape[0], x.shape[1]), dtype=x.dtype)
    if bias is not None:
        check("bias", bias, x, shape=shape[1:], dtype=x.dtype)
    check("out", out, x, shape=shape, dtype=None if out.dtype == torch.float32 else x.dtype)
    kernels_for(x).linear(x, weight, bias, out)
    return out
