"""The memory of the rows that are sampled, and the lists of their likeliest tokens.

Of each chunk of a row `floats` holds the largest logit, a score (or a sum of exponentials) and the
largest logits of its groups; `ints` the tokens of the first two. Then come a list's logits, its
length, and its tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace_kernels.triton.sampling_tile import (
    CHUNK,
    INFINITE_KEY,
    NO_TOKEN,
    key_of,
    noise_of,
    scaled_of,
    words_of,
)

GROUPS = tl.constexpr(64)
"""Of a chunk. Every 64th token is of one group: neighbours often are alike."""
LIST = tl.constexpr(4096)
"""Room in the list of a row. Where more tokens qualify, the row itself is searched."""
_PART = tl.constexpr(1024)
"""Of a chunk, that is appended at once: the addresses of more would take too many registers."""
_COARSE = tl.constexpr(2**15 - 1)
_NORMAL_KEY = tl.constexpr(0x0DA24260)
"""Of 1e-30: quotients that large have all their bits."""
ROW_FLOATS, ROW_INTS = LIST, tl.constexpr(1 + 4096)
CHUNK_FLOATS, CHUNK_INTS = tl.constexpr(2 + 64), tl.constexpr(2)
"""Numbers of a row, and of each of its chunks besides."""


@triton.jit
def floats_of(floats, row, chunks):
    return floats + row.to(tl.int64) * (chunks * CHUNK_FLOATS + ROW_FLOATS)


@triton.jit
def ints_of(ints, row, chunks):
    return ints + row.to(tl.int64) * (chunks * CHUNK_INTS + ROW_INTS)


@triton.jit
def scores_of(floats, chunks):
    """Or the sums of the exponentials."""
    return floats + chunks


@triton.jit
def drawn_of(ints, chunks):
    """The tokens of the scores."""
    return ints + chunks


@triton.jit
def groups_of(floats, chunks):
    return floats + chunks * 2


@triton.jit
def count_of(ints, chunks):
    """How many tokens the list would have if it had room for all."""
    return ints + chunks * CHUNK_INTS


@triton.jit
def list_of(floats, ints, chunks):
    """(logits, tokens)"""
    return floats + chunks * CHUNK_FLOATS, ints + chunks * CHUNK_INTS + 1


@triton.jit
def row_of(logits, row, stride, vocab, ALIGNED: tl.constexpr):
    """The row and its length. The compiler reads four logits at once where it sees that it may."""
    if ALIGNED:
        stride = stride // 4 * 4
        vocab = vocab // 4 * 4
    return logits + row * stride, vocab


@triton.jit
def best_of_row(floats, ints, chunks, SLOTS: tl.constexpr):
    """(the largest logit, its lowest token, whether the row is a distribution)."""
    slot = tl.arange(0, SLOTS)
    largest = tl.load(floats + slot, mask=slot < chunks, other=float("-inf"))
    tokens = tl.load(ints + slot, mask=slot < chunks, other=NO_TOKEN)
    best = tl.max(largest, 0)
    token = tl.min(tl.where(largest == best, tokens, NO_TOKEN), 0)
    return best, token, (best > float("-inf")) & (best < float("inf"))


@triton.jit
def first_score(seeds, positions, row, best_token):
    """(seed, position, the score of the row's likeliest token)."""
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    return seed, position, noise_of(words_of(seed, position, best_token))


@triton.jit
def load_tile(values, tokens, listed, size, start, TILE: tl.constexpr):
    """(logits, tokens, exists) of a tile of a list, or of a row, whose tokens are its indices."""
    at = start + tl.arange(0, TILE)
    exists = at < size
    x = tl.load(values + at, mask=exists, other=float("-inf"))
    return x, tl.where(listed, tl.load(tokens + at, mask=exists & listed, other=0), at), exists


@triton.jit
def list_chunk(
    logits, floats, ints, chunk, chunks, vocab, best, temperature, k, least_key,
    GROUP_SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds what may be among the k first of the row to its list, if its key is not above
    `least_key`: all up to a bound, in any order. What reads the list does not depend on that.
    """
    largest = tl.load(floats + chunk)
    nearest = key_of(scaled_of(largest, best, temperature))
    if nearest <= least_key:
        lead = _lead_bound(
            groups_of(floats, chunks), chunks, best, k, key_of(largest - best), nearest, GROUP_SLOTS
        )
        bound = tl.minimum(key_of(tl.div_rn(lead, temperature)), least_key)
        if nearest <= bound:
            for part in range(CHUNK // _PART):
                token = chunk * CHUNK + part * _PART + tl.arange(0, _PART)
                x = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
                key = key_of(scaled_of(x, best, temperature))
                _append(floats, ints, chunks, x, token, (token < vocab) & (key <= bound))


@triton.jit
def _lead_bound(groups, chunks, best, k, own_key, own_nearest, GROUP_SLOTS: tl.constexpr):
    """How far below the best one k logits are at most, if there are k, as a number that is not
    above 0: the k-th largest of the groups, each of which is a token of its own. 16 of 31 bits of
    it, by bisection: the groups are in registers.

    0 where the chunk clearly has none of the k: its largest logit is beyond k groups, by more than
    the division by the temperature can round away.
    """
    slot = tl.arange(0, GROUP_SLOTS)
    largest = tl.load(groups + slot, mask=slot < chunks * GROUPS, other=float("-inf"))
    key = key_of(largest - best) | _COARSE
    beyond = tl.sum((key + 2 * (_COARSE + 1) < own_key).to(tl.int32), 0) >= k
    steps = tl.where(beyond & (own_nearest > _NORMAL_KEY), 0, 16)
    bound = tl.full([], 0, tl.int32)
    for step in range(steps):
        trial = bound | (1 << (30 - step))
        bound = tl.where(tl.sum((key < trial).to(tl.int32), 0) < k, trial, bound)
    bound = tl.where(steps > 0, tl.minimum(bound | _COARSE, INFINITE_KEY), 0)
    bound = tl.where(k > chunks * GROUPS, INFINITE_KEY, bound)
    return -bound.to(tl.float32, bitcast=True)


@triton.jit
def _append(floats, ints, chunks, x, token, listed):
    """`count_of` counts even those that have no room."""
    number = tl.cumsum(listed.to(tl.int32), 0)
    added = tl.max(number, 0)
    if added > 0:
        slot = tl.atomic_add(count_of(ints, chunks), added) + number - 1
        values, tokens = list_of(floats, ints, chunks)
        tl.store(values + slot, x, mask=listed & (slot < LIST))
        tl.store(tokens + slot, token, mask=listed & (slot < LIST))
