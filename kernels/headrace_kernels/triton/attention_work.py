"""What paged attention has to do in a step, as a list made on the device: items, and rows to fold.

The host's lengths are stale in a replayed CUDA graph, so everything here comes from device tensors
and every size from shapes. One program per request sums over the requests before it and writes its
own entries: O(R^2) reads of a few KB, once per step, and no program waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from headrace_kernels.attention_metadata import AttentionMetadata

ITEM_FIELDS = tl.constexpr(8)
"""Request, first query row, query rows, cached tokens, block, first chunk, last + 1, first partial.

The partial is that of the request's first row in this chunk, or -1: the item makes the output.
"""
FOLD_FIELDS = tl.constexpr(4)
"""Token, its first partial row, rows between the partials of a row, their number."""
PARTIAL_BYTES = 64 << 20
"""Enough for 64 x 16k tokens at 32 heads of 128; requests beyond it are not split."""
MAX_SPLIT_BLOCKS = tl.constexpr(16)
"""A request of more blocks of rows fills a GPU without being split."""
REQUESTS = tl.constexpr(256)
"""How many requests a program looks at a time."""


@dataclass(frozen=True, slots=True)
class WorkList:
    """Buffers that the layers of a step share."""

    counts: Tensor
    """[3] int32: items of each kv head, tokens to fold, tokens that are no padding."""
    items: Tensor
    """[bound, ITEM_FIELDS] int32. Unsplit ones first, the longest of a request first."""
    folds: Tensor
    """[T, FOLD_FIELDS] int32: the tokens of split requests."""
    partial: Tensor
    """[rows, K, D] float32: unnormalized outputs of a chunk."""
    partial_stats: Tensor
    """[rows, K, 2] float32: a row's largest score in a chunk, in log2, and its norm."""
    totals: Tensor
    """[programs, 2, block rows, D padded] float32: chunks of an item so far, and one more."""
    total_stats: Tensor
    """[programs, 4, block rows] float32."""


def make_work_list(
    metadata: AttentionMetadata,
    *,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    block_rows: int,
    chunk: int,
    programs: int,
    sliding_window: int | None,
    skip_decodes: bool = False,
) -> WorkList:
    """Launch the making of the list; sizes are upper bounds by shapes, at most PARTIAL_BYTES.

    `skip_decodes`: requests of one query token are another kernel's.
    """
    requests, max_blocks = metadata.block_table.shape
    group = num_heads // num_kv_heads
    max_chunks = -(-max_blocks * page_size // chunk)
    if sliding_window is not None:
        max_chunks = min(max_chunks, -(-sliding_window // chunk) + 1 + MAX_SPLIT_BLOCKS.value)
    active = min(requests, num_tokens)
    rows = min(
        num_tokens * group * max_chunks if max_chunks > 1 else 0,
        PARTIAL_BYTES // (4 * num_kv_heads * (head_dim + 2)),
    )
    split_items = rows // block_rows + min(rows // group, active * max_chunks)
    bound = num_tokens * group // block_rows + active + split_items
    device = metadata.seq_lens.device

    def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty((max(shape[0], 1), *shape[1:]), dtype=dtype, device=device)

    work = WorkList(
        counts=buffer(3),
        items=buffer(bound, ITEM_FIELDS.value),
        folds=buffer(num_tokens, FOLD_FIELDS.value),
        partial=buffer(rows, num_kv_heads, head_dim, dtype=torch.float32),
        partial_stats=buffer(rows, num_kv_heads, 2, dtype=torch.float32),
        totals=buffer(programs, 2, block_rows, next_power_of_2(head_dim), dtype=torch.float32),
        total_stats=buffer(programs, 4, block_rows, dtype=torch.float32),
    )
    list_work_kernel[(requests,)](
        metadata.query_start_loc,
        metadata.seq_lens,
        work.counts,
        work.items,
        work.folds,
        requests,
        rows,
        sliding_window or 0,
        **work_constants(group, block_rows, chunk, skip_decodes),
    )
    return work


def work_constants(
    group: int, block_rows: int, chunk: int, skip_decodes: bool = False
) -> dict[str, int]:
    """The constexpr arguments of list_work_kernel."""
    return {
        "GROUP": group,
        "BLOCK_ROWS": block_rows,
        "CHUNK": chunk,
        "MIN_TOKENS": 2 if skip_decodes else 1,
    }


@triton.jit
def _chunks_of(query_len, seq_len, window, CHUNK: tl.constexpr):
    """The first chunk that the request's first row sees, and how many from there to its end."""
    hidden = tl.where(window > 0, tl.maximum(seq_len - query_len - window + 1, 0), 0)
    first = hidden // CHUNK
    return first, (seq_len + CHUNK - 1) // CHUNK - first


@triton.jit
def _demand(query_len, chunks, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Blocks of query rows, and the partial rows of a request worth splitting, else 0."""
    blocks = (query_len * GROUP + BLOCK_ROWS - 1) // BLOCK_ROWS
    worth = (chunks > 1) & (blocks <= MAX_SPLIT_BLOCKS)
    return blocks, tl.where(worth, query_len.to(tl.int64) * GROUP * chunks, 0)


@triton.jit(do_not_specialize=["num_requests", "partial_rows", "window"])
def list_work_kernel(
    query_start_loc, seq_lens, counts, items, folds, num_requests, partial_rows, window,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr, MIN_TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes the entries of request program_id(0) behind those of the requests before it.

    A request is split if its partial rows and those of all before it that want some fit.
    """
    own = tl.program_id(0)
    wanted_until_here = tl.zeros((), tl.int64)
    partials = tl.zeros((), tl.int64)
    whole_items = 0
    whole_before = 0
    split_before = 0
    tokens_before = 0
    split_items = 0
    split_tokens = 0
    for first in range(0, num_requests, REQUESTS):
        request = first + tl.arange(0, REQUESTS)
        exists = request < num_requests
        begin = tl.load(query_start_loc + request, mask=exists, other=0)
        query_len = tl.load(query_start_loc + request + 1, mask=exists, other=0) - begin
        query_len = tl.where(query_len >= MIN_TOKENS, query_len, 0)
        seq_len = tl.load(seq_lens + request, mask=exists & (query_len > 0), other=0)
        _, chunks = _chunks_of(query_len, seq_len, window, CHUNK)
        blocks, wanted = _demand(query_len, chunks, GROUP, BLOCK_ROWS)
        until = wanted_until_here + tl.cumsum(wanted, 0)
        split = (wanted > 0) & (until <= partial_rows)
        before = request < own
        whole = tl.where(split, 0, blocks)
        parts = tl.where(split, blocks * chunks, 0)
        tokens = tl.where(split, query_len, 0)
        whole_items += tl.sum(whole, 0)
        split_items += tl.sum(parts, 0)
        split_tokens += tl.sum(tokens, 0)
        whole_before += tl.sum(tl.where(before, whole, 0), 0)
        split_before += tl.sum(tl.where(before, parts, 0), 0)
        tokens_before += tl.sum(tl.where(before, tokens, 0), 0)
        partials += tl.sum(tl.where(before, wanted, 0), 0)
        wanted_until_here += tl.sum(wanted, 0)
    if own == 0:
        tl.store(counts, whole_items + split_items)
        tl.store(counts + 1, split_tokens)
        tl.store(counts + 2, tl.load(query_start_loc + num_requests))
    begin = tl.load(query_start_loc + own)
    query_len = tl.load(query_start_loc + own + 1) - begin
    if query_len >= MIN_TOKENS:
        seq_len = tl.load(seq_lens + own)
        first_chunk, chunks = _chunks_of(query_len, seq_len, window, CHUNK)
        blocks, wanted = _demand(query_len, chunks, GROUP, BLOCK_ROWS)
        split = (wanted > 0) & (partials + wanted <= partial_rows)
        _write_items(
            items + tl.where(split, whole_items + split_before, whole_before) * ITEM_FIELDS,
            own, begin, query_len, seq_len, blocks, first_chunk, chunks, split, partials, GROUP,
        )  # fmt: skip
        if split:
            _write_folds(
                folds + tokens_before * FOLD_FIELDS, begin, query_len, chunks, partials, GROUP
            )


@triton.jit
def _write_items(
    to, request, begin, query_len, seq_len, blocks, first_chunk, chunks, split, partials,
    GROUP: tl.constexpr,
):  # fmt: skip
    """ITEM_FIELDS of each item. The last block of rows, which sees the most, comes first."""
    parts = tl.where(split, chunks, 1)
    for first in range(0, blocks * parts, REQUESTS):
        item = first + tl.arange(0, REQUESTS)
        exists = item < blocks * parts
        part = item % parts
        chunk = first_chunk + part
        partial = partials.to(tl.int32) + part * query_len * GROUP
        at = to + item * ITEM_FIELDS
        tl.store(at, request, mask=exists)
        tl.store(at + 1, begin, mask=exists)
        tl.store(at + 2, query_len * GROUP, mask=exists)
        tl.store(at + 3, seq_len, mask=exists)
        tl.store(at + 4, blocks - 1 - item // parts, mask=exists)
        tl.store(at + 5, tl.where(split, chunk, first_chunk), mask=exists)
        tl.store(at + 6, tl.where(split, chunk + 1, first_chunk + chunks), mask=exists)
        tl.store(at + 7, tl.where(split, partial, -1), mask=exists)


@triton.jit
def _write_folds(to, begin, query_len, chunks, partials, GROUP: tl.constexpr):
    """FOLD_FIELDS of each token of a split request."""
    for first in range(0, query_len, REQUESTS):
        token = first + tl.arange(0, REQUESTS)
        exists = token < query_len
        at = to + token * FOLD_FIELDS
        tl.store(at, begin + token, mask=exists)
        tl.store(at + 1, partials.to(tl.int32) + token * GROUP, mask=exists)
        tl.store(at + 2, tl.zeros_like(token) + query_len * GROUP, mask=exists)
        tl.store(at + 3, tl.zeros_like(token) + chunks, mask=exists)
