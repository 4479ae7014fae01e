"""Stored bytes into a parameter, a bounded piece at a time, so that loading needs no second copy.

Shared by the formats; knows neither names nor files.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from headrace.errors import CheckpointError

# Values decoded at a time: 4 MiB of float32. Smaller pieces mean more parallel regions, and each
# ends in a barrier that stalls when another process has one of the cores: with 2^16 values and a
# busy machine, 135 M parameters took seconds instead of 0.1 s.
_PIECE_VALUES = 1 << 20


def stream_into(
    out: torch.Tensor,
    raw: memoryview,
    *,
    block_size: int,
    block_bytes: int,
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Decode `raw` piece by piece into `out`, whose elements it holds in row-major order.

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
    step = max(1, _PIECE_VALUES // row_values)
    for start in range(0, rows, step):
        target = out[start : start + step]
        # A fresh bytearray: torch needs a writable, aligned buffer, the mapped file is neither.
        piece = bytearray(raw[start * row_bytes : (start + step) * row_bytes])
        blocks = torch.frombuffer(piece, dtype=torch.uint8).view(-1, block_bytes)
        target.copy_(decode(blocks).view(target.shape))


def check_shape(out: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raise CheckpointError unless `out` has the stored `shape`."""
    if tuple(out.shape) != shape:
        raise CheckpointError(
            f"{what} has the shape {shape}, the model expects {tuple(out.shape)}. "
            "The configuration and the weights do not belong together: download both again."
        )
