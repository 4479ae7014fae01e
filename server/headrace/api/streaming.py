"""Server-sent events to one client, and what happens when it is slow or gone.

Carries bytes; what they mean is the endpoints' matter. The format:
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from headrace.errors import EngineError, HeadraceError, error_body

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


class SlowClientError(Exception):
    """The client does not read what was made for it."""


class Outbox:
    """Events that wait for one client, at most `limit` bytes of them. One task takes them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._events: list[bytes] = []
        self._size = 0
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: bytes) -> None:
        """Raises SlowClientError when the limit is exceeded. One event may be as long as it needs
        to be: a long prompt's log-probabilities come in one."""
        self._size += len(event)
        if self._events and self._size > self._limit:
            raise SlowClientError(f"more than {self._limit} bytes wait for the client")
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if (waiter := self._waiter) is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def take(self) -> bytes:
        """Everything that waits, at once; empty when there will be no more."""
        while not self._events and not self._closed:
            # Not an Event: this happens for every token, and a future costs a third.
            self._loop = self._loop or asyncio.get_running_loop()
            self._waiter = self._loop.create_future()
            await self._waiter
        data = b"".join(self._events)
        self._events.clear()
        self._size = 0
        return data


class EventStream(StreamingResponse):
    """Sends what `produce` puts into the outbox; everything that waits goes out in one write.

    The response ends in one of three ways: as `produce` ended it (its last event is [DONE]); with
    an `error` event when `produce` failed after the first event; with a broken connection when the
    client is slow or gone. A failure before the first event is raised, for an ordinary error
    response: the headers wait for the first event. `produce` is cancelled when nobody reads.
    """

    def __init__(
        self,
        produce: Callable[[Outbox], Coroutine[Any, Any, None]],
        *,
        max_unsent: int,
        headers: Mapping[str, str] | None = None,
        first_known: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """`first_known`: gives the headers that are known with the first event."""
        super().__init__(
            iter(()),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})},
        )
        self._produce = produce
        self._first_known = first_known
        self._outbox = Outbox(max_unsent)
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientGoneError or SlowClientError when there is nobody to answer."""
        producer = asyncio.create_task(self._run_producer())
        writer = asyncio.create_task(self._write(send))
        watcher = asyncio.create_task(_disconnection(receive))
        try:
            await asyncio.wait({producer, writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not producer.done():
                if writer.done():
                    writer.result()
                raise ClientGoneError
            failure = producer.exception()
            if isinstance(failure, SlowClientError):
                raise failure
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not writer.done():
                raise ClientGoneError
            writer.result()
            await self._end(send, failure)
        finally:
            await _cancel(producer, writer, watcher)

    async def _run_producer(self) -> None:
        try:
            await self._produce(self._outbox)
        finally:
            self._outbox.close()

    async def _write(self, send: Send) -> None:
        while data := await self._outbox.take():
            if not self._started:
                self._started = True
                self.headers.update(self._first_known())
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _end(self, send: Send, failure: BaseException | None) -> None:
        if failure is not None and not self._started:
            raise failure
        last = b"" if failure is None else error_event(failure)
        await send({"type": "http.response.body", "body": last, "more_body": False})


def error_event(error: BaseException) -> bytes:
    """The event that tells of a failure in the middle of a stream."""
    if not isinstance(error, HeadraceError):
        logger.error("A stream failed", exc_info=error)
        error = EngineError("The server failed while it worked on this request.")
    return b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled (and ClientGoneError raised) if the client leaves
    first. The request's body must have been read."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnection(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _cancel(task, watcher)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
