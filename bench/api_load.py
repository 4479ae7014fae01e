"""Load on one API process, and what it costs it: a closed loop over keep-alive connections.

Reading is a few system calls an event: what the client spends is not the server's. Only the number
of events is looked at.
"""

from __future__ import annotations

import selectors
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

EVENT = b"data: {"
END_OF_CHUNKS = b"\r\n0\r\n\r\n"
END_OF_EVENTS = b"data: [DONE]\n\n" + END_OF_CHUNKS
PATIENCE = 120.0


class LoadError(Exception):
    """The server answered with something else than what was asked for."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, encoded, and what must come back."""

    data: bytes
    tokens: int
    streamed: bool

    @classmethod
    def of(cls, path: str, body: bytes, tokens: int, *, streamed: bool, headers: str = "") -> Ask:
        """`headers`: further lines, each with its end."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"{headers}Content-Length: {len(body)}\r\n\r\n"
        )
        return cls(head.encode() + body, tokens, streamed)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one load. Times in seconds."""

    requests: int
    tokens: int
    cpu: float
    """Of all threads of the server's process, user and system."""
    wall: float
    ttft: float = 0.0
    """Median over the streams: from the request to its first event."""


class _Connection:
    """One request after another. `feed` says when an answer is complete."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._begin = b""
        self._end = b""
        self._events = 0
        self._size: int | None = None
        self._ask: Ask | None = None
        self._sent = 0.0
        self.ttfts: list[float] = []

    def send(self, ask: Ask) -> None:
        self._begin, self._end, self._events, self._size, self._ask = b"", b"", 0, None, ask
        self._sent = time.perf_counter()
        self.socket.sendall(ask.data)

    def feed(self, data: bytes) -> Ask | None:
        """The request whose answer is complete with `data`. Raises LoadError."""
        ask = self._ask
        assert ask is not None
        if not self._begin.startswith(b"HTTP/1.1 200") and len(self._begin) < 12:
            self._begin += data[:600]
            if not self._begin.startswith(b"HTTP/1.1 200"):
                raise LoadError(self._begin.decode(errors="replace"))
        if not ask.streamed:
            return ask if self._has_all(data) else None
        # An event may be cut anywhere: what could be the beginning of its mark is counted later.
        seen = self._end + data
        if self._sent and EVENT in seen:
            self.ttfts.append(time.perf_counter() - self._sent)
            self._sent = 0.0
        self._events += seen.count(EVENT) - self._end.count(EVENT)
        self._end = seen[-len(END_OF_EVENTS) :]
        if not seen.endswith(END_OF_CHUNKS):
            return None
        if self._events != ask.tokens:
            raise LoadError(f"{ask.tokens} tokens were asked for, {self._events} events came")
        return ask

    def _has_all(self, data: bytes) -> bool:
        if self._size is None:
            head, _, body = data.partition(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            length = next(line for line in lines if line.startswith(b"content-length:"))
            self._size = int(length.partition(b":")[2])
            data = body
        self._size -= len(data)
        return self._size == 0


def cpu_seconds(pid: int) -> float:
    """CPU time of another process, all its threads, in nanosecond steps: the clock of
    clock_getcpuclockid(3), which on Linux is this number. It is what getrusage reports, exactly."""
    return time.clock_gettime(~pid << 3 | 2)


def run(url: str, pid: int, asks: Sequence[Ask], connections: int, pause: float = 0.0) -> Cost:
    """Send all of `asks`, each connection the next one as soon as its answer is complete.

    pause: seconds between two looks at the sockets. With many streams the client then reads several
    events of each at once, and does not slow the load down; the server writes them all the same.
    """
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 80)
    waiting = list(reversed(asks))
    with selectors.DefaultSelector() as selector:
        open_ones = [_Connection(address) for _ in range(min(connections, len(asks)))]
        for connection in open_ones:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        time.sleep(0.05)  # the server accepts them
        cpu, began = cpu_seconds(pid), time.perf_counter()
        for connection in open_ones:
            connection.send(waiting.pop())
        left = len(asks)
        try:
            while left:
                time.sleep(pause)
                ready = selector.select(PATIENCE)
                if not ready:
                    raise LoadError(f"nothing came for {PATIENCE:.0f} s")
                for key, _ in ready:
                    connection = key.data
                    data = connection.socket.recv(1 << 18)
                    if not data:
                        raise LoadError("the server closed a connection")
                    if connection.feed(data) is not None:
                        left -= 1
                        if waiting:
                            connection.send(waiting.pop())
                        else:  # idle, the server would close it
                            selector.unregister(connection.socket)
            wall = time.perf_counter() - began
            time.sleep(0.02)  # the requests' last words
            spent = cpu_seconds(pid) - cpu
        finally:
            for connection in open_ones:
                connection.socket.close()
    ttfts = [seconds for connection in open_ones for seconds in connection.ttfts]
    ttft = statistics.median(ttfts) if ttfts else 0.0
    return Cost(len(asks), sum(ask.tokens for ask in asks), spent, wall, ttft)
