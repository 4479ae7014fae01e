"""Paged attention by the C++ kernel: hands it the metadata's tensors and scratch memory.

csrc/include/headrace/cpu/attention.h says how the work is cut and in which order sums are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.cpu.fallback import FLOATS, log_once
from headrace_kernels.cpu.scratch import scratch
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference import attention as reference

HEAD_DIMS = range(16, 257, 16)
PLAN_BYTES = 64
"""Of each request, at the beginning of the scratch memory."""
PARTIAL_BYTES = 16 << 20
"""For the partials of contexts that several threads share; committed as far as it is used. Where
it is full, one thread walks a whole context."""

_paged_attention = torch.ops.headrace.paged_attention.default


def declines(facts: KernelFacts) -> str | None:
    if facts.dtype not in FLOATS:
        return f"takes float32 and bfloat16, not {facts.dtype}"
    if facts.head_dim not in HEAD_DIMS:
        return f"takes head sizes up to 256 that are multiples of 16, not {facts.head_dim}"
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
    try:
        _paged_attention(
            q,
            kv_cache,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
            scale,
            sliding_window or 0,
            soft_cap or 0.0,
            scratch("paged_attention", scratch_bytes(len(metadata.kv_lens))),
            out,
        )
    except RuntimeError as refusal:
        log_once("paged_attention", str(refusal))
        reference.paged_attention(q, kv_cache, metadata, scale, sliding_window, soft_cap, out)


def scratch_bytes(num_requests: int) -> int:
    """Bytes that the op can use for a batch of so many requests, whatever their lengths."""
    return PARTIAL_BYTES + num_requests * PLAN_BYTES
