"""One simulated replica: an engine's steps, rows and KV blocks, without its tokens.

It schedules as engine/scheduler.py does (decoding rows first, then prompts in order, in chunks,
under a token budget) and keeps blocks as engine/kv_cache.py does. Steps in which nothing but
decoding happens are taken together until a request ends or comes.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from headrace.route.choose import ReplicaLoad, ReplicaView
from headrace.route.prefix import Prefix

Part = tuple[int, int]
"""(stream, tokens): the next so many tokens of a prompt, of a text that is told by a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of a step: a sum over what it computes. See bench/step_times.py."""

    base: float
    per_row: float
    """A decoding request."""
    per_context_token: float
    """A token in the KV cache that a decoding request attends to."""
    per_prompt_token: float
    per_prompt_pair: float
    """A prompt token attending to one before it."""

    def decode(self, rows: int, context: float) -> float:
        return self.base + self.per_row * rows + self.per_context_token * context

    def prompt(self, tokens: int, pairs: float) -> float:
        return self.per_prompt_token * tokens + self.per_prompt_pair * pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    times: StepTimes
    num_blocks: int = 4096
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256

    @property
    def prefill_rate(self) -> float:
        """Tokens a second of a prompt of a typical length, as an idle replica measures it."""
        tokens = min(512, self.max_num_batched_tokens)
        return tokens / (self.times.base + self.times.prompt(tokens, tokens * tokens / 2))


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the simulation."""

    parts: tuple[Part, ...]
    """Of the prompt. What is generated continues the last one's stream."""
    output_tokens: int
    arrival: float
    prefix: Prefix
    session: int = 0
    on_end: Callable[[float], None] | None = None
    prompt_tokens: int = field(init=False)
    cached: int = 0
    """Prompt tokens that were in the KV cache."""
    first_token: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        self.prompt_tokens = sum(tokens for _, tokens in self.parts)


def block_keys(parts: Iterable[Part], block_size: int) -> list[int]:
    """Keys of the full blocks: equal keys, equal contents from the first token on."""
    keys: list[int] = []
    start = 0
    for stream, tokens in parts:
        end = start + tokens
        first = stream << 24
        keys += range(first | start // block_size, first | end // block_size)
        start = end
    return keys


class BlockCache:
    """Blocks by content: referenced, or free and found until they are taken, oldest first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.private = 0
        """Blocks in use that cannot be found: not full, or copies of others."""
        self._references: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self._references) - self.private

    def find(self, keys: Sequence[int]) -> int:
        """How many of the first keys are there."""
        for count, key in enumerate(keys):
            if key not in self._references and key not in self._free:
                return count
        return len(keys)

    def unused(self, keys: Iterable[int]) -> int:
        return sum(1 for key in keys if key not in self._references)

    def share(self, keys: Iterable[int]) -> None:
        references, free = self._references, self._free
        for key in keys:
            if key in references:
                references[key] += 1
            else:
                del free[key]
                references[key] = 1

    def take(self, count: int) -> None:
        """`count` more private blocks; less where it is negative."""
        self.private += count
        surplus = len(self._references) + self.private + len(self._free) - self.num_blocks
        for _ in range(min(surplus, len(self._free))):
            self._free.popitem(last=False)

    def register(self, keys: Iterable[int]) -> list[int]:
        """Make private blocks findable. Those that were not there before: they hold a reference."""
        fresh = [key for key in keys if key not in self._references and key not in self._free]
        self._references.update(dict.fromkeys(fresh, 1))
        self.private -= len(fresh)
        return fresh

    def release(self, keys: Sequence[int]) -> None:
        """A reference less on each, in sequence order: tails are evicted before heads."""
        references, free = self._references, self._free
        for key in reversed(keys):
            if references[key] > 1:
                references[key] -= 1
            else:
                del references[key]
                free[key] = None


@dataclass(slots=True, eq=False)
class _Row:
    job: Job
    keys: list[int]
    """Full blocks of the prompt."""
    held: list[int]
    """Those that this row has references on, in sequence order."""
    private: int
    target: int
    """Tokens to compute before the next one is made."""
    computed: int
    made: int = 0
    """Tokens generated before it was preempted."""
    joined: int = 0
    """The replica's count of steps when it began to decode."""
    live: bool = True


class Replica:
    """Give it jobs with `add`; call `end_step` at `step_end` while that is not None."""

    def __init__(self, shape: EngineShape, address: str, ready_at: float = 0.0) -> None:
        self.shape = shape
        self.address = address
        self.ready_at = ready_at
        self.draining = False
        self.cache = BlockCache(shape.num_blocks)
        self.step_end: float | None = None
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.requests = 0
        self.busy_seconds = 0.0
        self.preemptions = 0
        self.queued_tokens = 0
        self.news: list[str] = []
        """What doors told of the prefixes that they sent, for the others."""
        self._waiting: deque[tuple[Job, int]] = deque()  # and how many tokens it had made
        self._prompts: list[_Row] = []
        self._decoding: dict[_Row, None] = {}
        self._ends: list[tuple[int, int, _Row]] = []  # (count of steps, tie, row)
        self._joined = 0
        self._steps = 0
        self._context = 0
        self._grown = 0
        """Tokens generated by the decoding rows."""
        self._segment = (0.0, 0.0, 0)  # decoding only: (start, seconds of a step, steps)
        self._chunks: list[int] = []

    @property
    def num_live(self) -> int:
        return len(self._waiting) + len(self._prompts) + len(self._decoding)

    def load(self, view: ReplicaView, now: float) -> ReplicaLoad:
        """What GET /load would answer to the door that holds `view`."""
        rows = len(self._decoding)
        return ReplicaLoad(
            ready=now >= self.ready_at,
            draining=self.draining,
            running=rows + len(self._prompts),
            queued=len(self._waiting),
            queued_tokens=self.queued_tokens,
            kv_used_blocks=self.shape.num_blocks - self.cache.num_free,
            kv_total_blocks=self.shape.num_blocks,
            block_size=self.shape.block_size,
            prefill_tokens_per_s=self.shape.prefill_rate,
            decode_step_s=self.shape.times.decode(rows or 1, self._context),
            door_in_flight=view.in_flight,
            door_pending_prompt_tokens=view.pending_prompt_tokens,
        )

    def add(self, job: Job, now: float) -> None:
        self.requests += 1
        self.queued_tokens += job.prompt_tokens
        self._waiting.append((job, 0))
        if self.step_end is None:
            self._begin(now)
        elif not self._chunks:
            start, seconds, steps = self._segment
            done = max(1, math.ceil((now - start) / seconds))
            if done < steps:  # the next step can take it in
                self._segment = (start, seconds, done)
                self.busy_seconds -= (steps - done) * seconds
                self.step_end = start + done * seconds

    def end_step(self, now: float) -> tuple[list[Job], list[Job]]:
        """(jobs that got their first token, jobs that ended); the next step has begun."""
        rows, steps = len(self._decoding), 1 if self._chunks else self._segment[2]
        self._steps += steps
        self._context += rows * steps
        self._grow(rows * steps)
        self.decode_tokens += rows * steps
        first: list[Job] = []
        ended: list[Job] = []
        while self._ends and self._ends[0][0] <= self._steps:
            row = heapq.heappop(self._ends)[2]
            if row.live:
                ended.append(self._leave(row, now))
        if self._chunks:
            for row, chunk in zip(self._prompts, self._chunks, strict=False):
                row.computed += chunk
                self.prefill_tokens += chunk
            done = [row for row in self._prompts if row.computed == row.target]
            self._prompts = [row for row in self._prompts if row.computed < row.target]
            for row in done:
                self._start_decoding(row, now, first, ended)
        self._begin(now)
        return first, ended

    # --- rows -------------------------------------------------------------------------------

    def _start_decoding(self, row: _Row, now: float, first: list[Job], ended: list[Job]) -> None:
        """All of its prompt is computed, and so is a token."""
        job = row.job
        fresh = self.cache.register(row.keys[len(row.held) :])
        row.private -= len(fresh)
        row.held += fresh
        if not row.made:
            job.first_token = now
            self.queued_tokens -= job.prompt_tokens
            first.append(job)
        self.decode_tokens += 1
        row.made += 1
        row.joined = self._steps
        self._joined += 1
        self._decoding[row] = None
        self._context += row.target
        left = job.output_tokens - row.made
        heapq.heappush(self._ends, (self._steps + left, self._joined, row))
        if left <= 0:
            row.live = False
            ended.append(self._leave(row, now))

    def _leave(self, row: _Row, now: float) -> Job:
        job = row.job
        generated = self._free(row)
        job.finished = now
        tail, made = job.parts[-1], row.made + generated
        parts = (*job.parts[:-1], (tail[0], tail[1] + made - 1))  # the last token has no KV
        more = self.cache.register(block_keys(parts, self.shape.block_size)[len(row.keys) :])
        self.cache.private += len(more)  # they were counted as growth, which is gone
        self.cache.release(more)
        self.cache.take(0)
        return job

    def _free(self, row: _Row) -> int:
        """Drop its blocks and its place; the tokens that it decoded since it joined."""
        generated = self._steps - row.joined
        row.live = False
        del self._decoding[row]
        self._context -= row.target + generated
        self._grow(-generated)
        self.cache.release(row.held)
        self.cache.take(-row.private)
        return generated

    def _grow(self, tokens: int) -> None:
        size = self.shape.block_size
        before = -(-self._grown // size)
        self._grown += tokens
        if more := -(-self._grown // size) - before:
            self.cache.take(more)

    def _preempt_last(self) -> None:
        row = next(reversed(self._decoding))
        made = row.made + self._free(row)
        self._waiting.appendleft((row.job, made))
        self.preemptions += 1

    def _place(self) -> bool:
        """Move the first that waits into a row with blocks for all its tokens; False: no room."""
        job, made = self._waiting[0]
        size, cache = self.shape.block_size, self.cache
        tail = job.parts[-1]
        parts = job.parts if not made else (*job.parts[:-1], (tail[0], tail[1] + made))
        target = job.prompt_tokens + made
        keys = block_keys(parts, size)
        hits = cache.find(keys[: (target - 1) // size])
        shared = keys[:hits]
        rows = len(self._decoding) + len(self._prompts)
        missing = -(-target // size) - hits
        if missing + cache.unused(shared) + rows > cache.num_free:
            assert rows, f"a prompt of {target} tokens does not fit into {cache.num_blocks} blocks"
            return False
        cache.share(shared)
        cache.take(missing)
        if not made:
            job.cached = hits * size
        self._waiting.popleft()
        self._prompts.append(
            _Row(job, keys, shared, missing, target, computed=hits * size, made=made)
        )
        return True

    # --- steps ------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        shape, times = self.shape, self.shape.times
        while self._decoding and self.cache.num_free < 1:
            self._preempt_last()
        budget = shape.max_num_batched_tokens - len(self._decoding)
        budget -= sum(row.target - row.computed for row in self._prompts)
        while (
            self._waiting
            and budget > 0
            and len(self._decoding) + len(self._prompts) < shape.max_num_seqs
            and self._place()
        ):
            budget -= self._prompts[-1].target - self._prompts[-1].computed
        rows = len(self._decoding)
        self._chunks = []
        if not rows and not self._prompts:
            self.step_end = None
            return
        seconds = times.decode(rows, self._context)
        if self._prompts:
            left = shape.max_num_batched_tokens - rows
            for row in self._prompts:
                chunk = min(row.target - row.computed, left)
                left -= chunk
                self._chunks.append(chunk)
                seconds += times.prompt(chunk, chunk * (row.computed + chunk / 2))
            steps = 1
        else:
            while not self._ends[0][2].live:
                heapq.heappop(self._ends)
            until = self._ends[0][0]
            room = max(self.cache.num_free, 1) * shape.block_size // rows
            steps = max(1, min(until - self._steps, room))
            seconds += times.per_context_token * rows * (steps - 1) / 2
        self._segment = (now, seconds, steps)
        self.step_end = now + seconds * steps
        self.busy_seconds += seconds * steps
