"""The argument checks that the public ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace_kernels.reference.quantization import LIMITS


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


def check_out(out: Tensor, out_scale: Tensor | None, like: Tensor, *, shape: Sequence[int]) -> None:
    """Raise ValueError unless `out` is of floats, or of 8 bits and has scales beside it."""
    if out_scale is None:
        if out.dtype in LIMITS:
            raise ValueError(f"out of {out.dtype} needs an out_scale")
        check("out", out, like, shape=shape)
    elif out.dtype not in LIMITS:
        raise ValueError(f"out with an out_scale must be int8 or float8_e4m3fn, not {out.dtype}")
    else:
        check("out", out, like, shape=shape, dtype=out.dtype)
        check_scale("out_scale", out_scale, out)


def check_scale(name: str, scale: Tensor, rows: Tensor) -> None:
    """Raise ValueError unless these are scales [T, G] of rows [T, In], G a divisor of In."""
    if rows.ndim != 2:
        raise ValueError(f"{name} is of rows [T, In], not of {list(rows.shape)}")
    if scale.ndim != 2 or scale.shape[1] == 0 or rows.shape[1] % scale.shape[1]:
        raise ValueError(
            f"{name} must be [T, G] with G a divisor of {rows.shape[1]}, not {list(scale.shape)}"
        )
    check(name, scale, rows, shape=(len(rows), scale.shape[1]), dtype=torch.float32)


def check_cache(kv_cache: Tensor, like: Tensor, *, shape: Sequence[int]) -> None:
    """Raise ValueError unless this is a KV cache of this shape, of floats or 8 bits."""
    dtype = torch.int8 if kv_cache.dtype == torch.int8 else None
    check("kv_cache", kv_cache, like, shape=shape, dtype=dtype)
