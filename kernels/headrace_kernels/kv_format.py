"""How a row of the KV cache, the K or V of one token and head, is stored: floats, or int8.

A row of an int8 cache is D integers and behind them their float32 scale: a [B, 2, K, P, D + 4] int8
tensor, so that one stride tells where a row is, and scales go where their block goes. (fp16 would
save 2 bytes of 68, and keys of more than 65,504 / 127 would have no scale.)
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
INT8_LIMIT = 127.0


def row_size(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row, the last dimension of a cache."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def head_dim_of(kv_cache: Tensor) -> int:
    """D of a cache [B, 2, K, P, row_size(D, dtype)]."""
    size = kv_cache.shape[-1]
    return size - SCALE_BYTES if kv_cache.dtype == torch.int8 else size


def to_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D] floats -> [..., row_size(D, dtype)].

    int8 values are x * (127 / max|x|), rounded to nearest, ties to even; their scale is
    max|x| / 127, NaN if any of x is NaN or infinite.
    """
    if dtype != torch.int8:
        return x.to(dtype)
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    # Not INT8_LIMIT / largest: torch multiplies a reciprocal then, which rounds twice.
    factor = torch.where(largest > 0, torch.full_like(largest, INT8_LIMIT) / largest, 0.0)
    integers = (x * factor).nan_to_num(0.0).round().clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8)
    scale = torch.where(largest.isfinite(), largest / INT8_LIMIT, float("nan"))
    return torch.cat((integers, scale.view(torch.int8)), dim=-1)


def from_rows(rows: Tensor) -> Tensor:
    """[..., row_size(D, dtype)] -> [..., D] float32: what attention computes with."""
    if rows.dtype != torch.int8:
        return rows.float()
    head_dim = rows.shape[-1] - SCALE_BYTES
    scale = rows[..., head_dim:].contiguous().view(torch.float32)
    return rows[..., :head_dim].float() * scale
