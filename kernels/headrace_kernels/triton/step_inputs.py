"""A step's inputs: three launches of a few kilobytes, bound by their latency.

256 decoding rows move 20 KB (5 ns at 4.3 TB/s), so what counts is how few launches there are, and
that none waits for the host. A token finds its row by bisection of query_start_loc, which stays in
the L1 cache, rather than by an array that the host would have to send.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.triton.builds import Build

BLOCK = 128
WARPS = 4


def declines(facts: KernelFacts) -> str | None:
    return None


@triton.jit(do_not_specialize=["count"])
def put_kernel(index_ptr, values_ptr, out_ptr, count, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < count
    index = tl.load(index_ptr + entry, exists, other=0)
    values = tl.load(values_ptr + entry, exists, other=0)
    tl.store(out_ptr + index, values.to(tl.int32), exists)


@triton.jit
def _row_of(query_start_loc_ptr, token, num_rows, STEPS: tl.constexpr):
    """How many of query_start_loc[1:] are not above `token`: the row that owns it."""
    row = tl.zeros_like(token)
    for step in tl.static_range(STEPS):
        next_row = row + (1 << (STEPS - 1 - step))
        inside = next_row <= num_rows
        start = tl.load(query_start_loc_ptr + next_row, inside, other=0)
        row = tl.where(inside & (start <= token), next_row, row)
    return row


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "block_table_stride", "page_size"])
def token_inputs_kernel(
    query_start_loc_ptr,
    seq_lens_ptr,
    tokens_ptr,
    last_tokens_ptr,
    block_table_ptr,
    token_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    num_tokens,
    num_rows,
    block_table_stride,
    page_size,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = token < num_tokens
    owned = exists & (token < tl.load(query_start_loc_ptr + num_rows))
    row = tl.where(owned, _row_of(query_start_loc_ptr, token, num_rows, STEPS), 0)
    end = tl.load(query_start_loc_ptr + row + 1, owned, other=0)
    position = tl.load(seq_lens_ptr + row, owned, other=0) - end + token
    position = tl.where(owned, position, 0)
    sent = tl.load(tokens_ptr + token, owned, other=0)
    sampled = tl.load(last_tokens_ptr + row, owned & (sent < 0), other=0)
    token_id = tl.maximum(tl.where(sent < 0, sampled, sent), 0)
    entry = row.to(tl.int64) * block_table_stride + position // page_size
    block = tl.load(block_table_ptr + entry, owned, other=0)
    slot = block.to(tl.int64) * page_size + position % page_size
    tl.store(token_ids_ptr + token, token_id.to(tl.int64), exists)
    tl.store(positions_ptr + token, position.to(tl.int64), exists)
    tl.store(slot_mapping_ptr + token, tl.where(owned, slot, -1), exists)


@triton.jit(do_not_specialize=["count"])
def sampling_inputs_kernel(
    rows_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    words_ptr,
    logit_indices_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    count,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < count
    row = tl.load(rows_ptr + entry, exists, other=0)
    end = tl.load(query_start_loc_ptr + row + 1, exists, other=0)
    position = tl.load(seq_lens_ptr + row, exists, other=0)
    words = words_ptr + row * WORDS
    temperature = tl.load(words, exists, other=0)
    top_k = tl.load(words + 1, exists, other=0)
    top_p = tl.load(words + 2, exists, other=0)
    min_p = tl.load(words + 3, exists, other=0)
    low = tl.load(words + 4, exists, other=0)
    high = tl.load(words + 5, exists, other=0)
    seed = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    tl.store(logit_indices_ptr + entry, end.to(tl.int64) - 1, exists)
    tl.store(temperature_ptr + entry, temperature.to(tl.float32, bitcast=True), exists)
    tl.store(top_k_ptr + entry, top_k, exists)
    tl.store(top_p_ptr + entry, top_p.to(tl.float32, bitcast=True), exists)
    tl.store(min_p_ptr + entry, min_p.to(tl.float32, bitcast=True), exists)
    tl.store(seeds_ptr + entry, seed, exists)
    tl.store(positions_ptr + entry, position.to(tl.int64), exists)


def put(index: Tensor, values: Tensor, out: Tensor) -> None:
    """See ops/step_inputs.py."""
    if count := len(index):
        grid = (triton.cdiv(count, BLOCK),)
        put_kernel[grid](index, values, out, count, BLOCK=BLOCK, num_warps=WARPS)


def token_inputs(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    tokens: Tensor,
    last_tokens: Tensor,
    block_table: Tensor,
    page_size: int,
    token_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
) -> None:
    """See ops/step_inputs.py."""
    num_rows, num_tokens = len(seq_lens), len(tokens)
    token_inputs_kernel[(triton.cdiv(num_tokens, BLOCK),)](
        query_start_loc,
        seq_lens,
        tokens,
        last_tokens,
        block_table,
        token_ids,
        positions,
        slot_mapping,
        num_tokens,
        num_rows,
        block_table.stride(0),
        page_size,
        **_token_constants(num_rows),
        num_warps=WARPS,
    )


def sampling_inputs(
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    words: Tensor,
    logit_indices: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> None:
    """See ops/step_inputs.py."""
    if count := len(rows):
        sampling_inputs_kernel[(triton.cdiv(count, BLOCK),)](
            rows,
            query_start_loc,
            seq_lens,
            words,
            logit_indices,
            temperature,
            top_k,
            top_p,
            min_p,
            seeds,
            positions,
            count,
            WORDS=words.shape[1],
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _token_constants(num_rows: int) -> dict[str, Any]:
    return {"STEPS": num_rows.bit_length(), "BLOCK": BLOCK}


def builds(arch: str) -> Iterator[Build]:
    for values in ("*i32", "*i64"):
        yield Build(
            name=f"put {values[1:]}",
            kernel=put_kernel,
            types={"index_ptr": "*i32", "values_ptr": values, "out_ptr": "*i32", "count": "i32"},
            constants={"BLOCK": BLOCK},
            num_warps=WARPS,
        )
    sent = ("query_start_loc_ptr", "seq_lens_ptr", "tokens_ptr", "last_tokens_ptr")
    made = ("token_ids_ptr", "positions_ptr", "slot_mapping_ptr")
    sizes = ("num_tokens", "num_rows", "block_table_stride", "page_size")
    yield Build(
        name="tokens of 256 rows",
        kernel=token_inputs_kernel,
        types={
            **dict.fromkeys((*sent, "block_table_ptr"), "*i32"),
            **dict.fromkeys(made, "*i64"),
            **dict.fromkeys(sizes, "i32"),
        },
        constants=_token_constants(256),
        num_warps=WARPS,
    )
    yield Build(
        name="sampling",
        kernel=sampling_inputs_kernel,
        types={
            **dict.fromkeys(("rows_ptr", *sent[:2], "words_ptr", "top_k_ptr"), "*i32"),
            **dict.fromkeys(("logit_indices_ptr", "seeds_ptr", "positions_ptr"), "*i64"),
            **dict.fromkeys(("temperature_ptr", "top_p_ptr", "min_p_ptr"), "*fp32"),
            "count": "i32",
        },
        constants={"WORDS": 6, "BLOCK": BLOCK},
        num_warps=WARPS,
    )
