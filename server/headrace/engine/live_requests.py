"""The client's side of requests that live: admission limits, delivery of outputs, replay.

Used by every EngineClient; knows nothing of processes or sockets, and runs on one event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable

from headrace.engine.admission import AdmissionQueue
from headrace.engine.client import (
    FinishReason,
    ModelInfo,
    QueueLimits,
    RequestOutput,
    RequestRecord,
    StepOutputs,
    Task,
    TokenLogprobs,
)
from headrace.engine.queue_board import QueueBoard
from headrace.errors import (
    ContextLengthExceededError,
    EngineError,
    HeadraceError,
    InvalidRequestError,
)
from headrace.sampling_params import GenerateRequest

MAX_DEATHS = 2
"""A request that was running when the engine died this often is taken for the cause, and failed."""


class LiveStream:
    """Implements client.RequestStream. Written by the event loop's delivery, read by one task."""

    def __init__(
        self,
        request: GenerateRequest,
        on_abort: Callable[[LiveStream], None],
        on_news: Callable[[LiveStream], None],
    ) -> None:
        """`on_news`: told when there is something for a reader that waits. It must soon call
        `hand_over`, and is not told again before that."""
        self.request_id = request.request_id
        self.request = request
        self.received = list(request.resume_token_ids)
        """All output tokens so far: what a replay starts from."""
        self.deaths = 0
        self.first_token_time = 0.0
        self.done = False
        self._on_abort = on_abort
        self._on_news = on_news
        self._told = False
        self._reader: Callable[[RequestOutput], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._cached_tokens: int | None = None
        self._times = (0.0, 0.0)
        self._end: RequestOutput | None = None
        self._error: HeadraceError | None = None

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        while not (self._tokens or self._end or self.done):
            await self._wait()
        output = self._take()
        if output is None:
            raise StopAsyncIteration
        return output

    async def read(self, on_output: Callable[[RequestOutput], None]) -> None:
        while (output := self._take()) is not None:  # what came before there was a reader
            on_output(output)
        if not self.done:
            self._reader = on_output
            try:
                await self._wait()
            finally:
                self._reader = None

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def hand_over(self) -> None:
        """Give what arrived to the reader, or wake it."""
        self._told = False
        waiter, reader = self._waiter, self._reader
        if waiter is None or waiter.done():
            return
        try:
            if reader is not None and (output := self._take()) is not None:
                reader(output)
            if reader is None or self.done:
                waiter.set_result(None)
        except Exception as error:
            waiter.set_exception(error)

    def _take(self) -> RequestOutput | None:
        """Everything that arrived, or None. Raises the error that ended the stream."""
        if self._error is not None:
            raise self._error
        end = self._end
        if end is None and not self._tokens:
            return None
        output = RequestOutput(
            request_id=self.request_id,
            token_ids=self._tokens,
            logprobs=self._logprobs or None,
            prompt_logprobs=self._prompt_logprobs,
            cached_tokens=self._cached_tokens,
            scheduled_time=self._times[0],
            first_token_time=self._times[1],
            finish_reason=end.finish_reason if end else None,
            stop_token_id=end.stop_token_id if end else None,
            error=end.error if end else None,
            vector=end.vector if end else None,
            record=end.record if end else None,
        )
        self._tokens, self._logprobs, self._prompt_logprobs = [], [], None
        self._cached_tokens, self._times, self._end = None, (0.0, 0.0), None
        return output

    def abort(self) -> None:
        if not self.done:
            self._on_abort(self)

    def push_token(self, token_id: int) -> None:
        self.received.append(token_id)
        self._tokens.append(token_id)
        if not self._told:
            self._tell()

    def push(self, output: RequestOutput) -> None:
        if output.token_ids and not self.first_token_time:
            self.first_token_time = time.monotonic()
        self.received.extend(output.token_ids)
        self._tokens.extend(output.token_ids)
        if output.logprobs:
            self._logprobs.extend(output.logprobs)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if output.cached_tokens is not None:
            self._cached_tokens = output.cached_tokens
            self._times = (output.scheduled_time, output.first_token_time)
        if output.finish_reason is not None:
            self._end = output
            self.done = True
        self._tell()

    def end_unfinished(self) -> None:
        """After an abort: whoever still reads is told that there is no more."""
        self._tokens = []
        self.done = True
        self._tell()

    def fail(self, error: HeadraceError) -> None:
        self._error = error
        self.done = True
        self._tell()

    def _tell(self) -> None:
        if self._waiter is not None and not self._told:
            self._told = True
            self._on_news(self)


class LiveRequests:
    """All requests between submit and their end, by handle."""

    def __init__(
        self,
        limits: QueueLimits,
        *,
        on_abort: Callable[[str], None],
        on_end: Callable[[RequestRecord], None],
        board: QueueBoard | None = None,
    ) -> None:
        """`board`: shared with others whose requests wait for the same engine."""
        self.queue = AdmissionQueue(limits, board)
        self._on_abort = on_abort
        self._on_end = on_end
        self._by_handle: dict[int, LiveStream] = {}
        self._handle_of: dict[str, int] = {}
        self._next_handle = itertools.count(1)
        self._aborted: dict[str, LiveStream] = {}
        """Those whose readers have left, until the engine's record comes."""
        self._with_news: list[LiveStream] = []

    def __len__(self) -> int:
        return len(self._by_handle)

    def admit(self, request: GenerateRequest, info: ModelInfo) -> tuple[int, LiveStream]:
        """Check and register a request: (its handle, its stream). Raises as EngineClient.submit."""
        _check(request, info)
        if request.request_id in self._handle_of:
            raise InvalidRequestError(
                f"A request with id {request.request_id!r} is running already.", param="request_id"
            )
        self.queue.enter(request)
        if request.sampling.seed is None:
            # Fixed here, so that a replay on a restarted engine repeats the same tokens.
            sampling = dataclasses.replace(request.sampling, seed=secrets.randbits(62))
            request = dataclasses.replace(request, sampling=sampling)
        handle = next(self._next_handle)
        stream = LiveStream(request, self._abort, self._announce)
        self._by_handle[handle] = stream
        self._handle_of[request.request_id] = handle
        self.queue.count_live(len(self._by_handle))
        return handle, stream

    def deliver(self, outputs: StepOutputs) -> None:
        """Hand a step's news to the streams. Requests unknown here were aborted: ignored."""
        by_handle = self._by_handle
        for handle, token_id in zip(outputs.handles, outputs.token_ids, strict=True):
            stream = by_handle.get(handle)
            if stream is not None:
                stream.push_token(token_id)
        for output in outputs.details:
            stream = by_handle.get(self._handle_of.get(output.request_id, 0))
            if stream is not None:
                self.queue.leave(output.request_id)
                stream.push(output)
                if stream.done:
                    self._forget(stream)
            if output.record is not None:
                self._aborted.pop(output.request_id, None)
                record = output.record
                if stream is not None and stream.deaths and stream.first_token_time:
                    record = _across_engines(record, stream.first_token_time)
                self._on_end(record)

    def _announce(self, stream: LiveStream) -> None:
        """Readers are called when all that was received at once has been delivered: several steps
        are one output. For hundreds of streams that is cheaper than to wake a task for each."""
        if not self._with_news:
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._with_news.append(stream)

    def _hand_over(self) -> None:
        streams, self._with_news = self._with_news, []
        for stream in streams:
            stream.hand_over()

    def replays(self) -> Iterable[tuple[int, GenerateRequest]]:
        """What to submit to a restarted engine. Fails requests that seem to kill engines."""
        self._close_aborted()
        for handle, stream in list(self._by_handle.items()):
            # Whether a vector was being computed is not known.
            if stream.request_id not in self.queue or stream.request.pooling is not None:
                stream.deaths += 1
            if stream.deaths >= MAX_DEATHS:
                self._lose(
                    stream, EngineError("The engine died repeatedly while computing this request.")
                )
                continue
            sampling = stream.request.sampling
            if stream.received:
                sampling = dataclasses.replace(sampling, prompt_logprobs=None)
            yield (
                handle,
                dataclasses.replace(
                    stream.request, sampling=sampling, resume_token_ids=list(stream.received)
                ),
            )

    def fail_all(self, error: HeadraceError) -> None:
        """End all requests with `error`: there will be no engine any more."""
        self._close_aborted()
        for stream in list(self._by_handle.values()):
            self._lose(stream, error)

    def _abort(self, stream: LiveStream) -> None:
        """The reader has left: nothing more is delivered, the engine frees the blocks."""
        stream.end_unfinished()
        self._forget(stream)
        self._aborted[stream.request_id] = stream
        self._on_abort(stream.request_id)

    def _close_aborted(self) -> None:
        """The engine that was told of these aborts is gone."""
        for stream in self._aborted.values():
            self._on_end(_own_record(stream, FinishReason.ABORT))
        self._aborted.clear()

    def _lose(self, stream: LiveStream, error: HeadraceError) -> None:
        self._forget(stream)
        stream.fail(error)
        self._on_end(_own_record(stream, FinishReason.ERROR))

    def _forget(self, stream: LiveStream) -> None:
        handle = self._handle_of.pop(stream.request_id, None)
        if handle is not None:
            del self._by_handle[handle]
            self.queue.count_live(len(self._by_handle))
        self.queue.leave(stream.request_id)


def _own_record(stream: LiveStream, reason: FinishReason) -> RequestRecord:
    """The account of a request whose engine cannot give it any more."""
    request = stream.request
    return RequestRecord(
        request_id=request.request_id,
        finish_reason=reason,
        prompt_tokens=len(request.prompt_token_ids),
        output_tokens=len(stream.received),
        cached_tokens=0,
        preemptions=0,
        arrival_time=request.arrival_time,
        scheduled_time=0.0,
        first_token_time=0.0,
        finished_time=time.monotonic(),
        tenant=request.tenant,
        max_tokens=request.sampling.max_tokens,
    )


def _across_engines(record: RequestRecord, first_token_time: float) -> RequestRecord:
    """The last engine of a replayed request knows only its own part: its first token is older."""
    return dataclasses.replace(
        record,
        first_token_time=first_token_time,
        scheduled_time=min(record.scheduled_time, first_token_time),
    )


def _check(request: GenerateRequest, info: ModelInfo) -> None:
    """Lengths and token ids that this model cannot take."""
    num_prompt_tokens = len(request.prompt_token_ids)
    if num_prompt_tokens == 0:
        raise InvalidRequestError("The prompt is empty: it has no tokens.", param="prompt")
    if request.pooling is None and Task.GENERATE not in info.tasks:
        raise InvalidRequestError(
            "This model generates nothing: it is an encoder.",
            param="model",
            code="unsupported_task",
        )
    if request.pooling is not None:
        if num_prompt_tokens > info.max_prompt_len:
            raise ContextLengthExceededError(
                f"The input has {num_prompt_tokens} tokens, and the model takes "
                f"{info.max_prompt_len}. Shorten it, or set truncate_prompt_tokens.",
                param="input",
            )
    elif num_prompt_tokens >= info.max_model_len:
        raise ContextLengthExceededError(
            f"This model's maximum context length is {info.max_model_len} tokens, and the prompt "
            f"alone has {num_prompt_tokens}; at least one must be left for the output. Shorten "
            "the prompt.",
            param="messages",
        )
    if min(request.prompt_token_ids) < 0 or max(request.prompt_token_ids) >= info.vocab_size:
        raise InvalidRequestError(
            f"prompt holds token ids outside [0, {info.vocab_size - 1}].", param="prompt"
        )
    sampling = request.sampling
    for name, ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", tuple(sampling.logit_bias or ())),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
        ("thinking_token_budget", (request.thinking.end_id,) if request.thinking else ()),
        ("bad_words", tuple(itertools.chain.from_iterable(request.banned_sequences))),
    ):
        unknown = [token_id for token_id in ids if not 0 <= token_id < info.vocab_size]
        if unknown:
            raise InvalidRequestError(
                f"{name} names token {unknown[0]}, but the vocabulary is "
                f"[0, {info.vocab_size - 1}].",
                param=name,
            )
    if sampling.allowed_token_ids is not None:
        left = set(sampling.allowed_token_ids)
        left -= {sequence[0] for sequence in request.banned_sequences if len(sequence) == 1}
        if sampling.min_tokens:
            left -= {*sampling.stop_token_ids, *(() if sampling.ignore_eos else info.eos_token_ids)}
        if not left:
            raise InvalidRequestError(
                "allowed_token_ids names only tokens that bad_words or min_tokens forbid; name "
                "others, too.",
                param="allowed_token_ids",
            )
