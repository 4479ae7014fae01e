"""The Triton sampling kernels give the reference's tokens, at every filter and every border.

In the interpreter, where a row takes a tenth of a second: few rows, chosen for what they reach.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts, choose
from headrace_kernels.ops import sampling as ops
from headrace_kernels.reference import sampling as reference
from headrace_kernels.testing import (
    LOGIT_STYLES,
    random_logits,
    random_sampling_columns,
    sampling_columns,
)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from headrace_kernels.triton import sampling as kernels  # noqa: E402
from headrace_kernels.triton import sampling_row, sampling_tile  # noqa: E402

INF = math.inf
CHUNK = sampling_tile.CHUNK.value


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call keeps of its rows holds garbage at first, as it does on a device."""
    plain = kernels._memory

    def poisoned(rows: int, vocab_size: int, device: torch.device) -> tuple[Tensor, ...]:
        floats, ints, sums = plain(rows, vocab_size, device)
        return floats.fill_(math.nan), ints.fill_(123_456_789), sums.fill_(-(2**62))

    monkeypatch.setattr(kernels, "_memory", poisoned)


def sampled(logits: Tensor, made: dict[str, Tensor]) -> Tensor:
    out = torch.full((len(logits),), -7)
    kernels.sample_tokens(logits, **made, out=out)
    return out


def assert_same(logits: Tensor, made: dict[str, Tensor]) -> Tensor:
    got, expected = sampled(logits, made), torch.full((len(logits),), -7)
    reference.sample_tokens(logits, **made, out=expected)
    for row in (got != expected).nonzero()[:, 0].tolist():
        of_row = {name: column[row].item() for name, column in made.items()}
        raise AssertionError(f"row {row}: {got[row]}, not {expected[row]}; {of_row}")
    return got


@pytest.mark.parametrize("vocab_size", [1, 3, 301])
def test_every_filter_on_every_kind_of_logits(vocab_size: int) -> None:
    rows = [random_logits(style, 2, vocab_size, seed) for seed, style in enumerate(LOGIT_STYLES)]
    logits = torch.cat(rows if vocab_size == 301 else rows[:4])
    assert_same(logits, random_sampling_columns(len(logits), vocab_size, vocab_size))


@pytest.mark.parametrize("vocab_size", [CHUNK, 2 * CHUNK + 1])
def test_rows_of_several_chunks(vocab_size: int) -> None:
    logits = random_logits("spread", 5, vocab_size, vocab_size)
    made = sampling_columns(
        5,
        temperature=torch.tensor([0.0, 1, 0.7, 1, 1.5]),
        top_k=torch.tensor([3, 0, 0, 50, 0]),
        top_p=torch.tensor([0.5, 1, 0.95, 0.9, 0.2]),
        min_p=torch.tensor([0.0, 0.01, 0, 0, 0]),
    )
    assert_same(logits, made)


def test_a_narrow_nucleus_takes_several_draws() -> None:
    """Of equal tokens, so that the first winner is in it with a share of top_p only."""
    rows = 5
    made = sampling_columns(rows, top_p=torch.tensor([1e-6, 0.01, 0.05, 0.05, 0.2]))
    assert_same(torch.zeros(rows, 400), made)


def test_more_tokens_than_a_list_has_room_for() -> None:
    """A k beyond the groups, a k among ties, and all of it once more with a nucleus."""
    vocab_size = CHUNK + 900
    assert vocab_size > sampling_row.LIST.value
    logits = torch.zeros(4, vocab_size)
    logits[:2] = random_logits("flat", 2, vocab_size, 0)
    made = sampling_columns(
        4,
        top_k=torch.tensor([4400, 300, 1000, 7]),
        top_p=torch.tensor([0.999, 1, 1, 0.5]),
    )
    assert_same(logits, made)


def test_fewer_tokens_than_top_k_wants() -> None:
    """A grammar leaves a few tokens, and top_k more than these."""
    logits = torch.full((3, 600), -INF)
    logits[:, 100:110] = torch.arange(10.0)
    logits[2, 300] = 4.0
    made = sampling_columns(3, top_k=torch.tensor([20, 300, 5]), top_p=torch.tensor([0.9, 1, 0.99]))
    assert_same(logits, made)


def test_logits_that_differ_may_be_equally_likely() -> None:
    """Divided by the temperature they meet at 0, and the largest of them is not the first."""
    rows, vocab_size = 6, 50
    logits = random_logits("tiny", rows, vocab_size, 4)
    assert (logits.argmax(-1) > 0).all()
    made = sampling_columns(
        rows,
        temperature=100,
        top_k=torch.tensor([1, 3, 0, 0, 4, 0]),
        top_p=torch.tensor([1, 1, 1e-6, 0.1, 0.5, 1]),
        min_p=torch.tensor([0.5, 0, 0, 1, 0, 1]),
    )
    assert_same(logits, made)


def test_nearly_equal_scores() -> None:
    """Every token scores about the same: the rough noise must not decide between them."""
    rows, vocab_size = 4, 24
    made = sampling_columns(rows, temperature=torch.tensor([0.25, 1, 1, 3]))
    noise = reference.gumbel_noise(made["seeds"], made["positions"], vocab_size)
    wobble = torch.rand(rows, vocab_size) * torch.tensor([[0.0], [1e-6], [1e-5], [1e-4]])
    assert_same((wobble - noise) * made["temperature"][:, None], made)
    # In steps of 1/8 scores tie, and the lowest token is to win.
    logits = (noise * 8).round() / 8 - noise
    assert_same(logits, sampling_columns(rows))


def test_borders_of_the_nucleus_are_exact() -> None:
    """Equal tokens, and a top_p that ends between two of them, or just behind."""
    border = torch.tensor(3 / 8)
    top_p = torch.stack((border, torch.nextafter(border, torch.tensor(1.0)))).repeat(4)
    got = assert_same(torch.zeros(8, 8), sampling_columns(8, top_p=top_p))
    assert int(got[::2].max()) < 3 and int(got[1::2].max()) < 4


@pytest.mark.parametrize("value", [math.nan, -math.nan, INF])
def test_rows_without_a_distribution_give_no_token_and_harm_no_other(value: float) -> None:
    vocab_size = CHUNK + 5
    logits = random_logits("spread", 3, vocab_size, 1)
    made = sampling_columns(3, temperature=torch.tensor([0.0, 0, 1]), top_k=5)
    logits[0, vocab_size - 1] = value
    logits[2, 7] = value
    assert_same(logits, made)
    logits[1] = -INF
    assert sampled(logits, made).tolist() == [-1] * 3


def test_a_row_is_the_same_in_every_batch_and_at_every_alignment() -> None:
    vocab_size = 301
    made = random_sampling_columns(6, vocab_size, 8)
    wide = torch.randn(6, 2 * vocab_size + 3)
    logits = wide[:, 1 : vocab_size + 1]
    together = sampled(logits, made)
    for subset in ([3], [5, 0, 2]):
        part = sampled(logits[subset], {name: column[subset] for name, column in made.items()})
        assert torch.equal(part, together[subset])
    scattered = wide[:, : 2 * vocab_size : 2]
    part = sampled(scattered, made)
    assert torch.equal(part, sampled(scattered.contiguous(), made))


@triton.jit
def tile_kernel(scaled, seed, position, start, mass, words, rough, exact):
    at = tl.arange(0, sampling_tile.CHUNK)
    tl.store(mass, sampling_tile.mass_sum(tl.load(scaled + at)))
    of_run = sampling_tile.words_of_run(seed, position, start, sampling_tile.CHUNK)
    tl.store(words + at, of_run.to(tl.int64))
    picked = sampling_tile.words_of(seed, position, start + at)
    tl.store(words + sampling_tile.CHUNK + at, picked.to(tl.int64))
    tl.store(rough + at, sampling_tile._rough_noise(of_run))
    tl.store(exact + at, sampling_tile.noise_of(of_run))


def test_masses_and_noise_are_the_references() -> None:
    scaled = -torch.rand(CHUNK) * torch.tensor([1e-3, 1.0, 30.0, 200.0]).repeat(CHUNK // 4)
    scaled[:5] = torch.tensor([0.0, -0.0, -INF, -32.0, -1e-44])
    mass, rough, exact = torch.empty(1, dtype=torch.int64), torch.empty(CHUNK), torch.empty(CHUNK)
    words = torch.empty(2, CHUNK, dtype=torch.int64)
    seed, position, start = -(2**61) - 3, 2**40 + 5, 8 * CHUNK
    columns = torch.tensor([seed]), torch.tensor([position])
    tile_kernel[(1,)](scaled, seed, position, start, mass, words, rough, exact)
    assert int(mass) == int(reference.masses(scaled.clone()).double().sum())
    assert torch.equal(words[0], words[1])
    noise = reference.gumbel_noise_at(*columns, start + torch.arange(CHUNK)[None])[0]
    assert torch.equal(exact, noise)
    assert (rough - noise).abs().max() < 2e-5


@triton.jit
def rough_kernel(words, out):
    at = tl.arange(0, sampling_tile.CHUNK)
    tl.store(out + at, sampling_tile._rough_noise(tl.load(words + at).to(tl.uint32)))


def test_the_rough_noise_is_within_its_error_at_both_ends_and_where_its_parts_meet() -> None:
    quarter = torch.arange(CHUNK // 4)
    meeting = 2**32 - 2**29
    words = torch.cat(
        (quarter, 2**32 - 1 - quarter, meeting - 512 + quarter, 2**32 - 1 - quarter * 2**17)
    )
    out = torch.empty(CHUNK)
    rough_kernel[(1,)](words, out)
    assert (out - reference._gumbel(words)).abs().max() < 2e-5


@pytest.mark.parametrize("vocab_size", [1, 50, CHUNK + 90])
@pytest.mark.parametrize("k", [0, 1, 20])
def test_logprobs(vocab_size: int, k: int) -> None:
    k, rows = min(k, vocab_size), 3
    logits = torch.cat([random_logits(style, 1, vocab_size, 2) for style in ("peaked", "ties")])
    logits = torch.cat((logits, torch.full((1, vocab_size), -INF)))
    logits[2, vocab_size // 2] = 3.0
    ids = torch.randint(vocab_size, (rows,))
    logprobs, top = torch.full((rows,), 7.0), torch.full((rows, k), 7.0)
    top_ids = torch.full((rows, k), -7)
    kernels.token_logprobs(logits, ids, logprobs, top_ids, top)
    exact = logits.double().log_softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_ids, order)
    # float32 exponentials, summed by the thousand.
    own = exact.gather(1, ids[:, None])[:, 0].float()
    torch.testing.assert_close(logprobs, own, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(top, exact.gather(1, order).float(), rtol=1e-6, atol=2e-6)
    alone = torch.empty(1), top_ids.new_empty(1, k), torch.empty(1, k)
    kernels.token_logprobs(logits[1:2], ids[1:2], *alone)
    for one, every in zip(alone, (logprobs, top_ids, top), strict=True):
        assert torch.equal(one[0], every[1])


@pytest.mark.parametrize("broken", [math.nan, INF])
def test_logprobs_of_a_row_without_a_distribution_are_nan(broken: float) -> None:
    logits = torch.randn(3, 70)
    logits[1, 44] = broken
    logprobs, top = torch.zeros(3), torch.zeros(3, 4)
    top_ids = torch.full((3, 4), -7)
    kernels.token_logprobs(logits, torch.zeros(3, dtype=torch.int64), logprobs, top_ids, top)
    assert logprobs.isnan().tolist() == [False, True, False]
    assert top.isnan().all(-1).tolist() == [False, True, False]
    assert ((top_ids >= 0) & (top_ids < 70)).all()


def test_columns_out_of_range_leave_the_first_token() -> None:
    """Nobody sends them; a kernel must not look for a token that is not there, all the same."""
    made = sampling_columns(3, top_p=torch.tensor([0.0, -1, 0.5]), min_p=torch.tensor([0.0, 0, 7]))
    assert sampled(torch.tensor([[0.0, 3, 2]] * 3), made).tolist() == [1] * 3


def test_it_can_be_asked_for_by_name() -> None:
    facts = KernelFacts(device="cpu", arch="", dtype=torch.bfloat16, head_dim=64, page_size=64)
    chosen = choose(facts, {"sampling": "triton"})
    logits, made = torch.randn(2, 9), sampling_columns(2)
    tokens = ops.sample_tokens(logits, **made, kernels=chosen)
    assert torch.equal(tokens, sampled(logits, made))
    _, top_ids, _ = ops.token_logprobs(logits, tokens, 1, chosen)
    assert torch.equal(top_ids[:, 0], logits.argmax(-1))


def test_no_rows() -> None:
    assert sampled(torch.empty(0, 9), sampling_columns(0)).shape == (0,)
