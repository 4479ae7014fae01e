"""The kernels of paged attention: a persistent one over the items of a work list, and the fold.

An item of one chunk stores a partial, which fold_kernel adds up; an item of several chunks folds
them itself. Both do the same in the same order: a row's bits do not depend on which it was, nor on
the other rows of its block, nor on the program that took the item.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace_kernels.triton.attention_tile import (
    NEGATIVE_INFINITY,
    attend_chunk,
    fold,
    normalized,
)
from headrace_kernels.triton.attention_work import FOLD_FIELDS, ITEM_FIELDS

SLICE = tl.constexpr(16)
"""Rows that are folded in memory at a time."""


@triton.jit
def _fold_into_total(
    item, total, total_stats, m, norm, acc, is_first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Fold a chunk into what the program keeps in memory of the chunks before, SLICE rows a time.

    Rare enough to go through memory: a second accumulator would take registers in every tile.
    """
    # A zero that no compiler knows, lest it computes these addresses ahead of all loops.
    own = tl.load(item + 7, volatile=True) + 1 + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    tl.store(total_stats + 2 * ROWS + own, m)
    tl.store(total_stats + 3 * ROWS + own, norm)
    tl.store(total + (ROWS + own)[:, None] * BLOCK_D + dims[None, :], acc)
    tl.debug_barrier()
    for first in tl.range(0, ROWS, SLICE, num_stages=1):
        rows = first + tl.arange(0, SLICE)
        before = (rows >= 0) & (is_first == 0)
        at_m = total_stats + rows
        at = total + rows[:, None] * BLOCK_D + dims[None, :]
        all_m = tl.load(at_m, mask=before, other=NEGATIVE_INFINITY)
        all_norm = tl.load(at_m + ROWS, mask=before, other=0.0)
        all_acc = tl.load(at, mask=before[:, None], other=0.0)
        chunk_m = tl.load(at_m + 2 * ROWS)
        chunk_norm = tl.load(at_m + 3 * ROWS)
        chunk_acc = tl.load(at + ROWS * BLOCK_D)
        all_m, all_norm, all_acc = fold(all_m, all_norm, all_acc, chunk_m, chunk_norm, chunk_acc)
        tl.store(at_m, all_m)
        tl.store(at_m + ROWS, all_norm)
        tl.store(at, all_acc)
    tl.debug_barrier()


@triton.jit
def _store_total(
    item, head, total, total_stats, out, out_stride, out_head_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """The output of an item of several chunks, which the program keeps in memory."""
    query_begin = tl.load(item + 1, volatile=True).to(tl.int64)
    num_rows = tl.load(item + 2, volatile=True)
    first_row = tl.load(item + 4, volatile=True) * ROWS
    dims = tl.arange(0, BLOCK_D)
    for first in tl.range(0, ROWS, SLICE, num_stages=1):
        rows = first + tl.arange(0, SLICE)
        norm = tl.load(total_stats + ROWS + rows)
        acc = tl.load(total + rows[:, None] * BLOCK_D + dims[None, :])
        rows += first_row
        at = (query_begin + rows // GROUP) * (out_stride * UNIT)
        at += (head * GROUP + rows % GROUP) * (out_head_stride * UNIT)
        exists = (rows < num_rows)[:, None] & (dims < D)[None, :]
        result = normalized(norm, acc).to(out.dtype.element_ty)
        tl.store(out + at[:, None] + dims[None, :], result, mask=exists)
    tl.debug_barrier()


@triton.jit
def _do_item(
    item, head, q, boxes, cache, scales, block_table, out, partial, partial_stats,
    total, total_stats,
    q_stride, q_head_stride, out_stride, out_head_stride,
    stride_block, stride_kv, stride_head, scale_stride_block, scale_stride_kv, scale_stride_head,
    table_stride, window, score_scale, cap_scale, cap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    UNIT: tl.constexpr, CACHE_UNIT: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One item of the list for one kv head. Its rows are (query token, head of the group) pairs."""
    request = tl.load(item).to(tl.int64)
    query_begin = tl.load(item + 1).to(tl.int64)
    num_rows = tl.load(item + 2)
    seq_len = tl.load(item + 3)
    first_row = tl.load(item + 4) * ROWS
    first_chunk = tl.load(item + 5)
    end_chunk = tl.load(item + 6)
    rows = first_row + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    exists = (rows < num_rows)[:, None] & (dims < D)[None, :]
    tokens = query_begin + rows // GROUP
    heads = head * GROUP + rows % GROUP
    history = seq_len - num_rows // GROUP
    at = tokens * (q_stride * UNIT) + heads * (q_head_stride * UNIT)
    queries = tl.load(q + at[:, None] + dims[None, :], mask=exists, other=0.0)
    last_row = tl.minimum(first_row + ROWS, num_rows) - 1
    first_position = history + first_row // GROUP
    last_position = history + last_row // GROUP
    if WINDOWED:
        first_chunk = tl.maximum(first_chunk, (first_position - window + 1) // CHUNK)
    end_chunk = tl.minimum(end_chunk, last_position // CHUNK + 1)
    m = tl.full((ROWS,), NEGATIVE_INFINITY, tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for chunk in tl.range(first_chunk, end_chunk, num_stages=1):
        m, norm, acc = attend_chunk(
            queries, history + rows // GROUP, first_position, last_position, chunk,
            seq_len, window, score_scale, cap_scale, cap,
            boxes, cache, scales, block_table + request * table_stride,
            head * stride_head, head * stride_head + stride_kv, stride_block,
            head * scale_stride_head, head * scale_stride_head + scale_stride_kv,
            scale_stride_block,
            ROWS, PAGE, D, BLOCK_D, TILE, CHUNK, CACHE_UNIT, BY_DESCRIPTOR,
            WINDOWED, CAPPED, SCALED,
        )  # fmt: skip
        if end_chunk - first_chunk > 1:
            _fold_into_total(
                item, total, total_stats, m, norm, acc, chunk == first_chunk, ROWS, BLOCK_D
            )
    if end_chunk - first_chunk > 1:
        _store_total(
            item, head, total, total_stats, out, out_stride, out_head_stride,
            GROUP, ROWS, D, BLOCK_D, UNIT,
        )  # fmt: skip
    else:
        _store_state(
            item, head, m, norm, acc, out, partial, partial_stats, out_stride, out_head_stride,
            KV_HEADS, GROUP, ROWS, D, BLOCK_D, UNIT,
        )  # fmt: skip


@triton.jit
def _store_state(
    item, head, m, norm, acc, out, partial, partial_stats, out_stride, out_head_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The output of an item of all chunks, or the partial of one.

    Fields are read again, volatile, lest addresses take registers while the tiles are walked.
    """
    query_begin = tl.load(item + 1, volatile=True).to(tl.int64)
    num_rows = tl.load(item + 2, volatile=True)
    rows = tl.load(item + 4, volatile=True) * ROWS + tl.arange(0, ROWS)
    first_partial = tl.load(item + 7, volatile=True)
    dims = tl.arange(0, BLOCK_D)
    exists = (rows < num_rows)[:, None] & (dims < D)[None, :]
    if first_partial < 0:
        at = (query_begin + rows // GROUP) * (out_stride * UNIT)
        at += (head * GROUP + rows % GROUP) * (out_head_stride * UNIT)
        result = normalized(norm, acc).to(out.dtype.element_ty)
        tl.store(out + at[:, None] + dims[None, :], result, mask=exists)
    else:
        row = (first_partial + rows) * KV_HEADS + head
        tl.store(partial + row[:, None] * D + dims[None, :], acc, mask=exists)
        tl.store(partial_stats + row * 2, m, mask=rows < num_rows)
        tl.store(partial_stats + row * 2 + 1, norm, mask=rows < num_rows)


@triton.jit(do_not_specialize=[
    "q_stride", "q_head_stride", "out_stride", "out_head_stride",
    "stride_block", "stride_kv", "stride_head",
    "scale_stride_block", "scale_stride_kv", "scale_stride_head", "table_stride", "window",
])  # fmt: skip
def attention_kernel(
    counts, items, q, boxes, cache, scales, block_table, out, partial, partial_stats,
    totals, total_stats,
    q_stride: tl.int64, q_head_stride: tl.int64, out_stride: tl.int64, out_head_stride: tl.int64,
    stride_block: tl.int64, stride_kv: tl.int64, stride_head: tl.int64,
    scale_stride_block: tl.int64, scale_stride_kv: tl.int64, scale_stride_head: tl.int64,
    table_stride: tl.int64, window, score_scale, cap_scale, cap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    UNIT: tl.constexpr, CACHE_UNIT: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Every program takes an item of each round, forwards and backwards in turn.

    The list falls in cost where costs differ much, so that this levels what programs have to do.
    """
    count = tl.load(counts) * KV_HEADS
    programs = tl.num_programs(0)
    for begin in tl.range(0, count, programs, num_stages=1):
        own = tl.program_id(0)
        if (begin // programs) % 2 == 1:
            own = programs - 1 - own
        index = begin + own
        if index < count:
            _do_item(
                items + index // KV_HEADS * ITEM_FIELDS, index % KV_HEADS,
                q, boxes, cache, scales, block_table, out, partial, partial_stats,
                totals + tl.program_id(0) * (2 * ROWS * BLOCK_D),
                total_stats + tl.program_id(0) * (4 * ROWS),
                q_stride, q_head_stride, out_stride, out_head_stride,
                stride_block, stride_kv, stride_head,
                scale_stride_block, scale_stride_kv, scale_stride_head,
                table_stride, window, score_scale, cap_scale, cap,
                KV_HEADS, GROUP, ROWS, PAGE, D, BLOCK_D, TILE, CHUNK,
                UNIT, CACHE_UNIT, BY_DESCRIPTOR, WINDOWED, CAPPED, SCALED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "out_stride", "out_head_stride"])
def fold_kernel(
    counts, folds, out, partial, partial_stats,
    num_tokens, out_stride: tl.int64, out_head_stride: tl.int64,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Folds the partials of split requests in ascending order, and zeroes the padding of out."""
    num_folds = tl.load(counts + 1)
    num_owned = tl.load(counts + 2)
    members = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_D)
    exists = (members < GROUP)[:, None] & (dims < D)[None, :]
    count = (num_folds + num_tokens - num_owned) * KV_HEADS
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=1):
        head = index % KV_HEADS
        entry = index // KV_HEADS
        m = tl.full((BLOCK_GROUP,), NEGATIVE_INFINITY, tl.float32)
        norm = tl.zeros((BLOCK_GROUP,), tl.float32)
        acc = tl.zeros((BLOCK_GROUP, BLOCK_D), tl.float32)
        token = num_owned + entry - num_folds
        if entry < num_folds:
            at = folds + entry * FOLD_FIELDS
            token = tl.load(at)
            first = tl.load(at + 1)
            stride = tl.load(at + 2)
            for chunk in range(tl.load(at + 3)):
                row = (first + chunk * stride + members) * KV_HEADS + head
                some = members < GROUP
                chunk_m = tl.load(partial_stats + row * 2, mask=some, other=NEGATIVE_INFINITY)
                chunk_norm = tl.load(partial_stats + row * 2 + 1, mask=some, other=0.0)
                at_acc = partial + row[:, None] * D + dims[None, :]
                chunk_acc = tl.load(at_acc, mask=exists, other=0.0)
                m, norm, acc = fold(m, norm, acc, chunk_m, chunk_norm, chunk_acc)
            acc = normalized(norm, acc)
        at = token.to(tl.int64) * (out_stride * UNIT)
        at += (head * GROUP + members)[:, None] * (out_head_stride * UNIT) + dims[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=exists)
