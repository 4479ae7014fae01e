"""The ops that make a step's inputs on the device, from what the host sends and what it keeps.

Rows are those of the running requests, R of them whether in use or not; a row that computes nothing
in a step has a query length of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check

SAMPLING_WORDS = 6
"""Of a row's sampling parameters: the bits of temperature, top_k, top_p and min_p (float32 but for
top_k), then the low and the high half of the seed."""


def put(index: Tensor, values: Tensor, out: Tensor) -> None:
    """out[index[i]] = values[i]: entries that moved on since the device was told last.

    Args:
        index: [N] int32, distinct, within out.
        values: [N] int32 or int64; they fit in 32 bits.
        out: [S] int32.
    """
    check("index", index, out, shape=(len(index),), dtype=torch.int32)
    dtype = torch.int64 if values.dtype == torch.int64 else torch.int32
    check("values", values, out, shape=(len(index),), dtype=dtype)
    check("out", out, out, shape=(len(out),), dtype=torch.int32)
    kernels_for(out).put(index, values, out)


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
    """The model's inputs of each token. Those behind query_start_loc[R] are padding.

    Args:
        query_start_loc: [R + 1] int32, ascending from 0: row r owns the tokens from its entry to
            the next one, which are the last of its sequence.
        seq_lens: [R] int32: tokens in the cache once the step has written its own.
        tokens: [T] int32; -1 stands for the last token of its row.
        last_tokens: [R] int32: what each row sampled last. Where that is -1 (no distribution), the
            token is 0: what the row computes now is dropped.
        block_table: [R, max_blocks] int32.
        page_size: tokens of a block.
        token_ids, positions, slot_mapping: [T] int64, written: as CausalLM takes them; 0, 0 and -1
            for padding.
    """
    rows, count = seq_lens.shape[0], (tokens.shape[0],)
    check("query_start_loc", query_start_loc, tokens, shape=(rows + 1,), dtype=torch.int32)
    check("seq_lens", seq_lens, tokens, shape=(rows,), dtype=torch.int32)
    check("tokens", tokens, tokens, shape=count, dtype=torch.int32)
    check("last_tokens", last_tokens, tokens, shape=(rows,), dtype=torch.int32)
    shape = (rows, block_table.shape[1])
    check("block_table", block_table, tokens, shape=shape, dtype=torch.int32)
    check("token_ids", token_ids, tokens, shape=count, dtype=torch.int64)
    check("positions", positions, tokens, shape=count, dtype=torch.int64)
    check("slot_mapping", slot_mapping, tokens, shape=count, dtype=torch.int64)
    kernels_for(tokens).token_inputs(
        query_start_loc,
        seq_lens,
        tokens,
        last_tokens,
        block_table,
        page_size,
        token_ids,
        positions,
        slot_mapping,
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
    """The sampler's inputs of each row that samples.

    Args:
        rows: [N] int32, of at least one token.
        query_start_loc, seq_lens: as for `token_inputs`.
        words: [R, SAMPLING_WORDS] int32.
        logit_indices: [N] int64, written: the row's last token among the step's.
        temperature, top_p, min_p: [N] float32, written, as top_k: [N] int32.
        seeds, positions: [N] int64, written: the identity of the noise; the new token's position.
    """
    count = (rows.shape[0],)
    check("rows", rows, rows, shape=count, dtype=torch.int32)
    shape = (seq_lens.shape[0], SAMPLING_WORDS)
    check("words", words, rows, shape=shape, dtype=torch.int32)
    for name, tensor, dtype in (
        ("logit_indices", logit_indices, torch.int64),
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
    ):
        check(name, tensor, rows, shape=count, dtype=dtype)
    kernels_for(rows).sampling_inputs(
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
    )
