"""The C++ sampling kernels give the reference's tokens: all of them, at every filter and border."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace_kernels import native
from headrace_kernels.cpu.fallback import log_once
from headrace_kernels.ops import sampling as ops
from headrace_kernels.reference import sampling as reference
from headrace_kernels.testing import (
    LOGIT_STYLES,
    random_logits,
    random_sampling_columns,
    sampling_columns,
)

if reason := native.unavailable():
    pytest.skip(f"native kernels: {reason}", allow_module_level=True)

from headrace_kernels.cpu import sampling as kernels

pytestmark = pytest.mark.usefixtures("isa", "no_fallback")

INF = math.inf
# Partial vectors, blocks of noise, blocks of groups and chunks.
BORDERS = (1, 2, 15, 16, 17, 63, 64, 65, 100, 1023, 1025, 8191, 8192, 8193, 16400)


@pytest.fixture
def no_fallback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails a test in which the kernels refused a call and the reference answered."""
    log_once.cache_clear()
    caplog.set_level(logging.INFO, "headrace_kernels")
    yield
    assert not [record.message for record in caplog.records if "reference" in record.message]


def both(logits: Tensor, **made: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of the kernels, and of the reference."""
    outs = []
    for module in (kernels, reference):
        out = torch.full((len(logits),), -7)
        module.sample_tokens(logits, **made, out=out)
        outs.append(out)
    return outs[0], outs[1]


def assert_same(logits: Tensor, made: dict[str, Tensor]) -> None:
    got, expected = both(logits, **made)
    for row in (got != expected).nonzero()[:, 0].tolist():
        of_row = {name: column[row].item() for name, column in made.items()}
        raise AssertionError(f"row {row}: {got[row]}, not {expected[row]}; {of_row}")


@pytest.mark.parametrize("vocab_size", BORDERS)
def test_every_filter_on_every_kind_of_logits(vocab_size: int) -> None:
    rows = 24 if vocab_size < 5000 else 8
    for seed, style in enumerate(LOGIT_STYLES):
        assert_same(
            random_logits(style, rows, vocab_size, seed),
            random_sampling_columns(rows, vocab_size, seed + vocab_size),
        )


@settings(
    max_examples=60,
    deadline=None,
    # The fixtures hold for the whole test.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    style=st.sampled_from(sorted(LOGIT_STYLES)),
    vocab_size=st.integers(1, 400),
    seed=st.integers(0, 2**32),
)
def test_generated_rows(style: str, vocab_size: int, seed: int) -> None:
    rows = 32
    assert_same(
        random_logits(style, rows, vocab_size, seed),
        random_sampling_columns(rows, vocab_size, seed),
    )


@pytest.mark.parametrize("vocab_size", [49_152, 151_936])
@pytest.mark.parametrize("style", ["flat", "spread", "peaked", "ties"])
def test_large_vocabularies(vocab_size: int, style: str, threads: int) -> None:
    logits = random_logits(style, 7, vocab_size, 5)
    made = sampling_columns(
        7,
        temperature=torch.tensor([0.0, 1, 0.7, 1, 1, 1.5, 1]),
        top_k=torch.tensor([0, 0, 0, 50, 40_000, 0, 5000]),
        top_p=torch.tensor([1.0, 1, 0.95, 0.9, 1, 0.3, 0.8]),
        min_p=torch.tensor([0.0, 0, 0, 0, 0, 0.01, 0]),
    )
    assert_same(logits, made)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_nearly_equal_scores(temperature: float) -> None:
    """Every token scores about the same, within float32's rounding and many times that: a filter
    that passed over one too many would lose the best. All noise is there, up to its bounds."""
    rows, vocab_size = 200, 3000
    generator = torch.Generator().manual_seed(int(100 * temperature))
    made = sampling_columns(rows, temperature=temperature)
    noise = reference.gumbel_noise(made["seeds"], made["positions"], vocab_size)
    for spread in (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        wobble = torch.rand(rows, vocab_size, generator=generator) * spread
        assert_same((wobble - noise) * temperature, made)


def test_nearly_equal_scores_where_the_filter_is_tightest() -> None:
    """1 - u, its lowest eight bits cut off, is nearest to -log(u) around 2e-4: only tokens with
    such noise compete. Besides the kernel's slack there are about 2e-4 of room there."""
    rows, vocab_size = 1500, 2500
    made = sampling_columns(rows)
    noise = reference.gumbel_noise(made["seeds"], made["positions"], vocab_size)
    tight = (noise > 7) & (noise < 10)
    for spread in (0.0, 1e-6, 1e-5, 1e-4):
        wobble = torch.rand(rows, vocab_size) * spread
        logits = torch.where(tight, wobble - noise, torch.full_like(noise, -60.0))
        assert_same(logits, made)


def test_the_filter_of_the_draw_is_a_bound() -> None:
    """-log(u) >= 1 - u as the kernel rounds them, for words at both ends and between: the filter
    compares the upper 24 bits of the complement with an exponential whose exponent has 1e-4 of
    slack."""
    ends = torch.arange(2**16)
    middle = torch.randint(2**32, (2**20,), generator=torch.Generator().manual_seed(0))
    words = torch.cat((ends, 2**32 - 1 - ends, middle))
    complement = ((2**32 - 1 - words) >> 8).double() * 2.0**-24
    exponential = -((words.double() + 0.5) * 2.0**-32).log()
    assert (complement <= exponential).all()
    # How much of the slack is left when scores, noise and the exponential are float32's: a token
    # that ties with a score b has scaled - b = -noise, up to rounding.
    noise = reference._gumbel(words)
    lead = (-noise + 1e-4).float()
    assert (complement <= lead.double().exp() * (1 - 1e-6)).all()


def test_equal_scores_take_the_lowest_token() -> None:
    """float32 scores of a large row meet often; so do those of logits that are all -1e30 apart."""
    rows, vocab_size = 3000, 40
    made = sampling_columns(rows)
    noise = reference.gumbel_noise(made["seeds"], made["positions"], vocab_size)
    # Rounded to 1/8, scores tie in most rows.
    logits = (noise * 8).round() / 8 - noise
    scores = (logits - logits.amax(-1, keepdim=True)) + noise
    tied = (scores == scores.amax(-1, keepdim=True)).sum(-1) > 1
    assert tied.float().mean() > 0.01
    assert_same(logits, made)


def test_borders_of_the_nucleus_are_exact() -> None:
    """Equal tokens, and a top_p that ends between two of them: masses are counted, not measured."""
    rows = 300
    for vocab_size in (2, 4, 8, 10, 1000):
        for kept in {1, vocab_size // 2, vocab_size - 1}:
            exact = torch.tensor(kept / vocab_size, dtype=torch.float32)
            if float(exact) * vocab_size != kept:
                continue
            up = torch.nextafter(exact, torch.tensor(1.0))
            for top_p, last in ((exact, kept), (up, min(kept + 1, vocab_size))):
                for top_k in (0, vocab_size):
                    made = sampling_columns(rows, top_p=float(top_p), top_k=top_k)
                    got, expected = both(torch.zeros(rows, vocab_size), **made)
                    assert torch.equal(got, expected)
                    assert int(got.max()) < last


@pytest.mark.parametrize("vocab_size", [1, 3, 20_000])
def test_rows_without_a_distribution(vocab_size: int, threads: int) -> None:
    rows = 40
    made = random_sampling_columns(rows, vocab_size, 3)
    logits = random_logits("spread", rows, vocab_size, 3)
    expected = both(logits, **made)[1]
    for value in (math.nan, -math.nan, INF):
        for token in {0, vocab_size // 2, vocab_size - 1}:
            damaged = logits.clone()
            damaged[::3, token] = value
            got = both(damaged, **made)[0]
            assert (got[::3] == -1).all()
            assert torch.equal(got[1::3], expected[1::3])
    banned = torch.full_like(logits, -INF)
    assert both(banned, **made)[0].tolist() == [-1] * rows


def test_a_row_is_the_same_in_every_batch_and_on_every_number_of_threads(threads: int) -> None:
    rows, vocab_size = 12, 30_000
    wide = torch.randn(rows, vocab_size + 3)
    logits, made = wide[:, :vocab_size], random_sampling_columns(rows, vocab_size, 8)
    together, expected = both(logits, **made)
    assert torch.equal(together, expected)
    for subset in ([3], [11, 0, 5], [7, 7], list(range(11, -1, -1))):
        part = both(logits[subset], **{name: column[subset] for name, column in made.items()})[0]
        assert torch.equal(part, together[subset])


def test_opcheck() -> None:
    logits, scratch = torch.randn(3, 9000), torch.empty(8192, dtype=torch.uint8)
    columns_of_3 = list(random_sampling_columns(3, 9000, 1).values())
    ids = torch.arange(3)
    sample, logprobs = kernels._sample_tokens, kernels._token_logprobs
    torch.library.opcheck(sample, (logits, *columns_of_3, scratch, torch.empty_like(ids)))
    torch.library.opcheck(
        logprobs,
        (logits, ids, scratch, torch.empty(3), ids.new_empty(3, 5), torch.empty(3, 5)),
    )


def test_no_rows() -> None:
    assert both(torch.empty(0, 9), **sampling_columns(0))[0].shape == (0,)


@pytest.mark.parametrize("vocab_size", BORDERS)
@pytest.mark.parametrize("k", [0, 1, 20])
def test_logprobs(vocab_size: int, k: int) -> None:
    k = min(k, vocab_size)
    for style in ("flat", "spread", "peaked", "equal", "ties", "banned", "far apart"):
        logits = random_logits(style, 5, vocab_size, 2)
        ids = torch.randint(vocab_size, (5,))
        exact = logits.double().log_softmax(-1)
        order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        logprobs, top = torch.full((5,), 7.0), torch.full((5, k), 7.0)
        top_ids = torch.full((5, k), -7)
        kernels.token_logprobs(logits, ids, logprobs, top_ids, top)
        assert torch.equal(top_ids, order)
        expected = exact.gather(1, ids[:, None])[:, 0].float(), exact.gather(1, order).float()
        for got, want in zip((logprobs, top), expected, strict=True):
            # A sum of up to 16 000 float32 exponentials, in 64 parts a chunk.
            torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6)


def test_logprobs_of_a_row_do_not_depend_on_the_others(threads: int) -> None:
    logits = torch.randn(6, 20_001) * 3
    ids = torch.arange(6)
    whole = ops.token_logprobs(logits, ids, 7)
    for row in range(6):
        alone = ops.token_logprobs(logits[row : row + 1], ids[row : row + 1], 7)
        for one, every in zip(alone, whole, strict=True):
            assert torch.equal(one[0], every[row])


@pytest.mark.parametrize("broken", [math.nan, INF])
def test_logprobs_of_a_row_without_a_distribution_are_nan(broken: float) -> None:
    logits = torch.randn(3, 70)
    logits[1, 44] = broken
    logprobs, top_ids, top = ops.token_logprobs(logits, torch.zeros(3, dtype=torch.int64), 4)
    assert logprobs.isnan().tolist() == [False, True, False]
    assert top.isnan().all(-1).tolist() == [False, True, False]
    assert ((top_ids >= 0) & (top_ids < 70)).all()
