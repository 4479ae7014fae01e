"""Sampling against the published Philox answers, a naive float64 sampler, exact probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace_kernels.ops import sampling
from headrace_kernels.reference import sampling as reference

INF = math.inf
LOW_32 = 0xFFFFFFFF


def columns(rows: int, **values: Any) -> dict[str, Tensor]:
    """Sampling columns of `rows` rows; the noise of each row is another position of one seed."""
    defaults: dict[str, tuple[Any, torch.dtype]] = {
        "temperature": (1.0, torch.float32),
        "top_k": (0, torch.int32),
        "top_p": (1.0, torch.float32),
        "min_p": (0.0, torch.float32),
        "seeds": (1234, torch.int64),
        "positions": (torch.arange(rows), torch.int64),
    }
    return {
        name: torch.as_tensor(values.get(name, default), dtype=dtype).expand(rows).clone()
        for name, (default, dtype) in defaults.items()
    }


def philox_of_ints(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW_32, (k1 + 0xBB67AE85) & LOW_32
    return [c0, c1, c2, c3]


# The known answers that Random123 publishes for philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([LOW_32] * 4, [LOW_32] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: list[int], key: list[int], expected: str
) -> None:
    words = reference.philox4x32(torch.tensor(counter), torch.tensor(key))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 + 5, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("position", [0, 77, 2**32 + 3])
def test_noise_is_keyed_by_seed_position_and_token(seed: int, position: int) -> None:
    expected = []
    for token in range(11):
        counter = [token >> 2, position & LOW_32, position >> 32, 0]
        word = philox_of_ints(counter, [seed & LOW_32, (seed >> 32) & LOW_32])[token & 3]
        expected.append(-math.log(-math.log((word + 0.5) / 2**32)))
    noise = reference.gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 11)
    torch.testing.assert_close(noise, torch.tensor([expected]), rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 1021, 49155])
def test_noise_is_the_same_bits_alone_batched_and_gathered(vocab_size: int) -> None:
    seeds, positions = torch.tensor([3, -9, 3]), torch.tensor([5, 5, 2**40])
    whole = reference.gumbel_noise(seeds, positions, vocab_size)
    assert whole.shape == (3, vocab_size)
    assert not torch.equal(whole[0], whole[1]) and not torch.equal(whole[0], whole[2])
    for row in range(3):
        alone = reference.gumbel_noise(seeds[row : row + 1], positions[row : row + 1], vocab_size)
        assert torch.equal(alone[0], whole[row])
    for count in (1, 7, vocab_size):
        ids = torch.randint(vocab_size, (3, count))
        gathered = reference.gumbel_noise_at(seeds, positions, ids)
        assert torch.equal(gathered, whole.gather(1, ids))


def test_extreme_words_give_the_bounds_of_the_noise() -> None:
    noise = reference._gumbel(torch.tensor([0, LOW_32]))
    expected = torch.tensor([reference.GUMBEL_MIN, reference.GUMBEL_MAX])
    torch.testing.assert_close(noise, expected, rtol=1e-7, atol=0)
    assert pytest.approx(33 * math.log(2), rel=1e-9) == reference.GUMBEL_MAX


@settings(max_examples=40, deadline=None)
@given(
    spread=st.sampled_from([0.1, 1.0, 5.0, 20.0, 1000.0]),
    temperature=st.sampled_from([0.01, 0.3, 1.0, 30.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_pruning_never_changes_the_token(spread: float, temperature: float, seed: int) -> None:
    rows, vocab_size = 4, 2003
    generator = torch.Generator().manual_seed(seed % 2**63)
    logits = torch.randn(rows, vocab_size, generator=generator) * spread
    given_columns = columns(rows, temperature=temperature, seeds=seed)
    noise = reference.gumbel_noise(given_columns["seeds"], given_columns["positions"], vocab_size)
    scaled = (logits - logits.amax(-1, keepdim=True)) / given_columns["temperature"][:, None]
    tokens = sampling.sample_tokens(logits, **given_columns)
    assert torch.equal(tokens, (scaled + noise).argmax(-1))


def naive_token(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    noise: list[float],
) -> int | None:
    """The token, in Python floats; None where float32 may rightly decide otherwise."""
    best = max(logits)
    scaled = [(logit - best) / temperature for logit in logits]
    # Ranked as float32 sees them: logits that differ by less than it can hold beside the best tie.
    ranks = torch.tensor(logits).sub(best).div(temperature).tolist()
    order = sorted(range(len(logits)), key=lambda token: (-ranks[token], token))
    if 0 < top_k < len(order):
        order = order[:top_k]
    if top_p < 1:
        total = math.fsum(math.exp(scaled[token]) for token in order)
        share, kept = 0.0, []
        for token in order:
            if abs(share - top_p) < 1e-5:
                return None
            if share >= top_p:
                break
            kept.append(token)
            share += math.exp(scaled[token]) / total
        order = kept
    ratios = [math.exp(scaled[token]) for token in order]
    if any(abs(ratio - min_p) < 1e-5 * min_p for ratio in ratios):
        return None
    order = [token for token, ratio in zip(order, ratios, strict=True) if ratio >= min_p]
    scores = sorted(((scaled[token] + noise[token], token) for token in order), reverse=True)
    if len(scores) > 1 and scores[0][0] - scores[1][0] < 1e-4:
        return None
    return scores[0][1]


plain_logits = st.floats(-12, 12, width=32)
tied_logits = st.sampled_from([-3.0, 0.0, 1.0, 1.5])
wild_logits = st.sampled_from([-INF, -3e38, -1e30, -5.0, 0.0, -0.0, 2.0, 2.0])
huge_logits = st.sampled_from([-INF, 3e38, 2.9e38, 1e30, 0.0])


@example(logits=[1.0, -3.3e-27, 0.0], temperature=2.5, top_k=0, top_p=0.5, min_p=0.0)
@settings(max_examples=300, deadline=None)
@given(
    logits=st.sampled_from([plain_logits, tied_logits, wild_logits, huge_logits]).flatmap(
        lambda kind: st.lists(kind, min_size=1, max_size=70)
    ),
    temperature=st.sampled_from([1e-6, 0.3, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 3, 5, 40, 1000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.8, 0.95, 0.9999999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-3, 0.2, 0.999]),
)
def test_filters_agree_with_a_naive_sampler(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    assume(max(logits) > -INF)
    rows = 12
    given_columns = columns(rows, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    noise = reference.gumbel_noise(
        given_columns["seeds"], given_columns["positions"], len(logits)
    ).tolist()
    batch = torch.tensor(logits, dtype=torch.float32).expand(rows, -1)
    tokens = sampling.sample_tokens(batch, **given_columns).tolist()
    exact = batch[0].tolist()
    # As float32 sees them: 0.1 is not 0.1 there.
    seen = [float(given_columns[name][0]) for name in ("temperature", "top_p", "min_p")]
    for row in range(rows):
        expected = naive_token(exact, seen[0], top_k, seen[1], seen[2], noise[row])
        assert expected is None or tokens[row] == expected


# Token i has probability LIKELY[i].
LIKELY = [0.05, 0.4, 0.2, 0.15, 0.1, 0.06, 0.04]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, LIKELY),
        # softmax(logits / 0.5): the squares.
        ({"temperature": 0.5}, [p * p for p in LIKELY]),
        # top_k leaves 0.4 0.2 0.15; their shares are 0.53 0.27 0.2, so that two reach 0.7. Of the
        # whole they would be 0.6 together, and three would stay.
        ({"top_k": 3, "top_p": 0.7}, [0, 0.4, 0.2, 0, 0, 0, 0]),
        ({"top_p": 0.7}, [0, 0.4, 0.2, 0.15, 0, 0, 0]),
        # Temperature before top_p: of the squares, 0.16 and 0.04 are already 0.8.
        ({"temperature": 0.5, "top_p": 0.7}, [0, 0.16, 0.04, 0, 0, 0, 0]),
        # Temperature before min_p: 0.15^2 / 0.4^2 is 0.14.
        ({"temperature": 0.5, "min_p": 0.2}, [0, 0.16, 0.04, 0, 0, 0, 0]),
        ({"min_p": 0.2}, [0, 0.4, 0.2, 0.15, 0.1, 0, 0]),
        # top_p before min_p: of what min_p leaves, three would reach 0.8; of all, four are needed.
        ({"top_p": 0.8, "min_p": 0.2}, [0, 0.4, 0.2, 0.15, 0.1, 0, 0]),
        # The same after top_k: 0.83 of 0.91 takes four, 0.83 of 0.85 would take three.
        ({"top_k": 5, "top_p": 0.83, "min_p": 0.2}, [0, 0.4, 0.2, 0.15, 0.1, 0, 0]),
    ],
)
@pytest.mark.parametrize("varied", ["positions", "seeds"])
def test_draws_follow_the_exact_distribution(
    filters: dict[str, float], expected: list[float], varied: str
) -> None:
    draws = 20_000
    logits = torch.tensor(LIKELY).log().expand(draws, -1)
    drawn_columns = columns(draws, **{"positions": 7, varied: torch.arange(draws), **filters})
    counts = sampling.sample_tokens(logits, **drawn_columns).bincount(minlength=len(LIKELY))
    probabilities = torch.tensor(expected, dtype=torch.float64)
    probabilities /= probabilities.sum()
    support = probabilities > 0
    assert counts[~support].sum() == 0
    means = draws * probabilities[support]
    chi_square = float(((counts[support] - means) ** 2 / means).sum())
    degrees = int(support.sum()) - 1
    # Five standard deviations above the mean of chi-square; the draws are the same in every run.
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("vocab_size", [500, 499])
def test_equal_logits_survive_from_the_lowest_id_up(vocab_size: int) -> None:
    rows = 1000
    logits = torch.zeros(rows, vocab_size)
    nucleus = sampling.sample_tokens(logits, **columns(rows, top_p=0.5))
    # One more token may slip in by the rounding of the row's mass.
    assert vocab_size // 2 - 3 < int(nucleus.max()) <= vocab_size // 2 + 1
    assert set(sampling.sample_tokens(logits, **columns(rows, top_k=6)).tolist()) == set(range(6))


def test_a_spread_nucleus_is_found_in_a_large_vocabulary() -> None:
    vocab_size, rows, top_p = 49_155, 12, 0.9
    logits = torch.randn(1, vocab_size) * 0.5
    made = columns(rows, top_p=top_p)
    noise = reference.gumbel_noise(made["seeds"], made["positions"], vocab_size)
    probabilities, order = logits[0].double().softmax(0).sort(descending=True, stable=True)
    kept = order[probabilities.cumsum(0) - probabilities < top_p]
    assert len(kept) > 20_000
    scores = torch.full((rows, vocab_size), -INF)
    scores[:, kept] = logits[0, kept] + noise[:, kept]
    tokens = sampling.sample_tokens(logits.expand(rows, -1), **made)
    assert torch.equal(tokens, scores.argmax(-1))


def mixed_batch(vocab_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """One row of every kind, twice over with other parameters."""
    made = columns(
        10,
        temperature=torch.tensor([0.0, 1, 1, 0.7, 1, 0.2, 1.5, 0, 0.9, 1]),
        top_k=torch.tensor([0, 0, 40, 0, 5, 0, 1000, 3, 0, 0]),
        top_p=torch.tensor([1.0, 1, 1, 0.9, 0.95, 1, 0.5, 0.3, 0.99, 1]),
        min_p=torch.tensor([0.0, 0, 0, 0.05, 0.1, 0, 0, 0, 0, 0.1]),
        seeds=torch.arange(10) * 2**40 - 5,
    )
    return torch.randn(10, vocab_size) * 3, made


@pytest.mark.parametrize("vocab_size", [33, 49_155])
def test_a_row_is_the_same_in_every_batch(vocab_size: int) -> None:
    logits, made = mixed_batch(vocab_size)
    together = sampling.sample_tokens(logits, **made)
    for subset in ([3], [9, 1, 4], [1, 1], *([row] for row in range(10)), list(range(9, -1, -1))):
        rows = torch.tensor(subset)
        part = sampling.sample_tokens(logits[rows], **{k: v[rows] for k, v in made.items()})
        assert torch.equal(part, together[rows])


@pytest.mark.parametrize("broken", [[math.nan, 0, 1], [INF, 0, 1], [-INF] * 3, [INF, math.nan, 0]])
def test_a_row_without_a_distribution_gives_no_token_and_harms_no_other(
    broken: list[float],
) -> None:
    logits, made = mixed_batch(3)
    expected = sampling.sample_tokens(logits, **made)
    assert (expected >= 0).all()
    for row in range(len(logits)):
        damaged = logits.clone()
        damaged[row] = torch.tensor(broken)
        tokens = sampling.sample_tokens(damaged, **made)
        assert tokens[row] == -1
        assert torch.equal(tokens[torch.arange(10) != row], expected[torch.arange(10) != row])


def test_greedy_takes_the_lowest_of_equal_ids_and_ignores_the_filters() -> None:
    logits = torch.tensor([[1.0, 5, 5, 0], [-INF, -2, -3, -2]])
    tokens = sampling.sample_tokens(logits, **columns(2, temperature=0, top_k=1, top_p=0.1))
    assert tokens.tolist() == [1, 1]


def test_penalties_follow_their_formulas_and_touch_only_what_is_listed() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, 0.0], [2.0, -2.0, 3.0, -INF]])
    before = logits.clone()
    sampling.apply_penalties(
        logits,
        rows=torch.tensor([0, 0, 0, 1, 1]),
        token_ids=torch.tensor([0, 1, 2, 2, 3]),
        output_counts=torch.tensor([3, 1, 0, 2, 1]),
        presence=torch.tensor([0.5, 0.5, 0.5, 0.0, 0.0]),
        frequency=torch.tensor([0.25, 0.25, 0.25, -1.0, -1.0]),
        repetition=torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0]),
    )
    # Row 0: 2/2 - (3 * .25 + .5); -2*2 - (.25 + .5); 3/2, of the prompt only. Row 1: 3 + 2.
    assert logits.tolist() == [[-0.25, -4.75, 1.5, 0.0], [2.0, -2.0, 5.0, -INF]]
    assert torch.equal(logits[1, :2], before[1, :2])


@pytest.mark.parametrize("vocab_size", [1, 3, 50, 49_155])
@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_token_logprobs_are_those_of_the_softmax(vocab_size: int, k: int) -> None:
    logits = torch.randn(5, vocab_size) * 4
    ids = torch.randint(vocab_size, (5,))
    chosen, top_ids, top = sampling.token_logprobs(logits, ids, k)
    exact = logits.double().log_softmax(-1)
    expected = exact.sort(-1, descending=True)
    count = min(k, vocab_size)
    assert top_ids.shape == top.shape == (5, count)
    # float32 logarithms of sums of up to 50 000 float32 exponentials.
    own = exact.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(chosen.double(), own, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(top.double(), expected.values[:, :count], rtol=1e-6, atol=5e-6)
    assert torch.equal(top_ids, expected.indices[:, :count])
    for row in range(5):
        alone = sampling.token_logprobs(logits[row : row + 1], ids[row : row + 1], k)
        for one, all_rows in zip(alone, (chosen, top_ids, top), strict=True):
            assert torch.equal(one[0], all_rows[row])


def test_equal_logits_are_listed_from_the_lowest_id_up() -> None:
    logits = torch.tensor([[0.0, 2, 2, -INF, 0, 0], [1.0, 1, 1, 1, 1, 1]])
    _, top_ids, top = sampling.token_logprobs(logits, torch.tensor([1, 1]), 4)
    assert top_ids.tolist() == [[1, 2, 0, 4], [0, 1, 2, 3]]
    fewer = sampling.token_logprobs(logits, torch.tensor([1, 1]), 2)
    assert torch.equal(fewer[1], top_ids[:, :2])
    assert torch.equal(fewer[2], top[:, :2])


def test_logprobs_of_a_broken_row_are_nan_and_harm_no_other() -> None:
    logits, ids = torch.randn(2, 9), torch.tensor([4, 5])
    expected = sampling.token_logprobs(logits, ids, 3)
    logits[0, 2] = math.nan
    for rows in ([0, 1], [0]):
        chosen, top_ids, top = sampling.token_logprobs(logits[rows], ids[rows], 3)
        assert chosen[0].isnan() and top[0].isnan().all()
        assert top_ids.shape == top.shape == (len(rows), 3)
        for values, whole in zip((chosen, top_ids, top), expected, strict=True):
            assert torch.equal(values[1:], whole[1 : len(rows)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 4, dtype=torch.bfloat16)}, "logits must be .* torch.bfloat16"),
        ({"logits": torch.zeros(8)}, r"logits must be \[rows, vocabulary\] .* got \[8\]"),
        ({"logits": torch.zeros(2, 0)}, r"got \[2, 0\]"),
        (
            {"top_k": torch.zeros(2)},
            r"top_k must be \[2\] torch.int32 on cpu, .* got \[2\] torch.float32",
        ),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds must be .* got \[3\]"),
        (
            {"positions": torch.zeros(2, dtype=torch.int64, device="meta")},
            r"positions must be .* on cpu, as the logits are, got .* on meta",
        ),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 4), **columns(2), **change}
    with pytest.raises(ValueError, match=message):
        sampling.sample_tokens(**arguments)


def test_wrong_logprob_and_penalty_arguments_are_named() -> None:
    logits, ids = torch.zeros(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"k must be in \[0, 20\], got 21"):
        sampling.token_logprobs(logits, ids, 21)
    with pytest.raises(ValueError, match=r"token_ids must be \[2\] torch.int64, got \[1\]"):
        sampling.token_logprobs(logits, ids[:1], 1)
    floats = torch.zeros(2)
    with pytest.raises(ValueError, match=r"must share a shape \[N\]"):
        sampling.apply_penalties(
            logits,
            rows=ids,
            token_ids=ids,
            output_counts=ids[:1],
            presence=floats,
            frequency=floats,
            repetition=floats,
        )
