"""The open loop: each request is sent when it is due, whether or not earlier ones were answered.
It records traces and computes nothing from them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from headrace.bench.http_client import HttpClient
from headrace.bench.measure import Trace
from headrace.bench.workload import Prompt

Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Sampling:
    """The sampling fields that every request carries; those at None are not sent."""

    temperature: float | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Call:
    """A request, encoded before the run so that the run only writes bytes."""

    path: str
    body: bytes
    requested_tokens: int
    prompt_len: int | None


def make_call(prompt: Prompt, endpoint: Endpoint, model: str, sampling: Sampling) -> Call:
    """Encode `prompt`, which suits `endpoint`: token ids or text, or messages for chat."""
    content: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if endpoint == "chat":
        assert prompt.token_ids is None, "chat takes text"
        content["messages"] = prompt.messages or [{"role": "user", "content": prompt.text}]
        content["max_completion_tokens"] = prompt.output_tokens
    else:
        assert prompt.messages is None, "completions take a prompt"
        content["prompt"] = prompt.token_ids if prompt.text is None else prompt.text
        content["max_tokens"] = prompt.output_tokens
    if sampling.temperature is not None:
        content["temperature"] = sampling.temperature
    if sampling.ignore_eos:
        content["ignore_eos"] = True
    return Call(
        path=PATHS[endpoint],
        body=msgspec.json.encode(content),
        requested_tokens=prompt.output_tokens,
        prompt_len=None if prompt.token_ids is None else len(prompt.token_ids),
    )


async def run_load(
    client: HttpClient,
    calls: Sequence[Call],
    due: Sequence[float],
    *,
    max_concurrency: int | None,
    keep_text: bool,
    on_done: Callable[[Trace], None] = lambda trace: None,
) -> tuple[list[Trace], float]:
    """Send each call at `due` seconds after the start; its trace, and the run's length in seconds.

    At most `max_concurrency` are under way at once; the others wait, which counts as latency from
    the scheduled arrival. Only where all are due at once (a closed loop) has a request no schedule
    but the free place: there it counts from taking it.
    """
    closed_loop = max_concurrency is not None and not any(due)
    places = asyncio.Semaphore(max_concurrency or len(calls) or 1)
    start = time.perf_counter()

    async def one(call: Call, scheduled: float) -> Trace:
        async with places:
            if closed_loop:
                scheduled = time.perf_counter()
            trace = await send(client, call, scheduled, keep_text=keep_text)
        on_done(trace)
        return trace

    tasks: list[asyncio.Task[Trace]] = []
    try:
        for call, offset in zip(calls, due, strict=True):
            # Again: timers count whole milliseconds and may end a little early.
            while (wait := start + offset - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(call, start + offset)))
        traces = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return traces, time.perf_counter() - start


async def send(client: HttpClient, call: Call, scheduled: float, *, keep_text: bool) -> Trace:
    """Make one request; whatever goes wrong is in the trace, never raised."""
    trace = Trace(call.requested_tokens, call.prompt_len, scheduled)
    recorder = _Recorder(trace, keep_text)
    trace.sent = time.perf_counter()
    try:
        response = await client.post(call.path, call.body, recorder.on_event)
    except (OSError, msgspec.MsgspecError) as error:
        trace.error = f"{type(error).__name__}: {error}"
        return trace
    if response.status != 200:
        body = response.body.decode(errors="replace")
        trace.error = f"HTTP {response.status}: {body[:500]}"
    elif not trace.error:
        trace.error = recorder.what_is_missing()
    return trace


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Event(msgspec.Struct):
    """The fields of a chunk of either endpoint that matter here."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class _Recorder:
    """Writes the events of one stream into its trace."""

    def __init__(self, trace: Trace, keep_text: bool) -> None:
        self._trace = trace
        self._keep_text = keep_text
        self._done = False

    def on_event(self, arrived: float, data: bytes) -> None:
        trace = self._trace
        if data == b"[DONE]":
            self._done = True
            return
        event = _decode(data)
        if event.error is not None:
            trace.error = f"error event: {event.error}"
        if event.usage is not None:
            trace.prompt_tokens = event.usage.prompt_tokens
            trace.completion_tokens = event.usage.completion_tokens
        if not event.choices:
            return
        trace.chunk_times.append(arrived)
        choice = event.choices[0]
        trace.finish_reason = choice.finish_reason or trace.finish_reason
        delta = choice.delta
        text = choice.text or (delta and (delta.content or delta.reasoning_content))
        if text:
            trace.text_chunks += 1
            if self._keep_text:
                trace.text.append(text)

    def what_is_missing(self) -> str:
        """A stream may end only with a finish_reason and [DONE]; "" if it had both."""
        if not self._trace.chunk_times:
            return "the stream held no token"
        if self._trace.finish_reason is None:
            return "the stream ended without a finish_reason"
        return "" if self._done else "the stream ended without [DONE]"
