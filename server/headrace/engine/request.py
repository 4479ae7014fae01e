"""One sequence as the engine sees it, and the columns in which the running ones live.

A waiting request is a Python object. A running one also owns a row of `RunningRequests`: numpy
columns, so that a step over hundreds of decoding rows is a handful of array operations.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from headrace.engine.client import FinishReason, RequestRecord, TokenLogprobs
from headrace.engine.grammar import Constraint
from headrace.engine.token_masks import TokenMasks
from headrace.engine.token_rules import BannedSequences, ThinkingEnd
from headrace.sampling_params import BACKGROUND_PRIORITY, GenerateRequest, SamplingParams

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]

STOP_BITS = 64

UNKNOWN_TOKEN = -1
"""In RunningRequests.token_ids: the step that samples this token is in flight. (A sampler's
NO_TOKEN, which has the same value, never gets there: a row without a token ends.)"""


@dataclass(slots=True, eq=False)
class Request:
    """A sequence from arrival to its `RequestRecord`. Outlives preemptions."""

    source: GenerateRequest
    handle: int
    """A small integer that names the request on the wire while it lives."""
    arrival_number: int
    token_ids: IntArray
    """[num_tokens]: prompt and output so far; current only while the request holds no row."""
    num_prompt_tokens: int
    max_total_tokens: int
    """Prompt plus output at which generation ends with reason `length`."""
    seed: int
    stop_token_ids: frozenset[int]
    """Tokens that end generation: the request's own and, unless ignore_eos, the model's."""
    allowed_token_ids: LongArray | None = None
    """The only tokens that can be sampled, if that was asked for."""
    banned: BannedSequences | None = None
    thinking_end: ThinkingEnd | None = None
    constraint: Constraint | None = None
    """Its place in its grammar, after the tokens that are known."""
    undelivered: list[int] = field(default_factory=list)
    """Output tokens that its grammar forced before the first step."""
    row: int = -1
    """Its row in RunningRequests, or -1 while waiting."""
    num_cached_tokens: int = 0
    preemptions: int = 0
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hash of each full block of `token_ids` so far; survives preemption."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Filled chunk by chunk; sent with the first token."""
    prompt_logprobs_sent: bool = False

    @classmethod
    def of(
        cls,
        source: GenerateRequest,
        handle: int,
        *,
        arrival_number: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        constraint: Constraint | None,
    ) -> Request:
        """Of lengths that the client has checked. `constraint` is behind the tokens it resumes."""
        sampling = source.sampling
        num_prompt_tokens = len(source.prompt_token_ids)
        room = max_model_len - num_prompt_tokens
        assert num_prompt_tokens > 0 and room > 0, "the client checks lengths"
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if source.pooling is not None:
            max_tokens = 1  # it ends where the first one would be sampled
        eos = frozenset() if sampling.ignore_eos else eos_token_ids
        allowed = sampling.allowed_token_ids
        known = source.prompt_token_ids + source.resume_token_ids
        forced: list[int] = []
        if constraint is not None and sampling.logprobs is None:
            # One token at least is sampled, with which all of them are delivered.
            forced = constraint.force(num_prompt_tokens + max_tokens - len(known) - 1)
        return cls(
            source=source,
            handle=handle,
            arrival_number=arrival_number,
            token_ids=np.array(known + forced, np.int32),
            num_prompt_tokens=num_prompt_tokens,
            max_total_tokens=num_prompt_tokens + max_tokens,
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            stop_token_ids=eos.union(sampling.stop_token_ids),
            allowed_token_ids=None if allowed is None else np.array(allowed, np.int64),
            banned=BannedSequences(source.banned_sequences) if source.banned_sequences else None,
            thinking_end=None if source.thinking is None else ThinkingEnd(source.thinking),
            constraint=constraint,
            undelivered=forced,
        )

    @property
    def request_id(self) -> str:
        return self.source.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.source.sampling

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.sampling.prompt_logprobs is not None and not self.prompt_logprobs_sent

    @property
    def order(self) -> tuple[int, int]:
        """Smaller runs first and is preempted last."""
        return (self.source.priority, self.arrival_number)

    @property
    def is_background(self) -> bool:
        return self.source.priority == BACKGROUND_PRIORITY

    def record(self, reason: FinishReason, num_tokens: int) -> RequestRecord:
        """The request's final account; `num_tokens` counts prompt and output."""
        return RequestRecord(
            request_id=self.request_id,
            finish_reason=reason,
            prompt_tokens=self.num_prompt_tokens,
            output_tokens=num_tokens - self.num_prompt_tokens,
            cached_tokens=self.num_cached_tokens,
            preemptions=self.preemptions,
            arrival_time=self.source.arrival_time,
            scheduled_time=self.scheduled_time,
            first_token_time=self.first_token_time,
            finished_time=time.monotonic(),
            tenant=self.source.tenant,
            max_tokens=self.sampling.max_tokens,
        )


class RunningRequests:
    """The running requests in columns. Row r of every array describes the same request.

    Rows are handed out by `add` and come back by `remove`; only rows where `active` is set hold
    meaningful values. Big columns are lazily committed memory.
    """

    def __init__(
        self, capacity: int, max_model_len: int, block_size: int, eos_token_ids: Collection[int]
    ) -> None:
        rows = capacity
        self.capacity = capacity
        self.max_model_len = max_model_len
        self.requests: list[Request | None] = [None] * rows
        self.active = np.zeros(rows, np.bool_)
        self.num_active = 0
        self.handles = np.zeros(rows, np.int64)
        # Goes up when a row is given back: a step in flight may outlive the request it was for.
        self.generations: LongArray = np.zeros(rows, np.int64)
        self.token_ids: IntArray = np.zeros((rows, max_model_len), np.int32)
        # Counts are those after the steps in flight: tokens from num_known_tokens on are unknown.
        self.num_tokens: IntArray = np.zeros(rows, np.int32)
        self.num_known_tokens: IntArray = np.zeros(rows, np.int32)
        self.num_prompt_tokens: IntArray = np.zeros(rows, np.int32)
        self.num_computed_tokens: IntArray = np.zeros(rows, np.int32)
        self.max_total_tokens: IntArray = np.zeros(rows, np.int32)
        self.block_table: IntArray = np.zeros((rows, -(-max_model_len // block_size)), np.int32)
        self.num_blocks: IntArray = np.zeros(rows, np.int32)

        self.temperature = np.zeros(rows, np.float32)
        self.top_k: IntArray = np.zeros(rows, np.int32)
        self.top_p = np.zeros(rows, np.float32)
        self.min_p = np.zeros(rows, np.float32)
        self.presence_penalty = np.zeros(rows, np.float32)
        self.frequency_penalty = np.zeros(rows, np.float32)
        self.repetition_penalty = np.zeros(rows, np.float32)
        self.seed: LongArray = np.zeros(rows, np.int64)
        self.num_logprobs: IntArray = np.zeros(rows, np.int32)
        self.stops_at_eos = np.zeros(rows, np.bool_)
        # Bit `token_id % STOP_BITS` is set for each other token that ends the row.
        self.stop_bits = np.zeros(rows, np.uint64)
        # The length below which the tokens that end a row are banned.
        self.min_total_tokens: IntArray = np.zeros(rows, np.int32)
        # The length from which on the host prepares a token's logits from all tokens before it.
        self.needs_known_from: IntArray = np.zeros(rows, np.int32)

        self._make_side_sets()
        self.token_masks = TokenMasks()
        """What grammars allow in the step that is launched."""
        self.eos_token_ids = frozenset(eos_token_ids)
        self._free_rows = list(range(rows - 1, -1, -1))

    def _make_side_sets(self) -> None:
        # Rows that need more than columns can say; empty sets cost an all-default step nothing.
        self.penalized: set[int] = set()
        self.biased: set[int] = set()
        self.restricted: set[int] = set()  # to allowed_token_ids, by banned sequences or a budget
        self.constrained: set[int] = set()  # by a grammar
        self.with_min_tokens: set[int] = set()
        self.with_stop_tokens: set[int] = set()
        self.with_prompt_logprobs: set[int] = set()
        self.pooled: set[int] = set()
        self.background: set[int] = set()
        self._side_sets = (
            self.penalized,
            self.biased,
            self.restricted,
            self.constrained,
            self.with_min_tokens,
            self.with_stop_tokens,
            self.with_prompt_logprobs,
            self.pooled,
            self.background,
        )

    @property
    def has_room(self) -> bool:
        return bool(self._free_rows)

    @property
    def has_foreground(self) -> bool:
        """Whether a request runs that is not of BACKGROUND_PRIORITY."""
        return self.num_active > len(self.background)

    def rows(self) -> LongArray:
        """Active rows, ascending."""
        return np.flatnonzero(self.active)

    def schedulable_rows(self, *, background: bool = True) -> LongArray:
        """Active rows whose next token can be computed now, ascending: not those that the step in
        flight brings to their full length, nor those that need the token it samples; those of the
        background only on demand."""
        can = self.active & (self.num_tokens < self.max_total_tokens)
        if self.penalized or self.restricted or self.constrained:
            needs_known = self.num_tokens >= self.needs_known_from
            can &= ~(needs_known & (self.num_known_tokens < self.num_tokens))
        if self.background and not background:
            can[list(self.background)] = False
        return np.flatnonzero(can)

    @property
    def adjusts_logits(self) -> bool:
        """Whether some row's logits are changed before a token is sampled from them."""
        return bool(
            self.penalized
            or self.biased
            or self.restricted
            or self.constrained
            or self.with_min_tokens
        )

    def any_ending(self) -> bool:
        """Whether the step in flight brings a row to its full length."""
        return bool((self.active & (self.num_tokens >= self.max_total_tokens)).any())

    def request(self, row: int) -> Request:
        request = self.requests[row]
        assert request is not None, f"row {row} holds no request"
        return request

    def add(self, request: Request) -> int:
        """Give `request` a row and copy what a step needs into the columns. Blocks come later."""
        row = self._free_rows.pop()
        sampling = request.sampling
        self.requests[row] = request
        self.active[row] = True
        self.num_active += 1
        self.handles[row] = request.handle
        num_tokens = len(request.token_ids)
        self.token_ids[row, :num_tokens] = request.token_ids
        self.num_tokens[row] = num_tokens
        self.num_known_tokens[row] = num_tokens
        self.num_prompt_tokens[row] = request.num_prompt_tokens
        self.num_computed_tokens[row] = 0
        self.max_total_tokens[row] = request.max_total_tokens
        self.num_blocks[row] = 0
        self.temperature[row] = sampling.temperature
        self.top_k[row] = max(sampling.top_k, 0)
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.presence_penalty[row] = sampling.presence_penalty
        self.frequency_penalty[row] = sampling.frequency_penalty
        self.repetition_penalty[row] = sampling.repetition_penalty
        self.seed[row] = request.seed
        self.num_logprobs[row] = -1 if sampling.logprobs is None else sampling.logprobs
        self.stops_at_eos[row] = not sampling.ignore_eos
        self._note_rarities(row, request)
        request.row = row
        return row

    def remove(self, row: int) -> Request:
        """Take the row back; its tokens return to the request, but for those in flight: they are
        lost, and sampled again if it goes on. Its blocks must be free already."""
        request = self.request(row)
        request.token_ids = self.token_ids[row, : self.num_known_tokens[row]].copy()
        request.row = -1
        self.requests[row] = None
        self.active[row] = False
        self.num_active -= 1
        self.generations[row] += 1
        for rows in self._side_sets:
            rows.discard(row)
        self._free_rows.append(row)
        return request

    def _note_rarities(self, row: int, request: Request) -> None:
        sampling = request.sampling
        penalized = (
            sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
            or sampling.repetition_penalty != 1.0
        )
        banned = request.banned
        looks_back = banned is not None and banned.looks_back
        constrained = request.constraint is not None
        thinking = request.source.thinking
        self.needs_known_from[row] = request.max_total_tokens  # never
        if penalized or looks_back or constrained:
            self.needs_known_from[row] = 0
        elif thinking is not None:
            length = request.num_prompt_tokens + thinking.max_tokens
            self.needs_known_from[row] = min(length, request.max_total_tokens)
        if constrained:
            self.constrained.add(row)
        if penalized:
            self.penalized.add(row)
        if request.allowed_token_ids is not None or banned is not None or thinking is not None:
            self.restricted.add(row)
        if sampling.logit_bias:
            self.biased.add(row)
        self.min_total_tokens[row] = 0
        if sampling.min_tokens and request.stop_token_ids:
            length = request.num_prompt_tokens + sampling.min_tokens
            self.min_total_tokens[row] = min(length, request.max_total_tokens)
            self.with_min_tokens.add(row)
        own_stop_token_ids = request.stop_token_ids - self.eos_token_ids
        self.stop_bits[row] = _bits(own_stop_token_ids)
        if own_stop_token_ids:
            self.with_stop_tokens.add(row)
        if request.wants_prompt_logprobs:
            self.with_prompt_logprobs.add(row)
        if request.source.pooling is not None:
            self.pooled.add(row)
        if request.is_background:
            self.background.add(row)


def _bits(token_ids: Collection[int]) -> int:
    bits = 0
    for token_id in token_ids:
        bits |= 1 << token_id % STOP_BITS
    return bits
