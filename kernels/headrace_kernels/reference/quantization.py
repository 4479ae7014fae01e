"""Quantization of activations in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What the largest value of a group becomes."""


def quantize_rows(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """See ops/quantization.py."""
    groups = x.float().view(*scale.shape, x.shape[-1] // scale.shape[-1])
    largest = groups.abs().amax(-1, keepdim=True)
    limit = torch.full_like(largest, LIMITS[out.dtype])
    # Not a number divided by a tensor: torch multiplies by a reciprocal then, which rounds twice.
    factor = torch.where(largest > 0, limit / largest, 0.0)
    values = (groups * factor).nan_to_num(0.0).clamp(-limit, limit)
    if out.dtype == torch.int8:
        values = values.round()
    out.copy_(values.flatten(-2).to(out.dtype))
    scale.copy_(torch.where(largest.isfinite(), largest / limit, float("nan")).squeeze(-1))
