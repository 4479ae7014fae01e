"""How the KV cache stores a page, the keys or values of P tokens of one head: as floats, or 8 bits.

A page of floats is [P, D]. A page of an 8-bit cache (int8, float8_e4m3fn) is [P, D] values and
behind them the float32 scales of its P tokens, P * (D + 4) bytes. Such a cache is a
[B, 2, K, P, D + 4] tensor, so that a block has its size and strides, and scales go where their
block goes; but a row of it is no token: values_and_scales tells where those are. (Values lie
together because a GPU's copy engine wants rows of multiples of 16 bytes. Scales are not fp16: keys
of more than 65,504 / 127 would have none.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.reference.quantization import LIMITS, quantize_rows

SCALE_BYTES = 4
EIGHT_BIT_DTYPES = frozenset(LIMITS)


def row_size(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that a token takes of a page, the last dimension of a cache.

    D of an 8-bit cache must be a multiple of 4, for the alignment of the scales.
    """
    if dtype not in EIGHT_BIT_DTYPES:
        return head_dim
    if head_dim % SCALE_BYTES:
        raise ValueError(f"an 8-bit KV cache takes heads of multiples of 4, not {head_dim}")
    return head_dim + SCALE_BYTES


def head_dim_of(kv_cache: Tensor) -> int:
    """D of a cache [B, 2, K, P, row_size(D, dtype)]."""
    size = kv_cache.shape[-1]
    return size - SCALE_BYTES if kv_cache.dtype in EIGHT_BIT_DTYPES else size


def values_and_scales(kv_cache: Tensor) -> tuple[Tensor, Tensor | None]:
    """Views of a cache [..., P, row_size(D, dtype)]: values [..., P, D], scales [..., P] float32.

    Floats are their own values and have no scales. The leading dimensions, [B, 2, K] of a layer's
    cache, may have any strides; 8-bit pages must be contiguous, and aligned to 4 bytes.
    """
    if kv_cache.dtype not in EIGHT_BIT_DTYPES:
        return kv_cache, None
    *leading, page_size, size = kv_cache.shape
    if kv_cache.stride()[-2:] != (size, 1):
        raise ValueError(f"8-bit pages must be contiguous, not of strides {kv_cache.stride()}")
    head_dim = size - SCALE_BYTES
    values = kv_cache.as_strided(
        (*leading, page_size, head_dim), (*kv_cache.stride()[:-2], head_dim, 1)
    )
    words = kv_cache.view(torch.float32)
    scales = words.as_strided(
        (*leading, page_size),
        (*words.stride()[:-2], 1),
        words.storage_offset() + page_size * head_dim // SCALE_BYTES,
    )
    return values, scales


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[..., D] floats -> values [..., D] of an 8-bit dtype and their scales [...] float32.

    They are those of ops/quantization.py with one scale a row.
    """
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    quantize_rows(rows, values.view(rows.shape), scales.view(-1, 1))
    return values, scales


def write_tokens(kv_cache: Tensor, slots: Tensor, keys_values: Tensor) -> None:
    """Store keys and values [N, 2, K, D] of N tokens at slots [N] int64, block * P + offset."""
    values, scales = values_and_scales(kv_cache)
    page_size = kv_cache.shape[-2]
    at = slots // page_size, slots % page_size
    if scales is None:
        values.permute(0, 3, 1, 2, 4)[at] = keys_values.to(values.dtype)
        return
    new_values, new_scales = quantize(keys_values, kv_cache.dtype)
    # As integers: torch does not do everything with 8-bit floats.
    values.permute(0, 3, 1, 2, 4).view(torch.int8)[at] = new_values.view(torch.int8)
    scales.permute(0, 3, 1, 2)[at] = new_scales


def to_pages(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., P, D] floats -> [..., P, row_size(D, dtype)]."""
    if dtype not in EIGHT_BIT_DTYPES:
        return x.to(dtype)
    pages = torch.empty((*x.shape[:-1], row_size(x.shape[-1], dtype)), dtype=dtype, device=x.device)
    values, scales = values_and_scales(pages)
    assert scales is not None
    new_values, new_scales = quantize(x, dtype)
    values.copy_(new_values)
    scales.copy_(new_scales)
    return pages


def from_pages(pages: Tensor) -> Tensor:
    """[..., P, row_size(D, dtype)] -> [..., P, D] float32: what attention computes with."""
    values, scales = values_and_scales(pages)
    return values.float() if scales is None else values.float() * scales.unsqueeze(-1)
