"""Prompts and arrival times: lengths, sharing, seeds, files the shape of the arrivals."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.workload import Prompt, RandomWorkload, arrival_times, read_file
from headrace.errors import ConfigError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ids(prompt: Prompt) -> list[int]:
    assert prompt.token_ids is not None
    return prompt.token_ids


@pytest.mark.parametrize("rate", [0.5, 20.0])
@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0, math.inf])
def test_every_seed_offers_the_same_load(rate: float, burstiness: float) -> None:
    for seed in range(3):
        due = arrival_times(200, rate, burstiness, rng(seed))
        assert due[-1] == pytest.approx(200 / rate)
        assert np.all(np.diff(due) >= 0)
        assert due[0] >= 0


def test_burstiness_is_the_spread_of_the_gaps() -> None:
    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff(arrival_times(20_000, 10.0, burstiness, rng()))
        variation = gaps.std() / gaps.mean()
        assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)
    even = np.diff(arrival_times(50, 10.0, math.inf, rng()))
    assert even == pytest.approx(np.full(49, 0.1))


def test_no_rate_means_all_at_once() -> None:
    assert arrival_times(5, math.inf, 1.0, rng()).tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("rate", "burstiness", "option"),
    [(0, 1, "--request-rate"), (math.nan, 1, "--request-rate"), (1, -1, "--burstiness")],
)
def test_impossible_arrivals_are_named(rate: float, burstiness: float, option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option} must be positive"):
        arrival_times(3, rate, burstiness, rng())


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 40),
    st.floats(0, 0.99),
    st.integers(0, 5),
    st.sampled_from([None, 32, 5000, 150_000]),
)
def test_random_lengths_stay_in_range(
    input_len: int, output_len: int, ratio: float, prefix_len: int, vocab_size: int | None
) -> None:
    workload = RandomWorkload(input_len, output_len, ratio, prefix_len)
    for prompt in workload.prompts(8, rng(), vocab_size):
        low, high = math.floor(input_len * (1 - ratio)), math.ceil(input_len * (1 + ratio))
        assert max(1, low) <= len(ids(prompt)) - prefix_len <= high
        assert 1 <= prompt.output_tokens <= math.ceil(output_len * (1 + ratio))
        assert all(0 <= i < (vocab_size or 10_000) for i in ids(prompt))


def test_a_seed_repeats_its_workload_and_another_does_not() -> None:
    workload = RandomWorkload(32, 8, 0.5)
    assert workload.prompts(4, rng(1), None) == workload.prompts(4, rng(1), None)
    assert workload.prompts(4, rng(1), None) != workload.prompts(4, rng(2), None)


def test_shared_prefixes_are_taken_equally_often() -> None:
    workload = RandomWorkload(4, 1, prefix_len=16, num_prefixes=3)
    prompts = workload.prompts(12, rng(), None)
    heads = Counter(tuple(ids(prompt)[:16]) for prompt in prompts)
    assert sorted(heads.values()) == [4, 4, 4]
    assert len({tuple(ids(prompt)) for prompt in prompts}) == 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_len": 0}, "--input-len must be at least 1, got 0."),
        ({"output_len": 0}, "--output-len must be at least 1, got 0."),
        ({"range_ratio": 1.0}, "--range-ratio must be in [0, 1), got 1.0."),
        ({"num_prefixes": 0}, "--num-prefixes must be at least 1, got 0."),
    ],
)
def test_impossible_lengths_are_named(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        RandomWorkload(**{"input_len": 1, "output_len": 1} | fields)
    assert error.value.message == message


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "Hello", "output_tokens": 7}\n\n'
        '{"prompt": [1, 2, 3], "source": "ignored"}\n'
        '{"messages": [{"role": "user", "content": "Hi"}]}\n'
    )
    assert read_file(path, 50) == [
        Prompt(7, text="Hello"),
        Prompt(50, token_ids=[1, 2, 3]),
        Prompt(50, messages=[{"role": "user", "content": "Hi"}]),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a"}\n{"output_tokens": 3}',
            ":2: needs `prompt` or `messages`, and not both.",
        ),
        ('{"prompt": "a", "messages": []}', ":1: needs `prompt` or `messages`, and not both."),
        ("not json", ":1: JSON is malformed: "),
        ('{"prompt": 3}', ":1: Expected `str | array | null`, got `int` - at `$.prompt`."),
        ("\n", " holds no prompt."),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_file(path, 1)
    assert message in error.value.message
    assert str(path) in error.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.jsonl: No such file"):
        read_file(tmp_path / "none.jsonl", 1)
