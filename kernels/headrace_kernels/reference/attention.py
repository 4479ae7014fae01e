"""Causal attention over the paged KV cache in plain torch.

What a row computes depends only on its own tokens, to the bit: KV is walked in tiles of 64 tokens
counted from position 0, every product has a multiple of 8 rows and one tile of columns, the row
maximum is exact in any order, and the tiles' sums are added in ascending order. A tile that a row
does not see adds zeros, so it can be left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.kv_format import from_pages
from headrace_kernels.reference.attention_plan import (
    TILE,
    AttentionPlan,
    CacheLayout,
    DecodePlan,
    PrefillBlock,
    padded_rows,
    plan_attention,
)

NEGATIVE_INFINITY = float("-inf")


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
    layout = CacheLayout.of(kv_cache)
    key = ("reference", layout, q.shape[1], sliding_window)
    plan: AttentionPlan | None = metadata.plans.get(key)
    if plan is None:
        plan = plan_attention(metadata, layout, q.shape[1], sliding_window, q.device)
        metadata.plans[key] = plan
    pages = layout.head_pages(kv_cache)
    if plan.decode is not None:
        _decode(q, pages, plan.decode, layout, scale, soft_cap, out)
    for block in plan.prefill:
        _prefill(q, pages, block, layout, scale, soft_cap, out)
    if plan.num_tokens < out.shape[0]:
        out[plan.num_tokens :].zero_()


def _decode(
    q: Tensor,
    pages: Tensor,
    plan: DecodePlan,
    layout: CacheLayout,
    scale: float,
    soft_cap: float | None,
    out: Tensor,
) -> None:
    """All requests with one query token, as a flat list of (request, tile) items.

    Items are in tile order, and within a tile position in order of descending tile count, so the
    j-th tiles of all requests that have one are a slice, and so are those requests.
    """
    n, heads, dim = len(plan.token_rows), layout.num_kv_heads, q.shape[-1]
    group = q.shape[1] // heads
    rows = padded_rows(group)
    items = len(plan.request_of_item)
    queries = torch.zeros((n, heads, rows, dim), dtype=torch.float32, device=q.device)
    queries[:, :, :group] = q.index_select(0, plan.token_rows).view(n, heads, group, dim)
    queries = queries.mul_(scale).index_select(0, plan.request_of_item)

    scores = torch.empty((items, heads, rows, TILE), dtype=torch.float32, device=q.device)
    for first, last, key_pages in plan.key_pages:
        keys = _gather(pages, key_pages, layout)
        torch.bmm(
            queries[first:last].view(-1, rows, dim),
            keys.transpose(1, 2),
            out=scores[first:last].view(-1, rows, TILE),
        )
    if soft_cap is not None:
        scores.div_(soft_cap).tanh_().mul_(soft_cap)
    scores.masked_fill_(plan.hidden, NEGATIVE_INFINITY)
    row_max = scores.amax(-1).index_select(0, plan.items_of_request)
    row_max = row_max.view(n, -1, heads, rows).amax(1)
    scores.sub_(row_max.index_select(0, plan.request_of_item).unsqueeze(-1)).exp_()

    sums = scores.sum(-1)
    weighted = torch.empty((items, heads, rows, dim), dtype=torch.float32, device=q.device)
    for (first, last, value_pages), dead in zip(plan.value_pages, plan.dead_values, strict=True):
        values = _gather(pages, value_pages, layout)
        values.view(-1, dim).index_fill_(0, dead, 0.0)
        torch.bmm(
            scores[first:last].view(-1, rows, TILE),
            values,
            out=weighted[first:last].view(-1, rows, dim),
        )
    total, accumulator = sums[:n], weighted[:n]
    for first, count in plan.later_tiles:
        total[:count] += sums[first : first + count]
        accumulator[:count] += weighted[first : first + count]
    result = accumulator[:, :, :group] / total[:, :, :group, None]
    out.index_copy_(0, plan.token_rows, result.view(n, heads * group, dim).to(out.dtype))


def _prefill(
    q: Tensor,
    pages: Tensor,
    block: PrefillBlock,
    layout: CacheLayout,
    scale: float,
    soft_cap: float | None,
    out: Tensor,
) -> None:
    """A run of query tokens of one request; its rows are (token, head of the group) pairs."""
    heads, dim = layout.num_kv_heads, q.shape[-1]
    tokens, group = block.last_token - block.first_token, q.shape[1] // heads
    rows = padded_rows(tokens * group)
    queries = torch.zeros((heads, rows, dim), dtype=torch.float32, device=q.device)
    by_head = q[block.first_token : block.last_token].view(tokens, heads, group, dim)
    queries[:, : tokens * group].view(heads, tokens, group, dim).copy_(by_head.transpose(0, 1))
    queries.mul_(scale)

    row_max = queries.new_full((heads, rows), NEGATIVE_INFINITY)
    tile_scores = []
    for tile in block.tiles:
        seen = slice(tile.first_row, tile.last_row)
        keys = _gather(pages, tile.key_pages, layout)
        scores = torch.bmm(queries[:, seen], keys.transpose(1, 2))
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        if tile.hidden is not None:
            scores.masked_fill_(tile.hidden, NEGATIVE_INFINITY)
        torch.maximum(row_max[:, seen], scores.amax(-1), out=row_max[:, seen])
        tile_scores.append(scores)

    total = queries.new_zeros((heads, rows, 1))
    accumulator = torch.zeros_like(queries)
    for tile, scores in zip(block.tiles, tile_scores, strict=True):
        seen = slice(tile.first_row, tile.last_row)
        scores.sub_(row_max[:, seen].unsqueeze(-1)).exp_()
        values = _gather(pages, tile.value_pages, layout)
        values[:, tile.num_tokens :].zero_()
        total[:, seen] += scores.sum(-1, keepdim=True)
        accumulator[:, seen] += torch.bmm(scores, values)
    result = (accumulator / total)[:, : tokens * group].view(heads, tokens, group, dim)
    out_rows = out[block.first_token : block.last_token]
    out_rows.view(tokens, heads, group, dim).copy_(result.transpose(0, 1))


def _gather(pages: Tensor, head_pages: Tensor, layout: CacheLayout) -> Tensor:
    """Read pages of single heads as fp32 tiles: [len(head_pages) * P / TILE, TILE, D]."""
    gathered = pages.index_select(0, head_pages).view(-1, layout.page_size, layout.row_size)
    values = from_pages(gathered)
    return values.view(-1, TILE, values.shape[-1])
