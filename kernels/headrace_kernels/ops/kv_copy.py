"""The op that copies and swaps KV blocks: what it takes, what it promises, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for


def copy_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    """dst[pairs[i, 1]] = src[pairs[i, 0]] for each i; a pair with a negative number is padding.

    Within one pool (a block that two requests share gets its own copy), or between a pool on a GPU
    and one in pinned host memory (swapping). Nothing waits for the copies: they are in the order of
    the current stream, and host memory may be read or freed once that has passed.

    Args:
        src: [B1, ...], blocks contiguous, of any dtype.
        dst: [B2, ...] of the same shape behind B2 and the same dtype, on the same device or one of
            the two on the CPU; may be `src`. No block of it is named twice, and none that is copied
            from in the same call.
        pairs: [N, 2] int64, on the CPU, or on the device of both. There only negative numbers and
            those beyond a pool are skipped, on the CPU the latter raise.
    """
    if src.shape[1:] != dst.shape[1:] or src.dtype != dst.dtype:
        raise ValueError(
            f"blocks of dst must be {src.dtype} {list(src.shape[1:])} as those of src, "
            f"not {dst.dtype} {list(dst.shape[1:])}"
        )
    if src.device != dst.device and "cpu" not in (src.device.type, dst.device.type):
        raise ValueError(f"src on {src.device} and dst on {dst.device}: one must be on the CPU")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs must be int64 [N, 2], not {pairs.dtype} {list(pairs.shape)}")
    if pairs.device.type != "cpu" and not pairs.device == src.device == dst.device:
        raise ValueError(f"pairs must be on the CPU, or where src and dst are, not {pairs.device}")
    if pairs.device.type == "cpu" and len(pairs):
        source, target = pairs.amax(0).tolist()
        if source >= len(src) or target >= len(dst):
            raise ValueError(
                f"pairs name blocks {source} of {len(src)} and {target} of {len(dst)}: "
                "they must be below the sizes of the pools"
            )
    kernels_for(dst if src.device.type == "cpu" else src).copy_blocks(src, dst, pairs)
