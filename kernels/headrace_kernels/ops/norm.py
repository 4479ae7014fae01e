"""RMSNorm ops: what they take, what they promise, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check, check_out


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32.

    Zhang and Sennrich, arXiv 1910.07467.

    Args:
        x: [..., E], any float dtype; of any strides.
        weight: [E], any float dtype.
        out: [..., E], any float dtype; like x if None. Or int8 or float8_e4m3fn [T, E], with
        out_scale: [T, G] float32: what ops/quantization.py makes of the fp32 result.
    """
    out = torch.empty_like(x) if out is None else out
    check("weight", weight, x, shape=x.shape[-1:])
    check_out(out, out_scale, x, shape=x.shape)
    kernels_for(x).rms_norm(x, weight, eps, out, out_scale)
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """residual += x, then out = rms_norm(residual). Mutates `residual`.

    Args:
        x: [T, E], any float dtype.
        residual: [T, E] float32, mutated.
        weight: [E], any float dtype.
        out: [T, E], any float dtype; like x if None. Or int8 or float8_e4m3fn, with
        out_scale: [T, G] float32: what ops/quantization.py makes of the fp32 result.
    """
    out = torch.empty_like(x) if out is None else out
    check("residual", residual, x, shape=x.shape, dtype=torch.float32)
    check("weight", weight, x, shape=x.shape[-1:])
    check_out(out, out_scale, x, shape=x.shape)
    kernels_for(x).add_rms_norm(x, residual, weight, eps, out, out_scale)
    return out
