"""What is asked and when: prompts of the random, shared-prefix and file workloads, and arrival
times. Everything follows from the seed; nothing here talks to the server.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.errors import ConfigError

# Special tokens live at both ends of a vocabulary; in between, any id is plain text. Every
# vocabulary of a served model has ten thousand ids, which is enough variety.
_ID_RANGE = (1000, 10_000)


@dataclass(frozen=True)
class Prompt:
    """One request to make. Exactly one of `token_ids`, `text` and `messages` is set."""

    output_tokens: int
    token_ids: list[int] | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class RandomWorkload:
    """Prompts of random tokens. Lengths are drawn evenly from `length * (1 ± range_ratio)`; the
    prefix comes on top of `input_len`."""

    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    num_prefixes: int = 1
    """Prompts take the prefixes in turn, then all are shuffled."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--input-len", self.input_len, 0 if self.prefix_len else 1),
            ("--output-len", self.output_len, 1),
            ("--prefix-len", self.prefix_len, 0),
            ("--num-prefixes", self.num_prefixes, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}.")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"--range-ratio must be in [0, 1), got {self.range_ratio}.")

    def prompts(self, count: int, rng: np.random.Generator, vocab_size: int | None) -> list[Prompt]:
        """`count` prompts as token ids. vocab_size: of the served model, if it is known."""
        low, high = _id_range(vocab_size)
        prefixes = rng.integers(low, high, (self.num_prefixes, self.prefix_len))
        input_lens = self._lengths(self.input_len, count, rng)
        output_lens = self._lengths(self.output_len, count, rng)
        prompts = [
            Prompt(
                output_tokens=max(1, int(output_len)),
                token_ids=[
                    *prefixes[number % self.num_prefixes].tolist(),
                    *rng.integers(low, high, input_len).tolist(),
                ],
            )
            for number, (input_len, output_len) in enumerate(
                zip(input_lens, output_lens, strict=True)
            )
        ]
        return [prompts[number] for number in rng.permutation(count)]

    def _lengths(self, length: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        low = math.floor(length * (1 - self.range_ratio))
        high = math.ceil(length * (1 + self.range_ratio))
        return rng.integers(max(low, min(length, 1)), high, count, endpoint=True)


def _id_range(vocab_size: int | None) -> tuple[int, int]:
    low, high = _ID_RANGE
    if vocab_size is None or vocab_size >= high:
        return low, high
    return min(low, vocab_size // 4), vocab_size


def read_file(path: Path, default_output_tokens: int) -> list[Prompt]:
    """Prompts of a JSONL file: each line has `prompt` (text or token ids) or `messages`, and
    `output_tokens` unless the default is right.

    Raises ConfigError, naming the line, for one that has neither or is not JSON.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--dataset-path {path}: {error.strerror}.") from error
    prompts = [
        _parse_line(line, f"{path}:{number}", default_output_tokens)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise ConfigError(f"--dataset-path {path} holds no prompt.")
    return prompts


class _Line(msgspec.Struct):
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    output_tokens: int | None = None


def _parse_line(line: bytes, where: str, default_output_tokens: int) -> Prompt:
    try:
        parsed = msgspec.json.decode(line, type=_Line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: {error}.") from error
    if (parsed.prompt is None) == (parsed.messages is None):
        raise ConfigError(f"{where}: needs `prompt` or `messages`, and not both.")
    output_tokens = parsed.output_tokens or default_output_tokens
    if isinstance(parsed.prompt, list):
        return Prompt(output_tokens, token_ids=parsed.prompt)
    return Prompt(output_tokens, text=parsed.prompt, messages=parsed.messages)


def arrival_times(
    count: int, rate: float, burstiness: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Seconds after the start at which each request is due, ascending: [count] float64.

    Gaps are gamma distributed with shape `burstiness` and mean 1/rate: 1 is a Poisson process,
    less is burstier, inf is evenly spaced. They are then scaled so that the last arrival falls on
    count/rate, so that every seed offers the same load. rate inf: all at once.
    """
    if not rate > 0:
        raise ConfigError(f"--request-rate must be positive, got {rate}.")
    if not burstiness > 0:
        raise ConfigError(f"--burstiness must be positive, got {burstiness}.")
    if math.isinf(rate):
        return np.zeros(count)
    if math.isinf(burstiness):
        gaps = np.full(count, 1 / rate)
    else:
        gaps = rng.gamma(burstiness, 1 / (rate * burstiness), count)
    due = np.cumsum(gaps)
    return due * (count / rate / due[-1]) if count and due[-1] > 0 else due
