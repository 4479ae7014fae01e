"""Attention of requests with one query token by the CUDA C++ kernel; the others are Triton's.

Which are which is told on the device: a replayed graph runs both kernels, each on its own requests.
Where the host knows the step, a kernel without work is not launched.

Each kv head of a chunk of 512 tokens is read once for all its query heads, so time is that of
reading the cache: 64 requests x 4096 tokens of 8 heads x 128 in bf16 are 1.07 GB, 0.25 ms at 4.3
TB/s, and 0.02 ms of products at 790 TFLOP/s.

A row's bits depend on its own tokens only: chunks are counted from position 0, the four warps of a
chunk and then the chunks are folded in ascending order, by the same operations wherever that is
done. But the token's bits are not those that a prompt's kernel gives it, so that a request which is
preempted and computed again may go on otherwise: this is no candidate of the deterministic set.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.cpu.fallback import log_once
from headrace_kernels.cuda.fallback import other
from headrace_kernels.dispatch import KernelFacts

CHUNK = 512
"""Tokens, as in csrc/include/headrace/cuda/attention_plan.cuh."""
HEAD_DIMS = (64, 128)
PAGE_MULTIPLE = 16
PARTIAL_BYTES = 64 << 20
"""For the partials of contexts of several chunks: 64 x 16k tokens at 32 heads of 128. A context for
which there is no room is one block's, with the same result."""


def declines(facts: KernelFacts) -> str | None:
    if facts.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {facts.dtype}"
    if facts.head_dim not in HEAD_DIMS:
        return f"takes heads of 64 and 128, not {facts.head_dim}"
    if facts.page_size % PAGE_MULTIPLE:
        return f"takes pages of multiples of {PAGE_MULTIPLE} tokens, not {facts.page_size}"
    return None


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: Tensor,
) -> None:
    """See ops/attention.py."""
    args = (q, kv_cache, metadata, scale, sliding_window, soft_cap, out)
    attend = other("attention", "paged_attention")
    if not _may_have(metadata, lambda query_lens: query_lens == 1):
        attend(*args)
        return
    has_others = _may_have(metadata, lambda query_lens: query_lens > 1)
    if has_others and not takes_others():
        attend(*args)
        return
    try:
        decode(*args)
    except RuntimeError as refusal:
        log_once("paged_attention", str(refusal))
        attend(*args)
        return
    if has_others:
        attend(*args, skip_decodes=True)


def decode(
    q: Tensor,
    kv_cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: Tensor,
) -> None:
    """Attention of the requests that have one query token; rows of others are left as they are."""
    plan, partials = _plan(q, kv_cache, metadata, sliding_window)
    torch.ops.headrace_cuda.decode_attention(
        q,
        kv_cache,
        metadata.query_start_loc,
        metadata.block_table,
        plan,
        partials,
        scale,
        soft_cap or 0.0,
        out,
    )


def takes_others() -> bool:
    """Whether Triton is there, whose kernel leaves decodes out; the reference takes all or none."""
    return other("attention", "paged_attention").__module__.startswith("headrace_kernels.triton.")


def _may_have(metadata: AttentionMetadata, wanted: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether some request has such a number of query tokens; in a captured graph any may."""
    query_lens = metadata.query_lens
    known = len(query_lens) == len(metadata.seq_lens)
    return not known or bool(wanted(query_lens).any())


def _plan(
    q: Tensor, kv_cache: Tensor, metadata: AttentionMetadata, window: int | None
) -> tuple[Tensor, Tensor]:
    """The step's work list and memory for its partials, which all layers of a kind share."""
    heads, head_dim = q.shape[1:]
    page_size = kv_cache.shape[3]
    key = ("cuda", heads, head_dim, page_size, window)
    if key not in metadata.plans:
        requests, max_blocks = metadata.block_table.shape
        chunks = -(-max_blocks * page_size // CHUNK)
        if window is not None:
            chunks = min(chunks, -(-window // CHUNK) + 1)
        room = PARTIAL_BYTES // (4 * heads * (head_dim + 2))
        capacity = min(room, requests * chunks) if chunks > 1 else 0
        ops = torch.ops.headrace_cuda
        plan = q.new_empty(ops.decode_plan_bytes(capacity, requests), dtype=torch.uint8)
        partials = q.new_empty(capacity * heads * (head_dim + 2), dtype=torch.float32)
        ops.plan_decode(metadata.query_start_loc, metadata.seq_lens, window or 0, capacity, plan)
        metadata.plans[key] = plan, partials
    found: tuple[Tensor, Tensor] = metadata.plans[key]
    return found
