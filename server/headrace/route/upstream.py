"""Connections to replicas: one request at a time each, kept alive between requests.

What comes back goes to a Receiver, piece by piece, in the callback that read it: no task wakes up
for a token.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any, Protocol, cast

import httptools

from headrace.route.http_text import Headers, header

CONNECT_SECONDS = 3.0
IDLE_SECONDS = 4.0
"""Connections that rested longer are not used again: uvicorn closes its end after 5 s."""
MAX_IDLE = 256
"""Of one replica."""
_NO_BODY = frozenset((204, 304))


class Receiver(Protocol):
    """Of one answer."""

    def on_head(self, status: int, headers: Headers, length: int | None) -> None:
        """`length`: of the body, where it is known beforehand."""

    def on_body(self, data: bytes) -> None: ...

    def on_pause(self) -> None:
        """All that was read has been given."""

    def on_end(self) -> None:
        """The answer is complete."""

    def on_lost(self) -> None:
        """The connection ended before the answer did."""

    def on_writable(self, writable: bool) -> None:
        """The replica reads the request's body, or is slow to."""


class Connection(asyncio.Protocol):
    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport
        self._receiver: Receiver | None = None
        self._is_head = False
        self.idle_since = 0.0
        self.used = False
        """Whether an answer came over it before."""
        self.single_use = False
        self._broken = False
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._status = 0
        self._until_end = False
        self._ended = False

    # --- for the request ----------------------------------------------------------------------

    def send(self, data: bytes, receiver: Receiver, *, is_head: bool = False) -> None:
        """A request's head, and its body or the beginning of it."""
        self._receiver, self._is_head = receiver, is_head
        self._transport.write(data)

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def abort(self) -> None:
        """Nobody wants the answer: the replica notices the end of the connection."""
        self._receiver = None
        self._transport.abort()

    def lose(self) -> None:
        """As if the replica had died."""
        self._broken = True
        self._transport.abort()

    @property
    def usable(self) -> bool:
        return not self._transport.is_closing()

    # --- asyncio's ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of another class
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A machine that is gone without a word is noticed within 12 s.
            for name, value in (("KEEPIDLE", 4), ("KEEPINTVL", 2), ("KEEPCNT", 4)):
                if option := getattr(socket, f"TCP_{name}", None):
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:  # nothing was asked, or nobody listens any more
            self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self._ended:
                self.lose()  # an answer that cannot be read
        if not self._ended:
            receiver.on_pause()
        elif self._receiver is receiver:
            self._finish(receiver)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        receiver, self._receiver = self._receiver, None
        self._pool.forget(self)
        if receiver is None:
            return
        if self._until_end and exc is None and not self._broken:
            receiver.on_end()
        else:
            receiver.on_lost()

    def pause_writing(self) -> None:
        if self._receiver is not None:
            self._receiver.on_writable(False)

    def resume_writing(self) -> None:
        if self._receiver is not None:
            self._receiver.on_writable(True)

    # --- the parser's -------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if self._ended:  # a second answer, that nobody asked for
            self.single_use = True
        if self._status < 200 or self._ended or self._receiver is None:
            return
        length = header(self._headers, b"content-length")
        chunked = header(self._headers, b"transfer-encoding")
        empty = self._is_head or self._status in _NO_BODY
        self._until_end = not (length or chunked or empty)
        known = 0 if empty else int(length) if length.isdigit() else None
        self._receiver.on_head(self._status, self._headers, known)
        if self._is_head:
            self._ended = True

    def on_body(self, data: bytes) -> None:
        if self._receiver is not None and not self._ended:
            self._receiver.on_body(data)

    def on_message_complete(self) -> None:
        if self._status < 200:  # 100 Continue, 103 Early Hints: the answer is still to come
            self._headers = []
        else:
            self._ended = True

    def _finish(self, receiver: Receiver) -> None:
        self._receiver = None
        reusable = not (self._is_head or self._until_end or self.single_use)
        reusable = reusable and self._parser.should_keep_alive()
        self._begin()
        if reusable and self.usable:
            self.used = True
            self._pool.give_back(self)
        else:
            self._transport.abort()
        receiver.on_end()


class ConnectionPool:
    """Connections to one address."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()

    async def connect(self, *, fresh: bool = False) -> Connection:
        """One that rests, or a new one (`fresh`: always). Raises OSError."""
        now = time.monotonic()
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.usable and now - connection.idle_since < IDLE_SECONDS:
                return connection
            connection.abort()
        loop = asyncio.get_running_loop()
        opening = loop.create_connection(lambda: Connection(self), *self._address)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, made = await opening
        except TimeoutError:
            raise OSError(f"no connection within {CONNECT_SECONDS:g} s") from None
        self._all.add(made)
        return made

    def give_back(self, connection: Connection) -> None:
        if len(self._idle) >= MAX_IDLE:
            connection.abort()
            return
        connection.idle_since = time.monotonic()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def lose_all(self) -> None:
        """The replica does not answer: what it works on is taken elsewhere."""
        for connection in list(self._all):
            connection.lose()

    def close_idle(self) -> None:
        while self._idle:
            self._idle.pop().abort()


class Fetched(asyncio.Future[tuple[int, Any, bytes]]):
    """A whole small answer: (status, headers, body). The Receiver of what the door asks itself."""

    def __init__(self) -> None:
        super().__init__()
        self._status, self._headers, self._body = 0, (), bytearray()

    def on_head(self, status: int, headers: Headers, length: int | None) -> None:
        self._status, self._headers = status, headers  # type: ignore[assignment]

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_pause(self) -> None:
        pass

    def on_end(self) -> None:
        if not self.done():
            self.set_result((self._status, self._headers, bytes(self._body)))

    def on_lost(self) -> None:
        if not self.done():
            self.set_exception(ConnectionError("the connection ended before the answer"))

    def on_writable(self, writable: bool) -> None:
        pass
