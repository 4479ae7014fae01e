"""Sampling in plain torch: counter-based Gumbel noise, filters, log-probabilities.

Owns the arithmetic that every other sampling kernel is tested against. What a row gets depends on
that row alone, bit for bit. Knows nothing of requests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LANES = 4
_LOW_32 = 0xFFFFFFFF

# A word w stands for the uniform (w + 1/2) / 2^32, so the noise has a least and a greatest value.
GUMBEL_MIN = -math.log(33 * math.log(2))
GUMBEL_MAX = -math.log(-math.log1p(-(2.0**-33)))
# No token this far below the best logit can win: the largest noise does not make up for it. The
# last term is far above the rounding of any sum of the two in float32.
HOPELESS = GUMBEL_MIN - GUMBEL_MAX - 1e-3

# How much whole-vocabulary noise is made at once: this bounds its int64 temporaries. On a CPU they
# should stay in the cache; four times as much takes twice as long a token there.
_NOISE_AT_ONCE, _NOISE_AT_ONCE_CPU = 2**24, 2**16

# exp(x) = 2^n exp(r), |r| <= ln(2) / 2: n ln(2) in two parts keeps r exact, and the polynomial is
# the best of degree 4 for (exp(r) - 1 - r) / r^2.
LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 355 / 512, -2.12194440e-4
EXP_POLYNOMIAL = (1.381459879e-3, 8.368716575e-3, 4.166838899e-2, 1.666652113e-1, 4.999999404e-1)
# Masses are whole numbers of 2^-34: what is smaller than half of that is 0, and float64 holds the
# sum of 2^19 of them exactly.
MASS_BITS = 34
LEAST_MASS_LOG = -32.0
# Far above the error of a mass, relative to it.
_MASS_SLACK = 1e-4


def philox4x32(counter: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. counter: [4, ...], key: [2, ...] (broadcast) -> four words [...]; all int64
    tensors that hold uint32 words."""
    # The two halves of a round are one operation on a pair: words 0 and 2 are multiplied, words 1
    # and 3 only meet an xor. Int64 products wrap, which spares their bits; what is above bit 31 of
    # a word or a key stays until the mask that follows the next xor.
    multiplied, plain = counter[0::2], counter[1::2]
    along_pair = (2,) + (1,) * (counter.ndim - 1)
    multipliers = counter.new_tensor(_MULTIPLIERS).view(along_pair)
    weyl = counter.new_tensor(_WEYL).view(along_pair)
    for _ in range(_ROUNDS):
        products = (multiplied * multipliers).flip(0)
        multiplied = products >> 32
        multiplied.bitwise_xor_(plain).bitwise_xor_(key).bitwise_and_(_LOW_32)
        plain = products
        key = key + weyl
    plain &= _LOW_32
    return multiplied[0], plain[0], multiplied[1], plain[1]


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token.

    seeds, positions: [R] int64 -> [R, vocab_size] float32. Token v of a row takes lane `v & 3` of
    the Philox counter (v >> 2, low word of the position, its high word, 0) under the key (low word
    of the seed, its high word): no number depends on other rows, and any subset can be made alone.
    """
    blocks = torch.arange(-(-vocab_size // _LANES), device=seeds.device)
    words = _words(seeds, positions, blocks.expand(len(seeds), -1))
    return _gumbel(torch.stack(words, dim=-1).flatten(1)[:, :vocab_size])


def gumbel_noise_at(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """`gumbel_noise` of some tokens only: seeds, positions [R] and token_ids [R, N] int64 ->
    [R, N] float32, equal bit for bit to the same entries of the whole."""
    words = _words(seeds, positions, token_ids >> 2)
    return _gumbel(torch.stack(words).gather(0, (token_ids & 3)[None])[0])


def sample_tokens(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    out: Tensor,
) -> None:
    """See `headrace_kernels.ops.sampling.sample_tokens`."""
    best = logits.argmax(-1)
    best_logit = logits.gather(-1, best[:, None])
    tokens = best
    random = temperature > 0
    ordered = random & ((top_k > 0) & (top_k < logits.shape[-1]) | (top_p < 1))
    columns = {
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seeds": seeds,
        "positions": positions,
    }
    for mask, draw in ((random & ~ordered, _draw_unordered), (ordered, _draw_ordered)):
        if not mask.any():
            continue
        rows = mask.nonzero()[:, 0]
        of_rows = {name: column[rows].to(logits.device) for name, column in columns.items()}
        divisor = temperature[rows].to(logits.device)
        rows = rows.to(logits.device)
        # The best logit becomes 0, so that no temperature overflows upwards.
        scaled = logits.index_select(0, rows).sub_(best_logit[rows]).div_(divisor[:, None])
        tokens[rows] = draw(scaled, **of_rows)
    # argmax takes NaN for the largest of all, so one look at the best logit tells a broken row.
    out.copy_(torch.where(best_logit[:, 0].isfinite(), tokens, -1))


def apply_penalties(
    logits: Tensor,
    *,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """See `headrace_kernels.ops.sampling.apply_penalties`."""
    values = logits[rows, token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * output_counts + presence * (output_counts > 0)
    logits[rows, token_ids] = values


def token_logprobs(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor
) -> None:
    """See `headrace_kernels.ops.sampling.token_logprobs`."""
    every = logits.log_softmax(-1)
    logprobs.copy_(every.gather(-1, token_ids[:, None])[:, 0])
    k = top_ids.shape[1]
    if k == 0:
        return
    # Ranked by logit: two of them can share a float32 log-probability.
    _, ranked = _ranked(logits, logits.topk(k).values[:, -1], min_width=k)
    top_ids.copy_(ranked[:, :k])
    top_logprobs.copy_(every.gather(-1, top_ids))


def _draw_unordered(
    scaled: Tensor,
    *,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Rows whose only filter is min_p, which asks for no order. scaled: [R, V], at most 0."""
    vocab_size = scaled.shape[-1]
    if min_p.any():
        scaled = torch.where(scaled >= _least_of(min_p)[:, None], scaled, -torch.inf)
    survives = scaled >= HOPELESS
    # A gathered token costs as much noise as the four lanes of a whole counter.
    crowded = survives.sum(-1, dtype=torch.int32) * _LANES > vocab_size
    tokens = torch.empty_like(seeds)
    rows = crowded.nonzero()[:, 0]
    at_once = _NOISE_AT_ONCE if scaled.is_cuda else _NOISE_AT_ONCE_CPU
    at_once = max(at_once // vocab_size, 1)
    for start in range(0, len(rows), at_once):
        chunk = rows[start : start + at_once]
        scores = gumbel_noise(seeds[chunk], positions[chunk], vocab_size)
        scores += scaled.index_select(0, chunk)
        tokens[chunk] = scores.argmax(-1)
    rows = (~crowded).nonzero()[:, 0]
    if len(rows) > 0:
        values, ids = _compacted(scaled.index_select(0, rows), survives[rows])
        tokens[rows] = _best_of(values, ids, seeds[rows], positions[rows])
    return tokens


def _draw_ordered(
    scaled: Tensor,
    *,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Rows with top_k or top_p. scaled: [R, V], at most 0.

    Each filter first gives a bound that all its survivors reach; only what reaches the bound is
    sorted, and the exact cut is made there.
    """
    vocab_size = scaled.shape[-1]
    limited = (top_k > 0) & (top_k < vocab_size)
    k = torch.where(limited, top_k, vocab_size).long()
    least = _least_of(min_p)
    if limited.all():
        total = torch.zeros_like(least, dtype=torch.float64)
    else:
        total = masses(scaled).sum(-1, dtype=torch.float64)
    # The tokens that weigh less than this weigh less than 1 - top_p together: none is in the
    # nucleus. One unit is more than the rounding of a mass.
    tail = (1 - top_p.double()) * total / vocab_size - 1
    tail = (tail.clamp(min=0.25) * 2.0**-MASS_BITS).log() - _MASS_SLACK
    threshold = torch.maximum(tail.float(), least)
    if limited.any():
        largest = scaled.topk(int(torch.where(limited, k, 1).max())).values
        kth = largest.gather(-1, (k[:, None] - 1).clamp(max=largest.shape[-1] - 1))[:, 0]
        # Not raised by min_p: top_p weighs all that top_k leaves.
        threshold = torch.where(limited, kth, threshold)

    values, ids = _ranked(scaled, threshold)
    rank = torch.arange(values.shape[-1], device=values.device)
    mass = masses(values).double()
    mass_up_to = mass.cumsum(-1)
    mass_left = mass_up_to.gather(-1, (k[:, None] - 1).clamp(max=len(rank) - 1))[:, 0]
    mass_left = torch.where(limited, mass_left, total)
    nucleus = torch.where(top_p < 1, top_p.double() * mass_left, torch.inf)
    survives = (
        (rank < k[:, None]) & (mass_up_to - mass < nucleus[:, None]) & (values >= least[:, None])
    )
    width = max(int(survives.sum(-1).max()), 1)
    values = values.masked_fill_(~survives, -torch.inf)[:, :width]
    return _best_of(values, ids[:, :width], seeds, positions)


def masses(scaled: Tensor) -> Tensor:
    """exp(scaled), of scaled logits [R, V] float32, at most 0, in whole numbers of 2^-34: float32.

    Of products and sums that each round to float32, and nothing else: every implementation gets
    the same bits, and sums of whole numbers have no order. So all agree on every nucleus.
    """
    x = scaled.clamp(min=LEAST_MASS_LOG)
    n = (x * LOG2_E).round_()
    r = x.sub_(n * LN2_HIGH).sub_(n * LN2_LOW)
    p = torch.full_like(r, EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        p.mul_(r).add_(coefficient)
    p.mul_(r * r).add_(r.add_(1.0))
    power = n.to(torch.int32).add_(127 + MASS_BITS).bitwise_left_shift_(23)
    return p.mul_(power.view(torch.float32)).round_()


def _least_of(min_p: Tensor) -> Tensor:
    """The least scaled logit that min_p [R] leaves. By way of float64, which hides the last-bit
    differences between one math library's logarithm and another's."""
    return min_p.double().log_().float()


def _best_of(values: Tensor, ids: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The id with the largest value + noise, the lowest of equals. All [R, N] but the last two."""
    scores = values + gumbel_noise_at(seeds, positions, ids)
    beaten = scores < scores.amax(-1, keepdim=True)
    return ids.masked_fill(beaten, torch.iinfo(torch.int64).max).amin(-1)


def _compacted(values: Tensor, keep: Tensor, *, min_width: int = 1) -> tuple[Tensor, Tensor]:
    """The kept entries of each row, in order, moved to its front.

    values, keep: [R, V] -> values [R, N], ids [R, N], where N is the largest number kept in a row,
    or min_width; the rest is (-inf, 0).
    """
    rows, ids = keep.nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(values))
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    width = max(int(counts.max()), min_width)
    front = values.new_full((len(values), width), -torch.inf)
    front_ids = ids.new_zeros((len(values), width))
    front[rows, slots] = values[rows, ids]
    front_ids[rows, slots] = ids
    return front, front_ids


def _ranked(values: Tensor, threshold: Tensor, *, min_width: int = 1) -> tuple[Tensor, Tensor]:
    """The entries of each row of values [R, V] that reach threshold [R], best first and the lower
    id first of equals, as `_compacted` lays them out."""
    front, ids = _compacted(values, values >= threshold[:, None], min_width=min_width)
    front, order = torch.sort(front, dim=-1, descending=True, stable=True)
    return front, ids.gather(-1, order)


def _words(
    seeds: Tensor, positions: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """seeds, positions: [R]; blocks: [R, C] -> the four words [R, C] of each block."""
    counter = blocks.new_zeros((4, *blocks.shape))
    counter[0] = blocks
    counter[1] = (positions & _LOW_32)[:, None]
    counter[2] = ((positions >> 32) & _LOW_32)[:, None]
    return philox4x32(counter, torch.stack((seeds, seeds >> 32))[..., None] & _LOW_32)


def _gumbel(words: Tensor) -> Tensor:
    # float64 holds every (w + 1/2) / 2^32 exactly; float32 would round the largest to 1. It also
    # hides the last-bit differences between one math library's logarithm and another's.
    uniform = words.to(torch.float64).add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_().to(torch.float32)
