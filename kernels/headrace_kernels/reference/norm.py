"""RMS normalisation in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.reference.quantization import quantize_rows


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, out_scale: Tensor | None = None
) -> None:
    """See ops/norm.py."""
    x = x.float()
    mean_square = (x * x).mean(-1, keepdim=True)
    normed = x * torch.rsqrt(mean_square.add_(eps))
    if out_scale is None:
        torch.mul(normed, weight, out=out)
    else:
        quantize_rows(normed * weight, out, out_scale)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    out_scale: Tensor | None = None,
) -> None:
    """See ops/norm.py."""
    residual.add_(x)
    rms_norm(residual, weight, eps, out, out_scale)
