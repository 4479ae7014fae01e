"""Products of 8-bit rows with 8-bit weights in plain torch."""

from __future__ import annotations

from torch import Tensor

BLOCK = 128
"""Inputs, and outputs, that share a scale of block-scaled weights."""


def scaled_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """See ops/scaled_linear.py."""
    rows = x.float().view(*x_scale.shape, -1) * x_scale.unsqueeze(-1)
    scale = weight_scale
    if weight_scale.shape != (len(weight), 1):
        scale = weight_scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        scale = scale[: weight.shape[0], : weight.shape[1]]
    product = rows.flatten(-2) @ (weight.float() * scale).t()
    out.copy_(product if bias is None else product + bias)
