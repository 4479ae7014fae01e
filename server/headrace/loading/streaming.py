"""Stored bytes into a parameter, a bounded piece at a time, so that loading needs no second copy.

Shared by the formats; knows neither names nor files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NoReturn

import torch

from headrace.errors import CheckpointError

# Values decoded at a time: 4 MiB of float32. Smaller pieces mean more parallel regions, and each
# ends in a barrier that stalls when another process has one of the cores: with 2^16 values and a
# busy machine, 135 M parameters took seconds instead of 0.1 s.
_PIECE_VALUES = 1 << 20
# For another device, where each piece costs a copy and a wait.
_DEVICE_PIECE_VALUES = 1 << 24


def stream_into(
    out: torch.Tensor,
    raw: memoryview,
    *,
    block_size: int,
    block_bytes: int,
    decode: Callable[[torch.Tensor], torch.Tensor],
    what: str,
) -> None:
    """Decode `raw` piece by piece into `out`, whose elements it holds in row-major order.

    Bytes are copied to the device of `out` as they are, and decoded there.

    Raises CheckpointError, which begins with `what`, for a value that is not finite.

    out: any float dtype, strides and device; converted by `copy_`.
    raw: `out.numel() / block_size * block_bytes` bytes, at any alignment.
    decode: `[blocks, block_bytes] uint8 -> [blocks, block_size]` values.
    """
    if out.numel() == 0:
        return
    if out.ndim == 0:
        out = out.unsqueeze(0)
    row_values = out[0].numel()
    if row_values % block_size:
        # Blocks run across rows (a one-dimensional quantized tensor): small, taken at once.
        rows, row_values = 1, out.numel()
        out = out.unsqueeze(0)
    else:
        rows = len(out)
    row_bytes = row_values // block_size * block_bytes
    piece_values = _PIECE_VALUES if out.device.type == "cpu" else _DEVICE_PIECE_VALUES
    step = max(1, piece_values // row_values)
    for start in range(0, rows, step):
        target = out[start : start + step]
        stored = bytes_on(out.device, raw[start * row_bytes : (start + step) * row_bytes])
        blocks = stored.view(-1, block_bytes)
        values = decode(blocks).view(target.shape)
        target.copy_(values)
        # NaN and infinity stay in a sum, which takes a thirtieth of isfinite's time. It may also
        # overflow: only then are the values looked at.
        if not target.sum().isfinite() and not target.isfinite().all():
            _refuse_values(values, out.dtype, what)


def bytes_on(device: torch.device, raw: memoryview) -> torch.Tensor:
    """A copy of mapped bytes, aligned and writable: uint8, one dimension."""
    if len(raw) == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    with warnings.catch_warnings():
        # That it must not be written; it is only copied, and once less than through a bytearray.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(raw, dtype=torch.uint8).to(device)


def _refuse_values(values: torch.Tensor, dtype: torch.dtype, what: str) -> NoReturn:
    if values.isfinite().all():
        raise CheckpointError(
            f"{what} has the value {values.abs().max().item():.4g}, too large for {dtype}. "
            "Use --dtype float32 or bfloat16."
        )
    raise CheckpointError(
        f"{what} has values that are not finite (NaN or infinity): the file is corrupt, or its "
        "training diverged. Download it again, or use another checkpoint."
    )


def check_shape(out: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raise CheckpointError unless `out` has the stored `shape`."""
    if tuple(out.shape) != shape:
        raise CheckpointError(
            f"{what} has the shape {shape}, the model expects {tuple(out.shape)}. "
            "The configuration and the weights do not belong together: download both again."
        )
