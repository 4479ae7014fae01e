"""Log-probabilities of a row: a token's own, and those of the k most likely."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace_kernels.triton.sampling_row import (
    LIST,
    best_of_row,
    count_of,
    floats_of,
    ints_of,
    list_chunk,
    list_of,
    load_tile,
    row_of,
    scores_of,
)
from headrace_kernels.triton.sampling_tile import CHUNK, MAX_KEY, NO_TOKEN


@triton.jit(do_not_specialize=["stride", "vocab", "k"])
def list_kernel(
    logits, floats, ints, stride, vocab, k,
    ALIGNED: tl.constexpr, SLOTS: tl.constexpr, GROUP_SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (rows, chunks): lists what may be among the k largest logits of each row."""
    row, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    logits, vocab = row_of(logits, row.to(tl.int64), stride, vocab, ALIGNED)
    floats, ints = floats_of(floats, row, chunks), ints_of(ints, row, chunks)
    best, _, usable = best_of_row(floats, ints, chunks, SLOTS)
    if usable:
        list_chunk(
            logits, floats, ints, chunk, chunks, vocab, best, tl.full([], 1.0, tl.float32), k,
            MAX_KEY, GROUP_SLOTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stride", "vocab", "k"])
def logprobs_kernel(
    logits, token_ids, floats, ints, logprobs, top_ids, top_logprobs, stride, vocab, k,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (rows,)."""
    row, chunks = tl.program_id(0), tl.cdiv(vocab, CHUNK)
    logits += row.to(tl.int64) * stride
    floats, ints = floats_of(floats, row, chunks), ints_of(ints, row, chunks)
    best, _, usable = best_of_row(floats, ints, chunks, SLOTS)
    log_sum = tl.full([], float("nan"), tl.float64)
    if usable:
        slot = tl.arange(0, SLOTS)
        largest = tl.load(floats + slot, mask=slot < chunks, other=float("-inf"))
        sums = tl.load(scores_of(floats, chunks) + slot, mask=slot < chunks, other=0.0)
        total = tl.sum(sums.to(tl.float64) * tl.exp((largest - best).to(tl.float64)), 0)
        log_sum = best.to(tl.float64) + tl.log(total)
    own = tl.load(logits + tl.load(token_ids + row)).to(tl.float64) - log_sum
    tl.store(logprobs + row, own.to(tl.float32))
    if k > 0:
        count = tl.load(count_of(ints, chunks))
        listed = count <= LIST
        values, size = logits, vocab
        list_values, tokens = list_of(floats, ints, chunks)
        if listed:
            values, size = list_values, count
        last, last_token = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
        for index in range(k):
            if usable:
                last, last_token = _next_best(values, tokens, listed, size, last, last_token)
            to = row.to(tl.int64) * k + index
            tl.store(top_ids + to, tl.where(usable, last_token, 0).to(tl.int64))
            tl.store(top_logprobs + to, (last.to(tl.float64) - log_sum).to(tl.float32))


@triton.jit
def _next_best(values, tokens, listed, size, last, last_token):
    """(logit, token) of the first one after those given, larger logits and lower tokens first."""
    value, token = tl.full([], float("-inf"), tl.float32), tl.full([], NO_TOKEN, tl.int32)
    for start in range(0, size, CHUNK):
        x, candidates, exists = load_tile(values, tokens, listed, size, start, CHUNK)
        after = exists & ((x < last) | ((x == last) & (candidates > last_token)))
        top = tl.max(tl.where(after, x, float("-inf")), 0)
        first = tl.min(tl.where(after & (x == top), candidates, NO_TOKEN), 0)
        better = (top > value) | ((top == value) & (first < token))
        value = tl.where(better, top, value)
        token = tl.where(better, first, token)
    return value, token
