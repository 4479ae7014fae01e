"""Decides what each step computes, and files what it found. A pure CPU object without tensors.

There is no prefill or decode here: a request's num_computed_tokens catches up with its num_tokens
under a token budget, and a request that has caught up gets a new token.

A step may be scheduled before the one before it is filed. So `schedule` moves the rows' counts on
as if the step were done, with UNKNOWN_TOKEN for what it samples; `update` puts the tokens in, and
drops what was computed for a request that has left its row meanwhile (it stopped, was aborted or
preempted). Blocks that are freed meanwhile may be handed out at once: steps run in order, so the
step in flight reads and writes them before the next owner does. Only blocks of filed steps are
published in the prefix cache.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections.abc import Collection

import numpy as np

from headrace.engine.batch import ScheduledBatch, StepResult
from headrace.engine.client import FinishReason, RequestOutput, StepOutputs, TokenLogprobs
from headrace.engine.constrained_rows import follow_grammars
from headrace.engine.grammar import Constraint
from headrace.engine.kv_cache import KVCacheManager
from headrace.engine.pooling import ended_with
from headrace.engine.request import (
    STOP_BITS,
    UNKNOWN_TOKEN,
    IntArray,
    LongArray,
    Request,
    RunningRequests,
)
from headrace.sampling_params import GenerateRequest

_NO_TOKEN = (
    "No token could be sampled: the model's logits are not numbers, or the request bans all tokens."
)


class Scheduler:
    """Continuous batching with chunked prefill, prefix caching, priorities and preemption.

    Order is (priority, arrival): smaller runs first. When a row needs a block and none is free,
    the running request that is last in that order gives its blocks up and is computed again later.

    Requests of BACKGROUND_PRIORITY fill idle steps: while another runs they keep their rows and
    blocks but get no tokens, and they give both up when another waits for them.
    """

    def __init__(
        self,
        running: RunningRequests,
        kv_cache: KVCacheManager,
        *,
        max_num_batched_tokens: int,
        eos_token_ids: Collection[int],
    ) -> None:
        assert max_num_batched_tokens >= running.capacity, "every row must get a token a step"
        self.running = running
        self.kv_cache = kv_cache
        self.num_preemptions = 0
        self.num_filed_tokens = 0
        """Tokens computed by the step that `update` filed last, without what it dropped."""
        self._max_num_batched_tokens = max_num_batched_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self._requests: dict[str, Request] = {}
        self._is_blocked = False
        """Whether the last step left a waiting request without blocks."""
        self._arrivals = 0
        self._finished: list[RequestOutput] = []
        """Ends decided outside `update` (deadlines), to go out with the next step."""

    # --- arrivals and departures ------------------------------------------------------------

    def add(
        self, source: GenerateRequest, handle: int, constraint: Constraint | None = None
    ) -> None:
        """Queue a request whose lengths the client has checked. `constraint`: its grammar, behind
        the tokens it resumes."""
        request = self._new_request(source, handle, constraint)
        self._requests[source.request_id] = request
        heapq.heappush(self._waiting, (request.order, request))

    def refuse(
        self, source: GenerateRequest, reason: FinishReason, error: str | None = None
    ) -> RequestOutput:
        """The end of a request that was not queued."""
        output = self._ended(self._new_request(source, 0, None), reason)
        return dataclasses.replace(output, error=error)

    def _new_request(
        self, source: GenerateRequest, handle: int, constraint: Constraint | None
    ) -> Request:
        self._arrivals += 1
        return Request.of(
            source,
            handle,
            arrival_number=self._arrivals - 1,
            max_model_len=self.running.max_model_len,
            eos_token_ids=self._eos_token_ids,
            constraint=constraint,
        )

    def abort(self, request_id: str) -> RequestOutput | None:
        """Free everything the request holds, now. None if it is unknown or has ended."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, FinishReason.ABORT)

    @property
    def num_running(self) -> int:
        return self.running.num_active

    @property
    def num_waiting(self) -> int:
        return len(self._requests) - self.running.num_active

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._finished)

    # --- schedule ---------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        """The next step's work; may be empty. Running rows first, then arrivals in order."""
        waits = bool(self._waiting) and not self._waiting[0][1].is_background
        if waits:
            self._make_room()
        self._is_blocked = False
        is_idle = not (waits or self.running.has_foreground)
        rows = self.running.schedulable_rows(background=is_idle)
        num_scheduled = self._share_budget(rows)
        short_of_blocks = self._grow(rows, num_scheduled)
        if short_of_blocks:
            fits = self.running.active[rows] & (num_scheduled > 0)
            rows, num_scheduled = rows[fits], num_scheduled[fits]
        elif self._waiting and self.running.has_room:
            rows, num_scheduled = self._admit(rows, num_scheduled)
        return self._advance(rows, num_scheduled)

    def _advance(self, rows: LongArray, num_scheduled: IntArray) -> ScheduledBatch:
        """Move the rows' counts on as if the step were done."""
        running = self.running
        starts = running.num_computed_tokens[rows]
        ends = starts + num_scheduled
        samples = ends == running.num_tokens[rows]
        running.num_computed_tokens[rows] = ends
        sampling_rows, positions = rows[samples], ends[samples]
        running.token_ids[sampling_rows, positions] = UNKNOWN_TOKEN
        running.num_tokens[sampling_rows] = positions + 1
        return ScheduledBatch(
            rows=rows,
            generations=running.generations[rows],
            starts=starts,
            num_scheduled=num_scheduled,
            samples=samples,
            num_tokens=int(num_scheduled.sum()),
        )

    def _share_budget(self, rows: LongArray) -> IntArray:
        """[R] one token for each row, and what is left of the budget to prompts in order."""
        wanted = self.running.num_tokens[rows] - self.running.num_computed_tokens[rows]
        num_scheduled: IntArray = np.minimum(wanted, 1)
        budget = self._max_num_batched_tokens - len(rows)
        prompts = np.flatnonzero(wanted > 1).tolist()
        for index in sorted(prompts, key=lambda i: self.running.request(int(rows[i])).order):
            extra = min(int(wanted[index]) - 1, budget)
            num_scheduled[index] += extra
            budget -= extra
        return num_scheduled

    def _grow(self, rows: LongArray, num_scheduled: IntArray) -> bool:
        """Give each row the blocks its scheduled tokens need; True if there were too few.

        Then rows are preempted; but while others end with the step in flight, and free theirs, a
        row waits for those: its num_scheduled is set to 0.
        """
        running = self.running
        target = running.num_computed_tokens[rows] + num_scheduled
        short = np.flatnonzero(target > running.num_blocks[rows] * self.kv_cache.block_size)
        too_few = False
        for index in short.tolist():
            row = int(rows[index])
            while running.active[row] and self.kv_cache.allocate(row, int(target[index])) is None:
                too_few = True
                if running.any_ending():
                    num_scheduled[index] = 0
                    break
                self._preempt_last()
        return too_few

    def _preempt_last(self) -> None:
        victim = max(
            (self.running.request(row) for row in self.running.rows().tolist()),
            key=lambda request: request.order,
        )
        self.kv_cache.free(victim.row)
        self.running.remove(victim.row)
        victim.preemptions += 1
        self.num_preemptions += 1
        heapq.heappush(self._waiting, (victim.order, victim))

    def _make_room(self) -> None:
        """For a request that waits: the background's last one gives way, one a step."""
        if self.running.background and (self._is_blocked or not self.running.has_room):
            self._preempt_last()

    def _admit(self, rows: LongArray, num_scheduled: IntArray) -> tuple[LongArray, IntArray]:
        """Start waiting requests while rows, budget and blocks last, strictly in order."""
        running = self.running
        budget = self._max_num_batched_tokens - int(num_scheduled.sum())
        new_rows: list[int] = []
        new_counts: list[int] = []
        now = time.monotonic()
        while self._waiting and budget > 0 and running.has_room:
            request = self._waiting[0][1]
            if self._requests.get(request.request_id) is not request:
                heapq.heappop(self._waiting)  # it was aborted while it waited
                continue
            deadline = request.source.deadline
            if deadline is not None and deadline < now:
                self._finished.append(self._end(request, FinishReason.DEADLINE))
                continue
            if request.is_background and running.has_foreground:
                break
            if not self._place(request):
                self._is_blocked = True
                break
            heapq.heappop(self._waiting)
            row = request.row
            if not request.scheduled_time:
                request.scheduled_time = now
            remaining = int(running.num_tokens[row] - running.num_computed_tokens[row])
            new_rows.append(row)
            new_counts.append(min(remaining, budget))
            budget -= new_counts[-1]
        if not new_rows:
            return rows, num_scheduled
        rows = np.concatenate([rows, np.array(new_rows, np.int64)])
        num_scheduled = np.concatenate([num_scheduled, np.array(new_counts, np.int32)])
        ascending = np.argsort(rows)
        return rows[ascending], num_scheduled[ascending]

    def _place(self, request: Request) -> bool:
        """Move a waiting request into a row with blocks for all its tokens; False if no room."""
        pooling = request.source.pooling
        needs_all = pooling is not None and pooling.needs_all_tokens
        hit = [] if needs_all else self.kv_cache.find_prefix(request)
        num_tokens = len(request.token_ids)
        row = self.running.add(request)
        # One block is left for each row that runs already, or admitting would soon preempt.
        reserve = self.running.num_active - 1
        if self.kv_cache.allocate(row, num_tokens, shared=hit, reserve=reserve) is None:
            self.running.remove(row)
            return False
        num_hit_tokens = len(hit) * self.kv_cache.block_size
        self.running.num_computed_tokens[row] = num_hit_tokens
        if request.preemptions == 0:
            request.num_cached_tokens = min(num_hit_tokens, request.num_prompt_tokens)
            self.kv_cache.count_lookup(num_tokens, num_hit_tokens)
        return True

    # --- update -----------------------------------------------------------------------------

    def update(self, batch: ScheduledBatch, result: StepResult) -> StepOutputs:
        """File the oldest step that is not: put sampled tokens in, end what has ended."""
        running = self.running
        tokens = result.token_ids
        current = batch.generations == running.generations[batch.rows]
        if not current.all():
            tokens = tokens[current[batch.samples]]
            batch = batch.kept(current)
        self.num_filed_tokens = batch.num_tokens
        ends = batch.ends
        self._commit_full_blocks(batch, ends)
        if result.prompt_logprobs:
            self._keep_prompt_logprobs(batch, result)

        rows, ends = batch.rows[batch.samples], ends[batch.samples]
        failed = tokens < 0
        running.token_ids[rows, ends] = tokens
        running.num_known_tokens[rows] = ends + ~failed
        stopped, full = self._ending(rows, tokens)
        several: dict[int, list[int]] = {}
        if running.constrained:
            several = follow_grammars(
                running, rows, tokens, stopped=stopped, full=full, failed=failed
            )
        rare = failed | stopped | full | (running.num_logprobs[rows] >= 0)
        rare |= ends == running.num_prompt_tokens[rows]  # first tokens carry times
        if several:
            rare |= np.isin(rows, list(several))
        plain = ~rare
        outputs = StepOutputs(
            handles=running.handles[rows[plain]].tolist(),
            token_ids=tokens[plain].tolist(),
            details=self._finished,
        )
        self._finished = []
        for index in np.flatnonzero(rare).tolist():
            row = int(rows[index])
            new = several.get(row) or [int(tokens[index])]
            reason = (
                FinishReason.ERROR
                if failed[index]
                else FinishReason.STOP
                if stopped[index]
                else FinishReason.LENGTH
                if full[index]
                else None
            )
            outputs.details.append(self._detail(row, new, reason, result))
        return outputs

    def _commit_full_blocks(self, batch: ScheduledBatch, ends: IntArray) -> None:
        crossed = np.flatnonzero(ends % self.kv_cache.block_size < batch.num_scheduled)
        for index in crossed.tolist():
            self.kv_cache.commit(int(batch.rows[index]), int(batch.starts[index]), int(ends[index]))

    def _keep_prompt_logprobs(self, batch: ScheduledBatch, result: StepResult) -> None:
        starts = dict(zip(batch.rows.tolist(), batch.starts.tolist(), strict=True))
        for row in result.prompt_logprobs.keys() & starts.keys():
            request, entries = self.running.request(row), result.prompt_logprobs[row]
            if not request.wants_prompt_logprobs:
                continue  # the step was launched before they were sent
            if request.prompt_logprobs is None:
                request.prompt_logprobs = [None]
            # A chunk that starts at s predicts tokens s+1, s+2, ...; after a preemption the
            # same ones are predicted again.
            del request.prompt_logprobs[starts[row] + 1 :]
            request.prompt_logprobs.extend(entries)

    def _ending(self, rows: LongArray, tokens: LongArray) -> tuple[np.ndarray, np.ndarray]:
        """([S] bool stopped by a token, [S] bool out of length)"""
        running = self.running
        # Compared with each: np.isin costs as much as the rest of an update of few rows.
        stopped = np.zeros(len(rows), np.bool_)
        for token_id in self._eos_token_ids:
            stopped |= tokens == token_id
        stopped &= running.stops_at_eos[rows]
        if running.with_stop_tokens:
            bits = running.stop_bits[rows] >> (tokens % STOP_BITS).astype(np.uint64)
            for index in np.flatnonzero(bits & np.uint64(1)).tolist():
                request = running.request(int(rows[index]))
                stopped[index] |= int(tokens[index]) in request.stop_token_ids
        return stopped, running.num_known_tokens[rows] >= running.max_total_tokens[rows]

    def _detail(
        self, row: int, tokens: list[int], reason: FinishReason | None, result: StepResult
    ) -> RequestOutput:
        request = self.running.request(row)
        if request.source.pooling is not None and reason is not FinishReason.ERROR:
            self._release(request)
            return ended_with(request, result.vectors[row])
        cached_tokens = None
        scheduled_time = first_token_time = 0.0
        if not request.first_token_time:
            first_token_time = request.first_token_time = time.monotonic()
            scheduled_time = request.scheduled_time
            cached_tokens = request.num_cached_tokens
        logprobs = result.logprobs.get(row)
        prompt_logprobs: list[TokenLogprobs | None] | None = None
        if request.prompt_logprobs is not None:
            prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
            request.prompt_logprobs_sent = True
            self.running.with_prompt_logprobs.discard(row)
        failed, error = reason is FinishReason.ERROR, None
        if failed:
            error = _NO_TOKEN
            if request.constraint is not None and request.constraint.error:
                reason, error = FinishReason.REFUSED, request.constraint.error
        is_stop_token = reason is FinishReason.STOP and tokens[-1] in request.stop_token_ids
        record = None
        if reason is not None:
            self._release(request)
            record = request.record(reason, len(request.token_ids))
        return RequestOutput(
            request_id=request.request_id,
            token_ids=[] if failed else tokens,
            logprobs=None if logprobs is None or failed else [logprobs],
            prompt_logprobs=prompt_logprobs,
            cached_tokens=cached_tokens,
            scheduled_time=scheduled_time,
            first_token_time=first_token_time,
            finish_reason=reason,
            stop_token_id=tokens[-1] if is_stop_token else None,
            error=error,
            record=record,
        )

    def _end(self, request: Request, reason: FinishReason) -> RequestOutput:
        self._release(request)
        return self._ended(request, reason)

    def _ended(self, request: Request, reason: FinishReason) -> RequestOutput:
        return RequestOutput(
            request_id=request.request_id,
            finish_reason=reason,
            record=request.record(reason, len(request.token_ids)),
        )

    def _release(self, request: Request) -> None:
        """Forget a request. If it waits, its heap entry is skipped when it comes up."""
        del self._requests[request.request_id]
        if request.row >= 0:
            self.kv_cache.free(request.row)
            self.running.remove(request.row)

    def check_invariants(self) -> None:
        """Nothing leaked, nothing lost; raises AssertionError. Every engine test calls it."""
        self.kv_cache.check_invariants()
        running = self.running
        for row in running.rows().tolist():
            request = running.request(row)
            assert request.row == row, f"row {row} and its request disagree"
            assert self._requests.get(request.request_id) is request, f"row {row} is a ghost"
            assert running.num_computed_tokens[row] < running.num_tokens[row], f"row {row} idles"
            known = running.token_ids[row, : running.num_tokens[row]] != UNKNOWN_TOKEN
            num_known = running.num_known_tokens[row]
            assert known[:num_known].all(), f"row {row} misses a token"
            assert not known[num_known:].any(), f"row {row} has a token from nowhere"
        waiting = {id(request) for _, request in self._waiting}
        for request in self._requests.values():
            assert request.row >= 0 or id(request) in waiting, f"{request.request_id} is lost"
        if not self._requests:
            assert self.kv_cache.num_used_blocks == 0, "blocks are held by nobody"
