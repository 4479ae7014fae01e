"""The answer to one request, over all the tries that it takes.

What a client has not seen can be asked for again. A stream that it has seen a part of goes on at
another replica from the tokens in its journal; without a journal it ends with an error event.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from headrace.errors import HeadraceError
from headrace.route.asked import Asked
from headrace.route.events import EventCutter, Journal
from headrace.route.http_text import (
    JOURNAL,
    LAST_CHUNK,
    Headers,
    OwnAnswer,
    chunk,
    error_answer,
    error_event,
    header,
    header_lines,
    relayed,
    status_line,
)
from headrace.route.upstream import Connection

MAX_HELD = 4 << 20
"""Bytes of an answer that wait for its end: until then it can be asked for again."""
_TAIL = 2048
BUSY = (429, 503)
_OF_THE_BODY = frozenset((b"content-length", JOURNAL))


class Client(Protocol):
    """Where the answer goes."""

    def write(self, data: bytes) -> None: ...

    def end(self, *, keep_alive: bool) -> None:
        """The answer is complete."""

    def cut(self) -> None:
        """The answer cannot be completed: close the connection."""


T = TypeVar("T", bound=Client)


class Outcome(enum.Enum):
    """Of one try."""

    DONE = "the client has its answer"
    HELD = "the answer is complete, and the client has seen nothing of it"
    LOST = "the replica died"
    REFUSED = "the replica cannot go on with this stream"


class Answer:
    """What the client has been told, over all tries. Receives what replicas send."""

    def __init__(self, asked: Asked, client: Client) -> None:
        self._asked, self._client = asked, client
        self.began = time.perf_counter()
        self.first_byte = 0.0
        self.status = 0
        """What the client was told; 0 before."""
        self.journal: EventCutter | None = None
        """Of a stream of events, once it has begun."""
        self.held: OwnAnswer | None = None
        """A whole answer that the client has not seen."""
        self._chunked = False
        self.connection: Connection | None = None
        self.outcome: asyncio.Future[Outcome]
        self._paused = False
        self._holds = False
        self._length: int | None = None
        self._client_head = b""
        self._head: tuple[int, Headers] = (0, ())
        self._pieces: list[bytes] = []
        self._size = 0
        self._writable = asyncio.Event()

    def begin_try(self, connection: Connection, on_answer: Callable[[], None]) -> None:
        """`on_answer`: called when the replica begins to answer."""
        self._on_answer = on_answer
        self.connection = connection
        self.outcome = asyncio.get_running_loop().create_future()
        self._pieces, self._size, self._holds = [], 0, False
        self._writable.set()
        if self._paused:
            connection.pause_reading()

    # --- a Receiver ---------------------------------------------------------------------------

    def on_head(self, status: int, headers: Headers, length: int | None) -> None:
        self._on_answer()
        events = header(headers, b"content-type").startswith(b"text/event-stream")
        journal = header(headers, JOURNAL) == b"1"
        if self.journal is not None:  # a stream goes on
            if not (status == 200 and journal and events):
                self._settle(Outcome.REFUSED)
            return
        self._head = status, headers
        self._length = length
        if events and status == 200:
            self.journal = Journal() if journal else EventCutter()
        elif self._asked.method == b"HEAD":
            self._start(None)
        else:
            fits = length is None or length <= MAX_HELD
            repeatable = self._asked.repeatable or status in BUSY or status == 404
            self._holds = fits and repeatable
            if not self._holds:
                self._start(length)

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)

    def on_pause(self) -> None:
        if self._holds and self._size > MAX_HELD:
            self._holds = False
            self._start(None if self._length is None else self._length)
        if self._pieces and not self._holds and not self.outcome.done():
            data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces = []
            if self.journal is not None:
                data = self.journal.feed(data)
            self._forward(data)

    def on_end(self) -> None:
        if self._holds:
            status, headers = self._head
            self.held = OwnAnswer(status, b"".join(self._pieces), headers)
            self._settle(Outcome.HELD)
            return
        self.on_pause()
        if self.outcome.done():
            return
        if self.journal is not None:
            self._forward(self.journal.rest())
            if not self.status:
                self._start(None)
        self._finish()

    def on_lost(self) -> None:
        self.on_pause()
        self._settle(Outcome.LOST)

    def on_writable(self, writable: bool) -> None:
        if writable:
            self._writable.set()
        else:
            self._writable.clear()

    async def writable(self) -> None:
        await self._writable.wait()

    @property
    def tail(self) -> bytes:
        """The end of what the replica said, where usage stands."""
        if self.held is not None:
            return self.held.body[-_TAIL:]
        return self.journal.last[-_TAIL:] if self.journal is not None else b""

    def watched_by(self, watcher: Callable[[Client], T]) -> T:
        """What the client is sent goes through a watcher from here on."""
        made = watcher(self._client)
        self._client = made
        return made

    # --- towards the client -------------------------------------------------------------------

    def pause(self) -> None:
        """The client is slow: so is what comes from the replica."""
        self._paused = True
        if self.connection is not None and self.connection.usable:
            self.connection.pause_reading()

    def resume(self) -> None:
        self._paused = False
        if self.connection is not None and self.connection.usable:
            self.connection.resume_reading()

    def _start(self, length: int | None) -> None:
        """The head of the answer, to the client."""
        status, headers = self._head
        self.first_byte = time.perf_counter()
        self.status = status
        kept = relayed(headers, without=_OF_THE_BODY)
        has_body = self._asked.method != b"HEAD" and status not in (204, 304)
        if not has_body:
            given = header(headers, b"content-length")
            kept += [(b"content-length", given)] if given and status != 204 else []
        elif length is not None:
            kept.append((b"content-length", b"%d" % length))
        elif not self._asked.http_1_0:
            self._chunked = True
            kept.append((b"transfer-encoding", b"chunked"))
        else:
            self._asked.keep_alive = False
        if not self._asked.keep_alive:
            kept.append((b"connection", b"close"))
        self._client_head = status_line(status) + header_lines(kept) + b"\r\n"
        if self.journal is None:
            self._client.write(self._client_head)
            self._client_head = b""

    def _forward(self, data: bytes) -> None:
        if not data:
            return
        if not self.status:
            self._start(None)
        if self._chunked:
            data = chunk(data)
        if self._client_head:  # with the first event, in one write
            data, self._client_head = self._client_head + data, b""
        self._client.write(data)

    def _finish(self) -> None:
        last = self._client_head + (LAST_CHUNK if self._chunked else b"")
        self._client_head = b""
        if last:
            self._client.write(last)
        self._client.end(keep_alive=self._asked.keep_alive)
        self._settle(Outcome.DONE)

    def _settle(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def send(self, answer: OwnAnswer) -> None:
        """A whole answer at once."""
        self._head = answer.status, answer.headers
        self.journal = None
        self._start(len(answer.body))
        if self._asked.method != b"HEAD" and answer.body:
            self._client.write(answer.body)
        self._client.end(keep_alive=self._asked.keep_alive)

    def send_own(self, answer: OwnAnswer) -> None:
        """One that the door made: with the request's id, as those of replicas have."""
        name = b"request-id" if self._asked.path.startswith("/v1/messages") else b"x-request-id"
        given = self._asked.request_id.encode("latin-1", "replace")
        answer.headers = (*answer.headers, (name, given))
        self.send(answer)

    def fail(self, error: HeadraceError) -> None:
        """Tell of a failure in the way that is left."""
        path = self._asked.path
        if not self.status:
            self.send_own(error_answer(error, path))
        elif self.journal is not None:
            self._forward(error_event(error, path))
            self.outcome = asyncio.get_running_loop().create_future()
            self._finish()
        else:
            self._client.cut()

    def end_complete(self) -> None:
        """The replica died after its last event."""
        self.outcome = asyncio.get_running_loop().create_future()
        self._finish()
