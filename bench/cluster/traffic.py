"""What simulated clients ask: conversations with think times, single prompts, or a trace.

Everything follows from the seed. Texts are numbers ("streams"), of which only lengths matter; a
conversation's bytes a token vary, so that a door's estimates of tokens are as wrong as in life.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bench.cluster.replica import Job, Part

from headrace.bench.workload import arrival_times
from headrace.errors import ConfigError
from headrace.route.choose import key_of
from headrace.route.prefix import Prefix

BLOCK_OF_TRACE = 512
"""Tokens that one of a trace's hash_ids stands for."""
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Conversations. One turn and no groups: prompts that share nothing."""

    requests: int = 2000
    """About: conversations are as many as make them on average."""
    rate: float = 4.0
    """Requests a second, of all clients."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of gaps between conversations; 1: Poisson."""
    turns: float = 5.0
    """Mean number, geometrically distributed."""
    groups: int = 8
    """System prompts, used by a Zipf distribution."""
    system_tokens: int = 400
    user_tokens: int = 120
    """Mean, log-normally distributed, as those below."""
    output_tokens: int = 120
    think_s: float = 10.0
    """Mean between an answer and the next turn, exponentially distributed."""
    long_tail: float = 0.6
    """Sigma of the logarithm of lengths."""


@dataclass(slots=True)
class Conversation:
    """Makes one job after another; each prompt is the last one, its answer, and a new message."""

    stream: int
    turns: list[tuple[int, int, float]]
    """(tokens of the message, tokens of its answer, seconds to think before)."""
    system: Part | None
    bytes_per_token: float
    _tokens: int = 0
    _turn: int = 0
    _keys: list[int] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)

    def next(self, now: float) -> Job | None:
        """The next turn's job and nothing when all is said."""
        if self._turn == len(self.turns):
            return None
        user, output, _ = self.turns[self._turn]
        if self._turn == 0 and self.system:
            self._cut(self.system[0], self.system[1])
        elif self._turn:
            self._cut(self.stream, self.turns[self._turn - 1][1])
        self._cut(self.stream, user)
        self._tokens += user
        own = (self.stream, self._tokens)
        parts = (self.system, own) if self.system else (own,)
        self._tokens += output
        self._turn += 1
        opening = self._keys[1 if self.system else 0]
        prefix = Prefix(tuple(self._keys), tuple(self._ends), opening, self._ends[-1])
        return Job(parts, output, now, prefix, session=self.stream)

    @property
    def think_s(self) -> float:
        return self.turns[self._turn][2] if self._turn < len(self.turns) else 0.0

    def _cut(self, stream: int, tokens: int) -> None:
        """A message of so many tokens, as prefix_of() would key it."""
        size = self.bytes_per_token if stream == self.stream else 4.0
        end = (self._ends[-1] if self._ends else 0) + max(int(tokens * size), 1)
        self._keys.append(mixed(stream, len(self._keys)))
        self._ends.append(end)


def mixed(stream: int, index: int) -> int:
    """64 bits for a cut of a stream."""
    return (stream * 0x9E3779B97F4A7C15 + index * 0xD6E8FEB86659FD93 + 1) & _MASK


def conversations(workload: Workload, seed: int) -> Iterator[tuple[float, Conversation]]:
    """(start, conversation), in order of time."""
    rng = np.random.default_rng(seed)
    count = max(1, round(workload.requests / workload.turns))
    starts = arrival_times(count, workload.rate / workload.turns, workload.burstiness, rng)
    shares = 1.0 / np.arange(1, workload.groups + 1)
    groups = rng.choice(workload.groups, count, p=shares / shares.sum()) if workload.groups else []
    for index, start in enumerate(starts.tolist()):
        turns = int(rng.geometric(1 / workload.turns))
        users, outputs = (
            _lengths(mean, workload.long_tail, turns, rng)
            for mean in (workload.user_tokens, workload.output_tokens)
        )
        thinks = rng.exponential(workload.think_s, turns).tolist()
        system = None
        if workload.groups and workload.system_tokens:
            system = (1 + int(groups[index]), workload.system_tokens)
        yield (
            start,
            Conversation(
                stream=1 + workload.groups + index,
                turns=list(zip(users, outputs, thinks, strict=True)),
                system=system,
                bytes_per_token=float(rng.uniform(3.0, 5.0)),
            ),
        )


def _lengths(mean: int, sigma: float, count: int, rng: np.random.Generator) -> list[int]:
    drawn = rng.lognormal(math.log(mean) - sigma * sigma / 2, sigma, count)
    lengths: list[int] = np.clip(drawn, 1, 16 * mean).astype(int).tolist()
    return lengths


def trace(path: Path, max_prompt_tokens: int) -> list[Job]:
    """Jobs of a JSONL trace with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`
    (one for each 512 tokens: equal ids, equal prefixes), the format of Mooncake's traces.

    Prompts longer than `max_prompt_tokens` are cut. Raises ConfigError, naming the line.
    """
    jobs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            length = min(int(entry["input_length"]), max_prompt_tokens)
            ids, output = [int(one) for one in entry["hash_ids"]], int(entry["output_length"])
            arrival = float(entry["timestamp"]) / 1000
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: {error!r}; needs timestamp (ms), input_length, "
                              "output_length and hash_ids.") from error  # fmt: skip
        if length < 1 or len(ids) * BLOCK_OF_TRACE < length:
            raise ConfigError(f"{path}:{number}: {len(ids)} hash_ids for {length} tokens.")
        starts = range(0, length, BLOCK_OF_TRACE)
        parts = tuple(
            (1 + block, min(BLOCK_OF_TRACE, length - start))
            for block, start in zip(ids, starts, strict=False)
        )
        ends = tuple(4 * min(start + BLOCK_OF_TRACE, length) for start in starts)
        keys = tuple(key_of(b"%d" % block) for block, _ in parts)
        # Its answer is text of its own.
        own = (1 << 40) + number
        jobs.append(
            Job(
                (*parts[:-1], parts[-1]),
                max(output, 1),
                arrival,
                Prefix(keys, ends, keys[0], ends[-1]),
                session=own,
            )
        )
    return sorted(jobs, key=lambda job: job.arrival)
