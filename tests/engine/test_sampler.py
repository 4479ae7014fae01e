"""The sampler: columns and per-request extras in, host tokens and log-probabilities out."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.engine.sampler import NO_TOKEN, SampledTokens, Sampler, SamplingBatch, mask_on_device
from headrace.engine.token_masks import mask_logits
from headrace_kernels.dispatch import KernelFacts, choose

KERNELS = choose(
    KernelFacts(device="cpu", arch="any", dtype=torch.float32, head_dim=64, page_size=16)
)

NEUTRAL: dict[str, tuple[float, type[np.generic]]] = {
    "temperature": (0.0, np.float32),
    "top_k": (0, np.int32),
    "top_p": (1.0, np.float32),
    "min_p": (0.0, np.float32),
    "presence": (0.0, np.float32),
    "frequency": (0.0, np.float32),
    "repetition": (1.0, np.float32),
    "seed": (1, np.int64),
    "position": (9, np.int64),
    "num_logprobs": (-1, np.int32),
}


def batch_of(rows: int, **values: Any) -> SamplingBatch:
    """Greedy rows without extras, but for `values`: a number or a list a column, or a mapping."""
    columns: dict[str, Any] = {
        name: np.full(rows, values.pop(name, default), dtype)
        for name, (default, dtype) in NEUTRAL.items()
    }
    return SamplingBatch(**columns, **values)


def part_of(batch: SamplingBatch, rows: list[int]) -> SamplingBatch:
    """The batch of some rows of `batch`, in that order."""
    values: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, np.ndarray):
            values[field.name] = value[rows]
        else:
            values[field.name] = {new: value[old] for new, old in enumerate(rows) if old in value}
    return SamplingBatch(**values)


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int64)


def bias(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    return ids(*values), np.array(list(values.values()), np.float32)


def sample(logits: Tensor | list[list[float]], batch: SamplingBatch) -> SampledTokens:
    return Sampler(KERNELS).sample(torch.as_tensor(logits, dtype=torch.float32), batch)


def test_all_greedy_rows_take_the_largest_logit() -> None:
    logits = torch.randn(6, 301)
    sampled = sample(logits, batch_of(6))
    assert sampled.token_ids.dtype == np.int64
    assert sampled.token_ids.tolist() == logits.argmax(-1).tolist()
    assert sampled.logprobs == {}


def everything(rows: int, vocab_size: int) -> SamplingBatch:
    """Every kind of row, and every extra on some."""
    assert rows == 8
    return batch_of(
        rows,
        temperature=[0, 1, 0.7, 1, 0, 1.3, 0.5, 1],
        top_k=[0, 0, 0, 30, 0, 0, 7, 0],
        top_p=[1, 1, 0.9, 1, 1, 1, 0.8, 1],
        min_p=[0, 0, 0, 0, 0, 0.1, 0.02, 0],
        presence=[0, 0.5, 0, 0, 1, 0, 0, 0],
        frequency=[0, 0.5, 0, 0, -1, 0, 0.3, 0],
        repetition=[1, 1, 1, 1.3, 1.1, 1, 1, 1],
        seed=[5, 5, -1, 2**62, 0, 8, 9, 10],
        position=[1, 2, 3, 4, 5, 6, 7, 2**33],
        num_logprobs=[0, -1, 20, 3, -1, 5, 0, -1],
        penalized={
            row: (np.arange(1 + row), np.arange(row, vocab_size, 9)) for row in (1, 3, 4, 6)
        },
        logit_bias={2: bias({0: 5.0, 7: -100.0}), 4: bias({3: 4.0})},
        allowed={1: ids(1, 5, 9), 7: np.arange(0, vocab_size, 2)},
        banned={4: ids(3), 7: ids(0, 1, 2)},
    )


@pytest.mark.parametrize("vocab_size", [40, 8191])
def test_a_row_is_the_same_in_every_batch(vocab_size: int) -> None:
    logits, batch = torch.randn(8, vocab_size) * 3, everything(8, vocab_size)
    together = sample(logits, batch)
    for subset in ([7, 6, 5, 4, 3, 2, 1, 0], [2, 5], [3, 3, 3], *([row] for row in range(8))):
        part = sample(logits[subset], part_of(batch, subset))
        assert part.token_ids.tolist() == together.token_ids[subset].tolist()
        logprobs = together.logprobs
        # Equal to the last bit: Python compares the floats exactly.
        assert part.logprobs == {
            new: logprobs[old] for new, old in enumerate(subset) if old in logprobs
        }


def test_a_batch_can_be_sampled_again_from_the_same_logits() -> None:
    logits, batch = torch.randn(8, 40), everything(8, 40)
    before = logits.clone()
    first = sample(logits, batch)
    assert torch.equal(logits, before)
    second = sample(logits, batch)
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert first.logprobs == second.logprobs


def test_seed_and_position_choose_the_noise() -> None:
    rows, vocab_size = 50, 1000
    logits = torch.zeros(rows, vocab_size)
    seeds = sample(logits, batch_of(rows, temperature=1, seed=np.arange(rows)))
    positions = sample(logits, batch_of(rows, temperature=1, position=np.arange(rows)))
    same = sample(logits, batch_of(rows, temperature=1))
    assert len(set(seeds.token_ids.tolist())) > rows * 0.8
    assert len(set(positions.token_ids.tolist())) > rows * 0.8
    assert len(set(same.token_ids.tolist())) == 1


# Prompt [0, 1], output [1, 2, 2]. Every case: which penalty, and the logits it makes of START.
START = [3.0, -2.0, 4.0, 2.5]


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ({"presence": 1.5}, [3.0, -3.5, 2.5, 2.5]),
        ({"frequency": 1.5}, [3.0, -3.5, 1.0, 2.5]),
        ({"frequency": -0.5}, [3.0, -1.5, 5.0, 2.5]),
        ({"repetition": 2.0}, [1.5, -4.0, 2.0, 2.5]),
        ({"repetition": 0.5}, [6.0, -1.0, 8.0, 2.5]),
        # Divided first, then subtracted from, then biased.
        ({"repetition": 2.0, "presence": 1.0, "frequency": 0.25}, [1.5, -5.25, 0.5, 2.5]),
        ({"repetition": 2.0, "logit_bias": {2: 1.0, 3: -3.0}}, [1.5, -4.0, 3.0, -0.5]),
    ],
)
def test_penalties_and_bias_make_the_exact_logits(
    penalty: dict[str, Any], expected: list[float]
) -> None:
    # The margin at which token 3 is overtaken by another tells that other's logit.
    given = dict(penalty)
    given_bias = given.pop("logit_bias", {})
    for token, value in enumerate(expected[:3]):
        for margin, winner in ((0.01, 3), (-0.01, token)):
            others = {other: -100.0 for other in range(3) if other != token}
            push = {3: value - expected[3] + margin}
            total = {
                key: given_bias.get(key, 0) + others.get(key, 0) + push.get(key, 0)
                for key in range(4)
            }
            batch = batch_of(
                1,
                penalized={0: (ids(0, 1), ids(1, 2, 2))},
                logit_bias={0: bias(total)},
                **given,
            )
            assert sample([START], batch).token_ids[0] == winner


def test_penalty_columns_of_unlisted_rows_are_ignored() -> None:
    batch = batch_of(2, presence=2, repetition=9, penalized={1: (ids(0), ids(0))})
    assert sample([[1.0, 0.9], [1.0, 0.9]], batch).token_ids.tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0, 1])
def test_only_allowed_tokens_are_sampled(temperature: float) -> None:
    rows = 64
    logits = torch.randn(rows, 9, generator=torch.Generator().manual_seed(5))
    kept = logits.clone()
    allowed = {row: ids(1, 4, 4, 8) for row in range(0, rows, 2)}
    extras: dict[str, Any] = {"temperature": temperature, "seed": list(range(rows))}
    free = sample(logits, batch_of(rows, **extras)).token_ids
    batch = batch_of(rows, **extras, allowed=allowed, banned={0: ids(4), 2: ids(1, 8)})
    found = sample(logits, batch).token_ids
    assert set(found[::2].tolist()) == {1, 4, 8}
    assert found[0] in (1, 8) and found[2] == 4
    assert (found[1::2] == free[1::2]).all()
    assert (logits == kept).all()
    alone = sample(logits, batch_of(rows, **extras, allowed={0: ids(3)}))
    assert alone.token_ids[0] == 3


@pytest.mark.parametrize("size", [64, 70, 9])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_tokens_of_the_mask_are_sampled(temperature: float, size: int) -> None:
    rows = 32
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(5))
    kept = logits.clone()
    extras: dict[str, Any] = {"temperature": temperature, "seed": list(range(rows))}
    free = sample(logits, batch_of(rows, **extras)).token_ids
    mask = np.zeros(-(-size // 32), np.int32)
    for token_id in (1, 4, size - 1):
        mask[token_id // 32] |= np.uint32(1 << token_id % 32).view(np.int32)
    masks = dict.fromkeys(range(0, rows, 2), mask)
    found = sample(logits, batch_of(rows, **extras, masks=masks)).token_ids
    assert set(found[::2].tolist()) == {1, 4, size - 1}
    assert (found[1::2] == free[1::2]).all()
    assert (logits == kept).all()
    there, here = logits.clone(), logits.clone()
    mask_on_device(there, masks, torch.from_numpy)
    for row in masks:
        mask_logits(here[row].numpy(), mask)
    assert there.equal(here)
    none = sample(logits, batch_of(rows, **extras, masks={0: np.zeros_like(mask)}))
    assert none.token_ids[0] == NO_TOKEN


@pytest.mark.parametrize("temperature", [0, 1])
def test_banned_tokens_are_never_sampled(temperature: float) -> None:
    rows = 200
    banned = {row: ids(2, 5) for row in range(0, rows, 2)}
    logits = torch.tensor([0.0, 0, 9, 0, 0, 9]).expand(rows, -1)
    batch = batch_of(
        rows,
        temperature=temperature,
        position=np.arange(rows),
        banned=banned,
        logit_bias={0: bias({2: 100.0})},
    )
    tokens = sample(logits, batch).token_ids
    assert not np.isin(tokens[0::2], [2, 5]).any()
    assert np.isin(tokens[1::2], [2, 5]).mean() > 0.9


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.randn(4, 50) * 2
    batch = batch_of(
        4,
        temperature=[0, 0.1, 5, 1],
        top_k=[0, 3, 0, 1],
        num_logprobs=[0, 2, -1, 20],
        logit_bias={0: bias({7: 100.0})},
        penalized={1: (ids(1), ids(2, 3))},
        frequency=2,
    )
    sampled = sample(logits, batch)
    assert sampled.token_ids[0] == 7
    exact = logits.double().log_softmax(-1)
    assert sorted(sampled.logprobs) == [0, 1, 3]
    for row, count in ((0, 0), (1, 2), (3, 20)):
        logprob, top_ids, top = sampled.logprobs[row]
        expected = exact[row].sort(descending=True)
        assert logprob == pytest.approx(float(exact[row, sampled.token_ids[row]]), abs=1e-5)
        assert top_ids == expected.indices[:count].tolist()
        assert top == pytest.approx(expected.values[:count].tolist(), abs=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_row_gives_no_token_and_harms_no_other(broken: float) -> None:
    logits, batch = torch.randn(8, 40), everything(8, 40)
    expected = sample(logits, batch)
    for row in range(8):
        damaged = logits.clone()
        damaged[row, 11] = broken
        sampled = sample(damaged, batch)
        others = np.arange(8) != row
        assert sampled.token_ids[row] == NO_TOKEN
        assert row not in sampled.logprobs
        assert sampled.token_ids[others].tolist() == expected.token_ids[others].tolist()
        assert sampled.logprobs == {k: v for k, v in expected.logprobs.items() if k != row}


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_whose_tokens_are_all_banned_gives_no_token(temperature: float) -> None:
    batch = batch_of(2, temperature=temperature, banned={0: ids(0)}, num_logprobs=1)
    sampled = sample([[1.0], [1.0]], batch)
    assert sampled.token_ids.tolist() == [NO_TOKEN, 0]
    assert sampled.logprobs == {1: (0.0, [0], [0.0])}


def test_columns_that_do_not_fit_the_logits_are_named() -> None:
    with pytest.raises(ValueError, match=r"temperature must be \[3\]"):
        sample(torch.zeros(3, 5), batch_of(2))
