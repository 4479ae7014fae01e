"""The arithmetic of the sampling kernels on one tile of a row: keys, masses, noise, the best score.

Its definition is reference/sampling.py. Masses must not have a product fused with a sum: kernels
that call `mass_sum` are compiled with enable_fp_fusion=False.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from headrace_kernels.reference import sampling as reference

CHUNK = tl.constexpr(4096)
"""Tokens of a row that one program works on."""
INFINITE_KEY = tl.constexpr(0x7F800000)
"""Of minus infinity."""
MAX_KEY = tl.constexpr(2**31 - 1)
NO_TOKEN = tl.constexpr(2**31 - 1)
"""Larger than every token."""

_LOG2_E = tl.constexpr(reference.LOG2_E)
_LN2_HIGH, _LN2_LOW = tl.constexpr(reference.LN2_HIGH), tl.constexpr(reference.LN2_LOW)
_POLYNOMIAL_4, _POLYNOMIAL_3, _POLYNOMIAL_2, _POLYNOMIAL_1, _POLYNOMIAL_0 = (
    tl.constexpr(coefficient) for coefficient in reference.EXP_POLYNOMIAL
)
_LEAST_MASS_LOG = tl.constexpr(reference.LEAST_MASS_LOG)
_EXPONENT_OF_UNIT = tl.constexpr(127 + reference.MASS_BITS)
# Added and taken away again, it rounds to an integer: ties go to the even one.
_ROUNDER = tl.constexpr(1.5 * 2.0**23)

# Noise is at most this; the scores of the likeliest tokens are more than that; and a token that far
# below the best of its row cannot win. All a little wider than the truth.
_LARGEST_NOISE = tl.constexpr(reference.GUMBEL_MAX + 1e-3)
LEAST_SCORE = tl.constexpr(reference.GUMBEL_MIN - 0.25)
HOPELESS = tl.constexpr(reference.HOPELESS - 0.5)
NO_MASS = tl.constexpr(-(reference.MASS_BITS + 2) * math.log(2))
"""Scaled logits below weigh nothing: less than a quarter of a unit."""
# Twice what `_rough_noise` and the float32 sums of scores below 32 may err by, and twice that.
_SLACK = tl.constexpr(1e-4)


@triton.jit
def scaled_of(logits, best, temperature):
    return tl.div_rn(logits - best, temperature)


@triton.jit
def key_of(scaled):
    """int32 in the order of the ranks: scaled logits are at most 0, so that the pattern of their
    absolute value grows as they fall. Equal ones, 0 and -0 too, have one key."""
    return tl.abs(scaled).to(tl.int32, bitcast=True)


@triton.jit
def precedes(key, token, cut_key, cut_token):
    """Whether a token is ranked before another one: lower keys first, then lower tokens."""
    return (key < cut_key) | ((key == cut_key) & (token < cut_token))


@triton.jit
def mass_sum(scaled):
    """The sum, int64, of the masses of up to 2^13 scaled logits; see `reference.masses`.

    Masses are split into an upper and a lower part, each of which sums up in int32.
    """
    x = tl.maximum(scaled, _LEAST_MASS_LOG)
    n = (x * _LOG2_E + _ROUNDER) - _ROUNDER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = r * _POLYNOMIAL_4 + _POLYNOMIAL_3
    p = p * r + _POLYNOMIAL_2
    p = p * r + _POLYNOMIAL_1
    p = p * r + _POLYNOMIAL_0
    p = p * (r * r) + (r + 1.0)
    power = (n.to(tl.int32) + _EXPONENT_OF_UNIT) << 23
    mass = p * power.to(tl.float32, bitcast=True)
    # Larger float32 are whole numbers.
    mass = tl.where(mass < 8388608.0, (mass + 8388608.0) - 8388608.0, mass)
    upper = (mass * (1.0 / 131072.0) + _ROUNDER) - _ROUNDER
    lower = mass - upper * 131072.0
    uppers = tl.sum(upper.to(tl.int32), 0).to(tl.int64)
    return uppers * 131072 + tl.sum(lower.to(tl.int32), 0).to(tl.int64)


@triton.jit
def words_of_run(seed, position, start, SIZE: tl.constexpr):
    """The noise words of the SIZE tokens from `start`, a multiple of 4, on: uint32."""
    counter = start // 4 + tl.arange(0, SIZE // 4)
    w0, w1, w2, w3 = tl.philox(
        seed, counter, position.to(tl.int32), (position >> 32).to(tl.int32), 0
    )
    # Joined, the last index is that of the outer join: w0 w1 w2 w3 side by side.
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([SIZE])


@triton.jit
def words_of(seed, position, tokens):
    """The noise words of any tokens: uint32."""
    w0, w1, w2, w3 = tl.philox(
        seed, tokens >> 2, position.to(tl.int32), (position >> 32).to(tl.int32), 0
    )
    lane = tokens & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def noise_of(words):
    """Gumbel noise exactly as the reference has it, in float64 on the way."""
    uniform = (words.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _rough_noise(words):
    """Gumbel noise in float32 to within 2e-5. Near u = 1 the logarithm is a series in 1 - u, which
    the complement of the word gives without cancellation; else -log(u) is at least 0.13."""
    v = ((words ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    u = (words.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    series = v * (1.0 + v * (0.5 + v * (0.33333334 + v * (0.25 + v * 0.2))))
    return -tl.log(tl.where(v < 0.125, series, -tl.log(u)))


@triton.jit
def least_that_wins(first_score, min_p):
    """The scaled logit that min_p asks for, or what it takes to reach `first_score`."""
    share = tl.where(min_p > 0, tl.minimum(min_p, 1.0), 1.0).to(tl.float64)
    least = tl.where(min_p > 0, tl.log(share).to(tl.float32), float("-inf"))
    return tl.maximum(least, first_score - _LARGEST_NOISE)


@triton.jit
def best_scored(scaled, tokens, kept, words, score, token):
    """(score, token) of the best one kept, or those given if none is better.

    Noise in float64 costs a hundred instructions: rough scores of all pick the few tokens, mostly
    one, that may be the best. Exact ones decide, so that no rounding of the rough ones shows.
    """
    rough = tl.where(kept, scaled + _rough_noise(words), float("-inf"))
    left = rough >= tl.maximum(tl.max(rough, 0), score) - _SLACK
    while tl.max(left.to(tl.int32), 0) > 0:
        candidate = tl.min(tl.where(left, tokens, NO_TOKEN), 0)
        chosen = left & (tokens == candidate)
        word = tl.sum(tl.where(chosen, words.to(tl.int64), 0), 0)
        exact = tl.min(tl.where(chosen, scaled, 0.0), 0) + noise_of(word)
        better = (exact > score) | ((exact == score) & (candidate < token))
        score = tl.where(better, exact, score)
        token = tl.where(better, candidate, token)
        left = left & (tokens != candidate)
    return score, token


@triton.jit
def digit_of_rank(histogram, rank):
    """(the bin of 256 that holds the rank-th, from 1; how many are in the bins before it)."""
    place = tl.arange(0, 256)
    digit, before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for step in range(8):
        trial = digit | (128 >> step)
        below = tl.sum(tl.where(place < trial, histogram, 0), 0)
        digit = tl.where(below < rank, trial, digit)
        before = tl.where(below < rank, below, before)
    return digit, before
