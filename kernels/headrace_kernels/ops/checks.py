"""The argument checks that the public ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check(
    name: str,
    tensor: Tensor,
    like: Tensor,
    *,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ValueError unless `tensor` has this shape, this dtype and the device of `like`."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, not on {tensor.device}")
    if dtype is None:
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be of a float dtype, not {tensor.dtype}")
    elif tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")


def check_cache(kv_cache: Tensor, like: Tensor, *, shape: Sequence[int]) -> None:
    """Raise ValueError unless this is a KV cache of this shape, of floats or 8 bits."""
    dtype = torch.int8 if kv_cache.dtype == torch.int8 else None
    check("kv_cache", kv_cache, like, shape=shape, dtype=dtype)
