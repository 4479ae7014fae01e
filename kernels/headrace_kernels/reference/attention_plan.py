"""The attention reference's index tensors: made on the host once a step, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace_kernels.attention_metadata import AttentionMetadata

TILE = 64
"""Tokens a tile; fixed, because it decides in which order a row's sums are added."""
ROW_MULTIPLE = 8
"""GEMM rows come in eights: rows of a tail of fewer are computed by other code (other bits)."""
DECODE_SCRATCH_BYTES = 1 << 20
"""Keys (or values) gathered at a time: they are still in the L2 cache when they are multiplied."""
PREFILL_SCRATCH_BYTES = 16 << 20
"""Scores held at a time."""

IndexArray = npt.NDArray[np.int64]


def padded_rows(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How one layer's [B, 2, K, P, row] cache lies in memory, counted in head pages of P rows."""

    num_kv_heads: int
    page_size: int
    row_size: int
    """D, and more where rows have scales."""
    block_stride: int
    kv_stride: int
    head_stride: int

    @classmethod
    def of(cls, kv_cache: Tensor) -> CacheLayout:
        _, _, num_kv_heads, page_size, row_size = kv_cache.shape
        strides = kv_cache.stride()
        page = page_size * row_size
        assert TILE % page_size == 0, f"page size {page_size} does not divide {TILE}"
        assert strides[3:] == (row_size, 1), "the page of one head must be contiguous"
        assert all(stride % page == 0 for stride in strides[:3])
        return cls(
            num_kv_heads,
            page_size,
            row_size,
            block_stride=strides[0] // page,
            kv_stride=strides[1] // page,
            head_stride=strides[2] // page,
        )

    def head_pages(self, kv_cache: Tensor) -> Tensor:
        """The cache as [head pages, P * row]; their numbers come from `rows`."""
        blocks = kv_cache.shape[0]
        last = (
            (blocks - 1) * self.block_stride
            + self.kv_stride
            + (self.num_kv_heads - 1) * self.head_stride
        )
        page = self.page_size * self.row_size
        return kv_cache.as_strided((last + 1, page), (page, 1))

    def rows(self, blocks: IndexArray, values: bool) -> IndexArray:
        """Head pages of `blocks` [N, pages of a tile], in the order (N, K, pages), flat."""
        heads = np.arange(self.num_kv_heads, dtype=np.int64) * self.head_stride
        rows = blocks[:, None, :] * self.block_stride + heads[None, :, None]
        return (rows + (self.kv_stride if values else 0)).reshape(-1)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """n requests with one query token each, cut into (request, tile) items."""

    token_rows: Tensor
    """[n]: the row of each request's token in the batch."""
    request_of_item: Tensor
    """[items]: index into token_rows."""
    items_of_request: Tensor
    """[n * most tiles]: items of each request, its first one again where it has fewer."""
    hidden: Tensor
    """[items, 1, 1, TILE] bool: tokens behind the end or outside the window."""
    key_pages: tuple[tuple[int, int, Tensor], ...]
    """(first item, last item, head pages) of each slice that fits the scratch memory."""
    value_pages: tuple[tuple[int, int, Tensor], ...]
    dead_values: tuple[Tensor, ...]
    """For each slice the (item, head, token) rows behind the end: 0 * NaN would be NaN."""
    later_tiles: tuple[tuple[int, int], ...]
    """(first item, number of items) of the requests' second, third, ... tiles."""


@dataclass(frozen=True, slots=True)
class PrefillTile:
    first_row: int
    last_row: int
    """Rows that see any of this tile, rounded outwards to ROW_MULTIPLE."""
    num_tokens: int
    """Tokens of the tile that exist."""
    hidden: Tensor | None
    """[rows, TILE] bool, or None where every row sees every token."""
    key_pages: Tensor
    value_pages: Tensor


@dataclass(frozen=True, slots=True)
class PrefillBlock:
    """Consecutive query tokens of one request, few enough for their scores to fit the scratch."""

    first_token: int
    last_token: int
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    num_tokens: int
    """Rows of the batch that belong to a request."""
    decode: DecodePlan | None
    prefill: tuple[PrefillBlock, ...]


def plan_attention(
    metadata: AttentionMetadata,
    layout: CacheLayout,
    num_heads: int,
    sliding_window: int | None,
    device: torch.device,
) -> AttentionPlan:
    """Cut a batch into the work of `paged_attention`."""
    starts = np.concatenate(([0], np.cumsum(metadata.query_lens))).astype(np.int64)
    decoding = np.flatnonzero(metadata.query_lens == 1)
    planner = _Planner(metadata, layout, sliding_window, device)
    blocks: list[PrefillBlock] = []
    for request in np.flatnonzero(metadata.query_lens > 1):
        blocks += planner.prefill(int(request), int(starts[request]), num_heads)
    return AttentionPlan(
        num_tokens=int(starts[-1]),
        decode=planner.decode(decoding, starts[decoding]) if len(decoding) else None,
        prefill=tuple(blocks),
    )


class _Planner:
    def __init__(
        self,
        metadata: AttentionMetadata,
        layout: CacheLayout,
        sliding_window: int | None,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.window = sliding_window
        self.device = device
        self.query_lens = metadata.query_lens.astype(np.int64)
        self.kv_lens = metadata.kv_lens.astype(np.int64)
        pages = TILE // layout.page_size
        table = metadata.host_block_table.astype(np.int64)
        table = np.pad(table, ((0, 0), (0, -table.shape[1] % pages)))
        # Entries past a request's length may hold anything: block 0 stands in for them.
        used = np.arange(table.shape[1]) * layout.page_size < self.kv_lens[:, None]
        self.tiles = np.where(used, table, 0).reshape(len(table), table.shape[1] // pages, pages)

    def decode(self, requests: IndexArray, token_rows: IndexArray) -> DecodePlan:
        kv_lens = self.kv_lens[requests]
        first_tile = np.zeros_like(kv_lens)
        if self.window is not None:
            first_tile = np.maximum(kv_lens - self.window, 0) // TILE
        counts = -(-kv_lens // TILE) - first_tile
        order = np.argsort(-counts, kind="stable")
        requests, token_rows, kv_lens = requests[order], token_rows[order], kv_lens[order]
        first_tile, counts = first_tile[order], counts[order]

        width = int(counts[0])
        sizes = np.searchsorted(-counts, -np.arange(width), side="left")
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        nth_tile = np.repeat(np.arange(width), sizes)
        request = np.arange(offsets[-1]) - offsets[nth_tile]
        tile = first_tile[request] + nth_tile

        position = tile[:, None] * TILE + np.arange(TILE)
        beyond = position >= kv_lens[request][:, None]
        hidden = beyond
        if self.window is not None:
            hidden = beyond | (position < (kv_lens - self.window)[request][:, None])
        nth = np.arange(width)[None, :]
        items = np.where(nth < counts[:, None], offsets[nth] + np.arange(len(counts))[:, None], 0)
        items = np.where(nth < counts[:, None], items, np.arange(len(counts))[:, None])

        blocks = self.tiles[requests[request], tile]
        tile_bytes = 4 * self.layout.num_kv_heads * TILE * self.layout.row_size
        step = max(1, DECODE_SCRATCH_BYTES // tile_bytes)
        slices = [(i, min(i + step, len(tile))) for i in range(0, len(tile), step)]
        return DecodePlan(
            token_rows=self._tensor(token_rows),
            request_of_item=self._tensor(request),
            items_of_request=self._tensor(items.reshape(-1)),
            hidden=self._tensor(hidden[:, None, None, :]),
            key_pages=tuple((a, b, self._pages(blocks[a:b], False)) for a, b in slices),
            value_pages=tuple((a, b, self._pages(blocks[a:b], True)) for a, b in slices),
            dead_values=tuple(self._dead_values(beyond[a:b]) for a, b in slices),
            later_tiles=tuple((int(offsets[j]), int(sizes[j])) for j in range(1, width)),
        )

    def prefill(self, request: int, first_token: int, num_heads: int) -> list[PrefillBlock]:
        group = num_heads // self.layout.num_kv_heads
        query_len, kv_len = int(self.query_lens[request]), int(self.kv_lens[request])
        row_bytes = 4 * self.layout.num_kv_heads * group * kv_len
        step = max(ROW_MULTIPLE, PREFILL_SCRATCH_BYTES // row_bytes)
        return [
            PrefillBlock(
                first_token=first_token + begin,
                last_token=first_token + min(begin + step, query_len),
                tiles=self._prefill_tiles(
                    request,
                    kv_len - query_len + begin,
                    kv_len - query_len + min(begin + step, query_len),
                    group,
                ),
            )
            for begin in range(0, query_len, step)
        ]

    def _prefill_tiles(
        self, request: int, begin: int, end: int, group: int
    ) -> tuple[PrefillTile, ...]:
        """Tiles that the query positions [begin, end) of a request see."""
        positions = np.repeat(np.arange(begin, end), group)
        pad = padded_rows(len(positions)) - len(positions)
        positions = np.pad(positions, (0, pad), constant_values=end - 1)
        lowest = np.zeros_like(positions)
        if self.window is not None:
            lowest = np.maximum(positions - self.window + 1, 0)
        tiles = []
        for tile in range(int(lowest[0]) // TILE, (end - 1) // TILE + 1):
            start = tile * TILE
            seeing = np.flatnonzero((positions >= start) & (lowest < start + TILE))
            first_row = int(seeing[0]) // ROW_MULTIPLE * ROW_MULTIPLE
            last_row = padded_rows(int(seeing[-1]) + 1)
            token = start + np.arange(TILE)
            hidden = (token > positions[first_row:last_row, None]) | (
                token < lowest[first_row:last_row, None]
            )
            tiles.append(
                PrefillTile(
                    first_row=first_row,
                    last_row=last_row,
                    num_tokens=min(int(self.kv_lens[request]) - start, TILE),
                    hidden=self._tensor(hidden) if hidden.any() else None,
                    key_pages=self._pages(self.tiles[request, tile][None], False),
                    value_pages=self._pages(self.tiles[request, tile][None], True),
                )
            )
        return tuple(tiles)

    def _dead_values(self, beyond: npt.NDArray[np.bool_]) -> Tensor:
        item, token = np.nonzero(beyond)
        heads = np.arange(self.layout.num_kv_heads)
        rows = (item[:, None] * len(heads) + heads) * TILE + token[:, None]
        return self._tensor(rows.reshape(-1))

    def _pages(self, blocks: IndexArray, values: bool) -> Tensor:
        return self._tensor(self.layout.rows(blocks, values))

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
