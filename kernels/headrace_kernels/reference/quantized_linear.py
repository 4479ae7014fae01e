"""Products of packed weights with activations of 8 or 16 bits in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.packed_format import GROUP, PackedFormat
from headrace_kernels.packed_weight import unpack, unpack_rows

LOWEST, HIGHEST = -128, 127
SMALLEST_RANGE, LARGEST_RANGE = 1e-30, 3e38


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, In] -> q - z as float32 [T, In / 32, 32], and the scales s [T, In / 32, 1] float32.

    A scale is NaN where the group has a value that is not finite.
    """
    values = x.float().reshape(len(x), x.shape[1] // GROUP, GROUP)
    lowest = values.amin(-1, keepdim=True).clamp(max=0.0)
    highest = values.amax(-1, keepdim=True).clamp(min=0.0)
    extent = highest - lowest
    finite = extent < LARGEST_RANGE
    # Of tensors: a Python number over a tensor would be its reciprocal times the number.
    quotient = torch.full_like(extent, 255.0) / extent
    inverse = torch.where(finite & (extent > SMALLEST_RANGE), quotient, 0.0)
    zero_point = LOWEST - (lowest * inverse).round()
    q = ((values * inverse).round() + zero_point).clamp(LOWEST, HIGHEST)
    return q - zero_point, torch.where(finite, extent / 255.0, torch.nan)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    fmt: PackedFormat,
    activation_bits: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """See ops/quantized_linear.py."""
    if activation_bits == 8:
        integers, scale = quantize_activations(x)
        rounded = (integers * scale).flatten(1)
    else:
        rounded = x.bfloat16().float()
    product = rounded @ unpack(weight, fmt)[: out.shape[1]].t()
    out.copy_(product if bias is None else product.add_(bias))


def quantized_embedding(token_ids: Tensor, weight: Tensor, fmt: PackedFormat, out: Tensor) -> None:
    """See ops/quantized_linear.py."""
    out.copy_(unpack_rows(weight, fmt, token_ids))
