"""The arithmetic of paged attention: a chunk's softmax tile by tile, and how chunks are folded.

A row's softmax has two levels. Within a chunk of CHUNK tokens, counted from position 0, it goes on
from tile to tile; the state (m, norm, acc) of a chunk is then folded into that of the chunks
before, in ascending order and by the same function wherever it happens. Multiply-adds are spelled
tl.fma, so that no compiler fuses them in one kernel only. A tile that a row does not see changes
nothing: its weights are exactly 0 and the factor on what was there is exactly 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def fold(m, norm, acc, chunk_m, chunk_norm, chunk_acc):
    """The softmax state of some chunks and of the one behind them, as one."""
    largest = tl.maximum(m, chunk_m)
    base = tl.where(largest == NEGATIVE_INFINITY, 0.0, largest)
    factor = tl.exp2(m - base)
    chunk_factor = tl.exp2(chunk_m - base)
    norm = tl.fma(norm, factor, chunk_norm * chunk_factor)
    acc = tl.fma(acc, factor[:, None], chunk_acc * chunk_factor[:, None])
    return largest, norm, acc


@triton.jit
def normalized(norm, acc):
    """Weighted sums over the sum of weights; rows that saw nothing are NaN, and are not stored."""
    return acc * (1.0 / norm)[:, None]


@triton.jit
def _page_tile(
    boxes, cache, table, tile, base, stride_block, seq_len,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    UNIT: tl.constexpr, BY_DESCRIPTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[TILE, BLOCK_D]: K or V of the tokens of a tile; if MASKED, 0 behind seq_len.

    A masked tile is loaded by pointers, as copies that write zeros themselves: a box that had to be
    cleaned would take registers.
    """
    if BY_DESCRIPTOR and not MASKED:
        token = tile * TILE
        block = tl.load(table + token // PAGE).to(tl.int64)
        row = block * stride_block + base + token % PAGE
        values = boxes.load([row.to(tl.int32), 0])
    else:
        tokens = tile * TILE + tl.arange(0, TILE)
        dims = tl.arange(0, BLOCK_D)
        if MASKED:
            block = tl.load(table + tokens // PAGE, mask=tokens < seq_len, other=0).to(tl.int64)
        else:
            block = tl.load(table + tokens // PAGE).to(tl.int64)
        rows = (block * stride_block + base) * UNIT + tokens % PAGE * D
        at = cache + rows[:, None] + dims[None, :]
        if MASKED or D != BLOCK_D:
            exists = (tokens < seq_len)[:, None] & (dims < D)[None, :]
            values = tl.load(at, mask=exists, other=0.0)
        else:
            values = tl.load(at)
    return values


@triton.jit
def _tile_scales(
    scales, table, tile, base, stride_block, seq_len,
    PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[TILE] float32, 0 behind seq_len."""
    tokens = tile * TILE + tl.arange(0, TILE)
    exists = tokens < seq_len
    block = tl.load(table + tokens // PAGE, mask=exists, other=0).to(tl.int64)
    return tl.load(scales + block * stride_block + base + tokens % PAGE, mask=exists, other=0.0)


@triton.jit
def _add_tile(
    m, norm, acc, scores, v, key_scale, value_scale, tile, positions, window,
    score_scale, cap_scale, cap,
    dtype: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The softmax state of a chunk after one more tile.

    8-bit K and V are exact in q's dtype. Their scales go to the columns of the scores and of the
    weights: fewer products than on D values of a token.
    """
    if SCALED:
        scores = scores * key_scale[None, :]
    if CAPPED:
        # cap * tanh(x / cap) = cap - 2 * cap / (1 + exp(2 * x / cap)); softmax needs no constant.
        scores = cap / (1.0 + tl.exp2(scores * cap_scale))
    tokens = tile * TILE + tl.arange(0, TILE)
    if MASKED:
        seen = tokens[None, :] <= positions[:, None]
        if WINDOWED:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, NEGATIVE_INFINITY)
    largest = tl.maximum(m, tl.max(scores, 1) * score_scale)
    base = tl.where(largest == NEGATIVE_INFINITY, 0.0, largest)
    factor = tl.exp2(m - base)
    weights = tl.exp2(tl.fma(scores, score_scale, -base[:, None]))
    norm = tl.fma(norm, factor, tl.sum(weights, 1))
    if SCALED:
        weights = weights * value_scale[None, :]
    acc = acc * factor[:, None]
    acc = tl.dot(weights.to(dtype), v.to(dtype), acc, input_precision="ieee")
    return largest, norm, acc


@triton.jit
def _walk(
    m, norm, acc, begin, end,
    q, positions, seq_len, window, score_scale, cap_scale, cap,
    boxes, cache, scales, table, key_base, value_base, stride_block,
    key_scale_base, value_scale_base, scale_stride_block,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, CACHE_UNIT: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The softmax state of a chunk after its tiles begin to end. Masked tiles are few."""
    for tile in tl.range(begin, end, num_stages=(2 if BY_DESCRIPTOR else 1) if MASKED else None):
        k = _page_tile(
            boxes, cache, table, tile, key_base, stride_block, seq_len,
            PAGE, D, BLOCK_D, TILE, CACHE_UNIT, BY_DESCRIPTOR, MASKED and not BY_DESCRIPTOR,
        )  # fmt: skip
        v = _page_tile(
            boxes, cache, table, tile, value_base, stride_block, seq_len,
            PAGE, D, BLOCK_D, TILE, CACHE_UNIT, BY_DESCRIPTOR, MASKED,
        )  # fmt: skip
        key_scale = 0.0
        value_scale = 0.0
        if SCALED:
            key_scale = _tile_scales(
                scales, table, tile, key_scale_base, scale_stride_block, seq_len, PAGE, TILE
            )
            value_scale = _tile_scales(
                scales, table, tile, value_scale_base, scale_stride_block, seq_len, PAGE, TILE
            )
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        m, norm, acc = _add_tile(
            m, norm, acc, scores, v, key_scale, value_scale, tile, positions, window,
            score_scale, cap_scale, cap, q.dtype, TILE, WINDOWED, CAPPED, SCALED, MASKED,
        )  # fmt: skip
    return m, norm, acc


@triton.jit
def _tile_ranges(
    first_position, last_position, chunk, window,
    TILE: tl.constexpr, CHUNK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """begin, full, edge, end of a chunk: all rows see all of the tiles from `full` to `edge`."""
    hidden = 0
    if WINDOWED:
        hidden = tl.maximum(first_position - window + 1, 0)
    begin = tl.maximum(hidden, chunk * CHUNK) // TILE
    end = tl.minimum((last_position + TILE) // TILE, (chunk + 1) * (CHUNK // TILE))
    end = tl.maximum(begin, end)
    edge = tl.minimum(tl.maximum((first_position + 1) // TILE, begin), end)
    full = begin
    if WINDOWED:
        whole = (tl.maximum(last_position - window + 1, 0) + TILE - 1) // TILE
        full = tl.minimum(tl.maximum(whole, begin), edge)
    return begin, full, edge, end


@triton.jit
def attend_chunk(
    q, positions, first_position, last_position, chunk, seq_len, window,
    score_scale, cap_scale, cap,
    boxes, cache, scales, table, key_base, value_base, stride_block,
    key_scale_base, value_scale_base, scale_stride_block,
    ROWS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, CACHE_UNIT: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """The softmax state (m, norm, acc) of a block of rows over one chunk.

    m [ROWS]: largest score, in log2; norm [ROWS]: sum of weights; acc [ROWS, BLOCK_D]: of values.
    """
    begin, full, edge, end = _tile_ranges(
        first_position, last_position, chunk, window, TILE, CHUNK, WINDOWED
    )
    m = tl.full((ROWS,), NEGATIVE_INFINITY, tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if WINDOWED:
        m, norm, acc = _walk(
            m, norm, acc, begin, full,
            q, positions, seq_len, window, score_scale, cap_scale, cap,
            boxes, cache, scales, table, key_base, value_base, stride_block,
            key_scale_base, value_scale_base, scale_stride_block,
            PAGE, D, BLOCK_D, TILE, CACHE_UNIT, BY_DESCRIPTOR, WINDOWED, CAPPED, SCALED, True,
        )  # fmt: skip
    m, norm, acc = _walk(
        m, norm, acc, full, edge,
        q, positions, seq_len, window, score_scale, cap_scale, cap,
        boxes, cache, scales, table, key_base, value_base, stride_block,
        key_scale_base, value_scale_base, scale_stride_block,
        PAGE, D, BLOCK_D, TILE, CACHE_UNIT, BY_DESCRIPTOR, WINDOWED, CAPPED, SCALED, False,
    )  # fmt: skip
    m, norm, acc = _walk(
        m, norm, acc, edge, end,
        q, positions, seq_len, window, score_scale, cap_scale, cap,
        boxes, cache, scales, table, key_base, value_base, stride_block,
        key_scale_base, value_scale_base, scale_stride_block,
        PAGE, D, BLOCK_D, TILE, CACHE_UNIT, BY_DESCRIPTOR, WINDOWED, CAPPED, SCALED, True,
    )  # fmt: skip
    return m, norm, acc
