"""The attention op: what it takes, what it promises, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.dispatch import kernels_for
from headrace_kernels.kv_format import row_size
from headrace_kernels.ops.checks import check, check_cache

__all__ = ["AttentionMetadata", "paged_attention"]


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention of each request's newest tokens over its cached K and V.

    The query tokens of request r are its last query_lens[r] positions; their K and V are in the
    cache already. Head h of q reads kv head h // (H / K). Softmax and sums are fp32. A
    batch-invariant kernel computes a row to the same bits alone, in any batch and in any chunking.
    A request of no query tokens is padding: nothing is read or written for it.

    Args:
        q: [T, H, D], H a multiple of K.
        kv_cache: [B, 2, K, P, D], or int8 or float8_e4m3fn [B, 2, K, P, D + 4] (kv_format.py): K
            and V of a block, each head's page contiguous. Of tokens that do not exist it may hold
            anything, NaN included.
        metadata: lengths and block tables; one for all layers of a step.
        scale: factor on the products of q and k.
        sliding_window: a token sees so many tokens, itself included; None for all before it.
        soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2, arXiv 2408.00118).
        out: [T, H, D]; like q if None. Rows of padding become 0.
    """
    tokens, num_heads, head_dim = q.shape
    blocks, _, num_kv_heads, page_size, _ = kv_cache.shape
    page = (page_size, row_size(head_dim, kv_cache.dtype))
    out = torch.empty_like(q) if out is None else out
    check("out", out, q, shape=q.shape)
    check_cache(kv_cache, q, shape=(blocks, 2, num_kv_heads, *page))
    check("slot_mapping", metadata.slot_mapping, q, shape=(tokens,), dtype=torch.int64)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads of q cannot share {num_kv_heads} heads of the cache")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, not {sliding_window}")
    kernels_for(q, kv_cache).paged_attention(
        q, kv_cache, metadata, scale, sliding_window, soft_cap, out
    )
    return out
