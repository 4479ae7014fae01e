"""The heartbeat of an encoder: whole requests in batches of a token budget, a vector for each.

There is no KV cache, no chunk and no running state: a request waits, then it is done.
"""

from __future__ import annotations

import heapq
import time

from headrace.engine.client import (
    EngineStats,
    FinishReason,
    ModelInfo,
    RequestOutput,
    RequestRecord,
    StepOutputs,
)
from headrace.engine.encoder_runner import EncoderRunner
from headrace.engine.pooling import finished
from headrace.engine.resident_bytes import ResidentBytes
from headrace.sampling_params import BACKGROUND_PRIORITY, GenerateRequest


class EncoderEngine:
    """Implements engine.AnyEngine. Not thread-safe: one owner calls everything."""

    def __init__(self, runner: EncoderRunner, info: ModelInfo, *, max_batched_tokens: int) -> None:
        """`max_batched_tokens`: of one batch, unless one request alone has more."""
        self.info = info
        self._runner = runner
        self._max_batched_tokens = max_batched_tokens
        self._waiting: list[tuple[int, int, str]] = []
        """(priority, arrival, id): a heap; ids that are not in _requests were aborted."""
        self._requests: dict[str, GenerateRequest] = {}
        self._ended: list[RequestOutput] = []
        """By aborts, to go out with the next step."""
        self._arrivals = 0
        self._steps = 0
        self._step_tokens = 0
        self._resident_bytes = ResidentBytes()

    def add(self, request: GenerateRequest, handle: int) -> None:
        """Queue a request whose length the client has checked."""
        assert request.pooling is not None, "the client checks what is asked for"
        self._requests[request.request_id] = request
        heapq.heappush(self._waiting, (request.priority, self._arrivals, request.request_id))
        self._arrivals += 1

    def abort(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._ended.append(_output(request, FinishReason.ABORT))

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._ended)

    def step(self) -> StepOutputs:
        """Compute one batch: what ended is in the result."""
        details, self._ended = self._ended, []
        batch, late = self._take()
        details += [_output(request, FinishReason.DEADLINE) for request in late]
        if batch:
            begin = time.monotonic()
            for request, vector in zip(batch, self._runner.run(batch), strict=True):
                assert request.pooling is not None
                encoded = finished(vector, request.pooling)
                details.append(_output(request, FinishReason.STOP, begin=begin, vector=encoded))
            self._steps += 1
            self._step_tokens = sum(len(request.prompt_token_ids) for request in batch)
        return StepOutputs([], [], details, self.stats())

    def _take(self) -> tuple[list[GenerateRequest], list[GenerateRequest]]:
        """(the next batch, those that waited past their deadline). Strictly in order, but those of
        the background only when nobody else waits."""
        batch: list[GenerateRequest] = []
        late: list[GenerateRequest] = []
        room, now = self._max_batched_tokens, time.monotonic()
        while self._waiting and len(batch) < self.info.max_num_seqs:
            priority, _, request_id = self._waiting[0]
            request = self._requests.get(request_id)
            if request is not None:
                if batch and (
                    len(request.prompt_token_ids) > room
                    or (priority == BACKGROUND_PRIORITY != batch[0].priority)
                ):
                    break
                del self._requests[request_id]
                if request.deadline is not None and request.deadline < now:
                    late.append(request)
                else:
                    batch.append(request)
                    room -= len(request.prompt_token_ids)
            heapq.heappop(self._waiting)
        return batch, late

    def idle(self) -> bool:
        return False

    def use_tokenizer(self, tokenizer_json: str) -> None:
        """Nothing is generated, so nothing is constrained."""

    def reset_prefix_cache(self) -> bool:
        """There is none: each request is computed anew."""
        return True

    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=len(self._requests),
            steps=self._steps,
            step_tokens=self._step_tokens,
            last_step_time=time.monotonic(),
            resident_bytes=self._resident_bytes(),
        )

    def check_invariants(self) -> None:
        """Raises AssertionError if a request is lost."""
        waiting = {request_id for _, _, request_id in self._waiting}
        assert self._requests.keys() <= waiting, "a request is in no queue"


def _output(
    request: GenerateRequest,
    reason: FinishReason,
    *,
    begin: float = 0.0,
    vector: bytes | None = None,
) -> RequestOutput:
    """The one output of a request; `begin`: of its batch."""
    record = RequestRecord(
        request_id=request.request_id,
        finish_reason=reason,
        prompt_tokens=len(request.prompt_token_ids),
        output_tokens=0,
        cached_tokens=0,
        preemptions=0,
        arrival_time=request.arrival_time,
        scheduled_time=begin,
        first_token_time=0.0,
        finished_time=time.monotonic(),
        tenant=request.tenant,
    )
    return RequestOutput(
        request_id=request.request_id,
        cached_tokens=0 if vector is not None else None,
        scheduled_time=begin,
        finish_reason=reason,
        vector=vector,
        record=record,
    )
