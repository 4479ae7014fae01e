"""RMS normalisation in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See ops/norm.py."""
    x = x.float()
    mean_square = (x * x).mean(-1, keepdim=True)
    normed = x * torch.rsqrt(mean_square.add_(eps))
    torch.mul(normed, weight, out=out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See ops/norm.py."""
    residual.add_(x)
    rms_norm(residual, weight, eps, out)
