"""The end of sampling a row, one program each: from results of chunks, or a list, to a token."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace_kernels.triton.sampling_row import (
    LIST,
    best_of_row,
    count_of,
    drawn_of,
    first_score,
    floats_of,
    ints_of,
    list_of,
    load_tile,
    scores_of,
)
from headrace_kernels.triton.sampling_tile import (
    CHUNK,
    LEAST_SCORE,
    MAX_KEY,
    NO_TOKEN,
    best_scored,
    digit_of_rank,
    key_of,
    least_that_wins,
    mass_sum,
    precedes,
    scaled_of,
    words_of,
)

TILE = tl.constexpr(2048)
"""Four tokens a thread: with more of them the registers spill."""


@triton.jit
def _cut_of_top_k(values, tokens, listed, size, best, temperature, k):
    """(key, token) of which all that is ranked before them are the k first.

    A radix selection, eight bits at a time: the k-th smallest key, and if more tokens have that one
    than may stay, which of these is the last.
    """
    cut_key, cut_token = tl.full([], MAX_KEY, tl.int32), tl.full([], NO_TOKEN, tl.int32)
    steps = tl.where(k < size, 4, 0)
    step = 0
    prefix, rank = tl.full([], 0, tl.int32), k
    while step < steps:
        shift = 24 - 8 * (step & 3)
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, size, TILE):
            x, token, exists = load_tile(values, tokens, listed, size, start, TILE)
            number = key_of(scaled_of(x, best, temperature))
            exists = exists & ((step < 4) | (number == cut_key))
            number = tl.where(step < 4, number, token)
            alike = exists & ((number >> shift >> 8) == prefix)
            histogram += tl.histogram((number >> shift) & 255, 256, mask=alike)
        digit, before = digit_of_rank(histogram, rank)
        prefix = prefix * 256 + digit
        rank -= before
        if step == 3:
            cut_key, prefix = prefix, prefix * 0
            if tl.sum(tl.where(tl.arange(0, 256) == digit, histogram, 0), 0) > rank:
                steps = 8
        if step == 7:
            cut_token = prefix + 1
        step += 1
    return cut_key, cut_token


@triton.jit
def _mass_before(values, tokens, listed, size, bests, best, temperature, cut_key, cut_token):
    """The mass of all that is ranked before a key and a token."""
    mass = tl.full([], 0, tl.int64)
    for start in range(0, size, TILE):
        nearest = key_of(scaled_of(tl.load(bests + start // CHUNK), best, temperature))
        if listed | (nearest <= cut_key):
            x, token, exists = load_tile(values, tokens, listed, size, start, TILE)
            scaled = scaled_of(x, best, temperature)
            counts = exists & precedes(key_of(scaled), token, cut_key, cut_token)
            mass += mass_sum(tl.where(counts, scaled, float("-inf")))
    return mass


@triton.jit
def _draw_before(
    values, tokens, listed, size, bests, best, best_token, temperature, cut_key, cut_token,
    min_p, seed, position, first,
):  # fmt: skip
    """The token of the best score among those ranked before a key and a token."""
    # Scaled logits can be equal where logits are not, and the largest logit then be cut. Any token
    # as likely beats this score.
    survives = precedes(0, best_token, cut_key, cut_token)
    score = tl.where(survives, first, LEAST_SCORE)
    drawn = tl.where(survives, best_token, NO_TOKEN)
    least = least_that_wins(score, min_p)
    for start in range(0, size, TILE):
        nearest = scaled_of(tl.load(bests + start // CHUNK), best, temperature)
        if listed | ((nearest >= least) & (key_of(nearest) <= cut_key)):
            x, token, exists = load_tile(values, tokens, listed, size, start, TILE)
            scaled = scaled_of(x, best, temperature)
            kept = exists & (scaled >= least)
            kept = kept & precedes(key_of(scaled), token, cut_key, cut_token)
            words = words_of(seed, position, token)
            score, drawn = best_scored(scaled, token, kept, words, score, drawn)
    return drawn


@triton.jit
def _drawn_of_chunks(floats, ints, chunks, SLOTS: tl.constexpr):
    slot = tl.arange(0, SLOTS)
    scores = tl.load(scores_of(floats, chunks) + slot, mask=slot < chunks, other=float("-inf"))
    tokens = tl.load(drawn_of(ints, chunks) + slot, mask=slot < chunks, other=NO_TOKEN)
    return tl.min(tl.where(scores == tl.max(scores, 0), tokens, NO_TOKEN), 0)


@triton.jit(do_not_specialize=["stride", "vocab"])
def finish_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, floats, ints, sums, out,
    stride, vocab, SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (rows,)."""
    row, chunks = tl.program_id(0), tl.cdiv(vocab, CHUNK)
    floats, ints = floats_of(floats, row, chunks), ints_of(ints, row, chunks)
    best, token, usable = best_of_row(floats, ints, chunks, SLOTS)
    temperature = tl.load(temperatures + row)
    if usable & (temperature > 0):
        token = _random_token(
            logits + row.to(tl.int64) * stride, top_ks, top_ps, min_ps, seeds, positions,
            floats, ints, sums + row.to(tl.int64) * chunks, vocab, row, chunks,
            best, token, temperature, SLOTS,
        )  # fmt: skip
    tl.store(out + row, tl.where(usable, token, -1).to(tl.int64))


@triton.jit
def _random_token(
    logits, top_ks, top_ps, min_ps, seeds, positions, floats, ints, sums, vocab, row, chunks,
    best, best_token, temperature, SLOTS: tl.constexpr,
):  # fmt: skip
    """The draw of a row whose temperature is not 0."""
    k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    limited = (k > 0) & (k < vocab)
    values, size = logits, vocab
    list_values, tokens = list_of(floats, ints, chunks)
    listed = limited
    if limited:
        count = tl.load(count_of(ints, chunks))
        listed = count <= LIST
        if listed:
            values, size = list_values, count
    cut_key, cut_token = tl.full([], MAX_KEY, tl.int32), tl.full([], NO_TOKEN, tl.int32)
    if limited:
        cut_key, cut_token = _cut_of_top_k(values, tokens, listed, size, best, temperature, k)
        drawn, total = best_token, tl.full([], -1, tl.int64)
    else:
        slot = tl.arange(0, SLOTS)
        drawn = _drawn_of_chunks(floats, ints, chunks, SLOTS)
        total = tl.sum(tl.load(sums + slot, mask=slot < chunks, other=0), 0)
    seed, position, first = first_score(seeds, positions, row, best_token)
    min_p = tl.load(min_ps + row)
    # With a cut of top_k: draw, weigh all before the cut, weigh all before the drawn one. Then, and
    # without one, draw and weigh again as long as the drawn one is beyond the nucleus.
    to_draw, going = limited, limited | (top_p < 1)
    while going:
        if to_draw:
            drawn = _draw_before(
                values, tokens, listed, size, floats, best, best_token, temperature,
                cut_key, cut_token, min_p, seed, position, first,
            )  # fmt: skip
        going = top_p < 1
        if going:
            to_draw = total >= 0
            if to_draw:
                cut_key = key_of(scaled_of(tl.load(logits + drawn), best, temperature))
                cut_token = drawn
            mass = _mass_before(
                values, tokens, listed, size, floats, best, temperature, cut_key, cut_token
            )
            if to_draw:
                # The first token stays, whatever top_p is.
                going = mass.to(tl.float64) >= top_p.to(tl.float64) * total.to(tl.float64)
                going = going & (mass > 0)
            else:
                total = mass
    return drawn
