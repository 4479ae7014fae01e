"""The door's end of a client's connection: requests in, answers out, one at a time, in order."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import Any, Protocol, cast

import httptools

from headrace.errors import HeadraceError, InvalidRequestError, RequestTooLargeError
from headrace.http_connection import HEAD_BYTES, HEAD_SECONDS
from headrace.route.asked import Asked, Kind
from headrace.route.http_text import CONTINUE, OwnAnswer, error_answer, header, status_line
from headrace.route.relay import Answer

BODY_SECONDS = 300.0
"""For a whole body that is not an upload, as at a replica."""
STALL_SECONDS = 300.0
"""A client that reads nothing for so long is cut off."""
IDLE_SECONDS = 75.0
"""Between two requests. Longer than proxies keep connections to what is behind them."""
MAX_PENDING = 1 << 18
"""Bytes of an upload that wait for a slow replica."""


class Serves(Protocol):
    """What a connection needs of the door."""

    max_body_bytes: int
    draining: bool

    async def serve(self, asked: Asked, answer: Answer, upload: BodyStream | None) -> None:
        """Answer one request. Raises HeadraceError for what was not answered."""

    def opened(self, connection: ClientConnection) -> None: ...

    def closed(self, connection: ClientConnection) -> None: ...


class BodyStream:
    """An upload that is relayed as it comes."""

    def __init__(self, transport: asyncio.Transport, length: int | None) -> None:
        self.length = length
        self._transport = transport
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self.ended = False
        self._paused = False
        self._news = asyncio.Event()

    def put(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)
        self._news.set()
        if self._size > MAX_PENDING and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def end(self) -> None:
        self.ended = True
        self._news.set()

    async def piece(self) -> bytes:
        """What has come; empty at the end."""
        while not self._pieces and not self.ended:
            self._news.clear()
            await self._news.wait()
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()
        return data


class ClientConnection(asyncio.Protocol):
    def __init__(self, door: Serves) -> None:
        self._door = door
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[tuple[Asked, BodyStream | HeadraceError | None]] = deque()
        self._answer: Answer | None = None
        self._task: asyncio.Task[None] | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._reading_paused = False
        self._closing = False
        """After the answers that are due, nothing more."""
        self._in_head = False
        self._head_size = 0
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._asked: Asked | None = None
        self._body = bytearray()
        self._stream: BodyStream | None = None
        self._too_large = False

    # --- asyncio's ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of another class
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._door.opened(self)
        self._start_clock(HEAD_SECONDS, self._head_too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.closed(self)
        self._stop_clock()
        self._stop_stall()
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
        if self._stream is not None:
            self._stream.end()

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        self._head_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:  # to h2c: we go on as we are
            self._parser = httptools.HttpRequestParser(self)
            if rest := data[upgrade.args[0] :]:
                self.data_received(rest)
            return
        except httptools.HttpParserError as error:
            self._refuse(400, f"The request is not HTTP: {error}.")
            return
        if self._in_head and self._head_size > HEAD_BYTES:
            self._refuse(431, f"The head of the request: more than {HEAD_BYTES} bytes.")
        elif self._in_head and self._clock is None:
            self._start_clock(HEAD_SECONDS, self._head_too_slow)

    def pause_writing(self) -> None:
        if self._answer is not None:
            self._answer.pause()
        self._stop_stall()
        self._stalled = self._loop.call_later(STALL_SECONDS, self.cut)

    def resume_writing(self) -> None:
        self._stop_stall()
        if self._answer is not None:
            self._answer.resume()

    # --- the parser's -------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._stop_clock()
        self._in_head = True
        self._head_size = 0
        self._url = b""
        self._headers = []
        self._body = bytearray()
        self._too_large = False
        self._asked = self._stream = None

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_clock()
        asked = Asked(self._parser.get_method(), self._url, self._headers)
        asked.http_1_0 = self._parser.get_http_version() == "1.0"
        asked.keep_alive = self._parser.should_keep_alive()
        self._asked = asked
        length = header(self._headers, b"content-length")
        has_body = length not in (b"", b"0") or header(self._headers, b"transfer-encoding") != b""
        if header(self._headers, b"expect").lower() == b"100-continue" and self._task is None:
            self._transport.write(CONTINUE)
        if not has_body:
            return
        kind = header(self._headers, b"content-type").partition(b";")[0].strip().lower()
        is_json = kind in (b"", b"application/json") or kind.endswith(b"+json")
        if is_json or asked.kind in (Kind.MODEL, Kind.OWN, Kind.NONE):
            self._too_large = length.isdigit() and int(length) > self._door.max_body_bytes
            self._start_clock(BODY_SECONDS, self._body_too_slow)
            if self._too_large:
                self._take(asked, self._too_large_error())
            return
        asked.is_upload = True
        self._stream = BodyStream(self._transport, int(length) if length.isdigit() else None)
        self._take(asked, self._stream)

    def on_body(self, data: bytes) -> None:
        if self._stream is not None:
            self._stream.put(data)
        elif self._too_large or self._asked is None:
            return
        elif len(self._body) + len(data) > self._door.max_body_bytes:
            self._too_large = True
            self._take(self._asked, self._too_large_error())
        else:
            self._body += data

    def on_message_complete(self) -> None:
        self._stop_clock()
        self._head_size = 0
        if self._stream is not None:
            self._stream.end()
        elif self._asked is not None and not self._too_large:
            self._asked.read_body(bytes(self._body))
            self._take(self._asked, None)
        self._body = bytearray()

    # --- one after the other ------------------------------------------------------------------

    def _take(self, asked: Asked, rest: BodyStream | HeadraceError | None) -> None:
        if self._closing or self._transport.is_closing():
            return
        if isinstance(rest, HeadraceError):
            asked.keep_alive = False  # its body is not read to the end
        self._closing = not asked.keep_alive
        self._waiting.append((asked, rest))
        if self._task is None:
            self._next()
        elif not self._reading_paused and self._stream is None:
            self._reading_paused = True  # who sends ahead waits
            self._transport.pause_reading()

    def _next(self) -> None:
        if not self._waiting or self._transport.is_closing():
            self._task = None
            return
        asked, rest = self._waiting.popleft()
        self._answer = answer = Answer(asked, self)
        self._task = self._loop.create_task(self._serve(asked, answer, rest))

    async def _serve(
        self, asked: Asked, answer: Answer, rest: BodyStream | HeadraceError | None
    ) -> None:
        try:
            if isinstance(rest, HeadraceError):
                answer.fail(rest)
            else:
                await self._door.serve(asked, answer, rest)
        finally:
            self._answer = self._task = None
        if self._reading_paused and not self._waiting and not self._transport.is_closing():
            self._reading_paused = False
            self._transport.resume_reading()
        self._next()

    # --- a Client -----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def end(self, *, keep_alive: bool) -> None:
        stream = self._stream
        unread = stream is not None and not stream.ended and self._answer is not None
        if not keep_alive or unread or (self._door.draining and not self._waiting):
            self._transport.close()
        elif not self._waiting and self._clock is None and not self._in_head:
            self._start_clock(IDLE_SECONDS, self._idle_too_long)

    def cut(self) -> None:
        self._transport.abort()

    @property
    def busy(self) -> bool:
        return self._task is not None or bool(self._waiting)

    def close_if_idle(self) -> None:
        if not self.busy:
            self._transport.close()

    # --- limits ---------------------------------------------------------------------------------

    def _start_clock(self, seconds: float, then: Any) -> None:
        self._stop_clock()
        self._clock = self._loop.call_later(seconds, then)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _stop_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _head_too_slow(self) -> None:
        self._refuse(408, f"The head of the request: {HEAD_SECONDS:g} s without its end.")

    def _body_too_slow(self) -> None:
        self._refuse(408, f"The body did not end within {BODY_SECONDS:g} s.")

    def _idle_too_long(self) -> None:
        if not self.busy:
            self._transport.close()

    def _too_large_error(self) -> HeadraceError:
        return RequestTooLargeError(
            f"The body is larger than {self._door.max_body_bytes} bytes; shorten it, or start the "
            "door with a larger max_body_bytes."
        )

    def _refuse(self, status: int, reason: str) -> None:
        """What cannot be read as a request ends the connection."""
        self._stop_clock()
        self._closing = True
        if self._transport.is_closing():
            return
        if not self.busy:  # else it would be read as a part of the answer before
            answer: OwnAnswer = error_answer(InvalidRequestError(reason), "")
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
            body = answer.body
            self._transport.write(status_line(status) + head % len(body) + b"\r\n" + body)
            self._transport.close()
        else:
            self._transport.pause_reading()
