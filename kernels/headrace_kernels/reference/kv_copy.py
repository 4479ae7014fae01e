"""Copies of KV blocks in plain torch."""

from __future__ import annotations

from torch import Tensor


def copy_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    """See ops/kv_copy.py."""
    pairs = pairs[(pairs >= 0).all(1)]
    source, target = pairs.unbind(1)
    blocks = src.index_select(0, source.to(src.device))
    dst.index_copy_(0, target.to(dst.device), blocks.to(dst.device))
