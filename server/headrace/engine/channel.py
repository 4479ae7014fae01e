"""Frames over a local stream socket: four bytes of length (little endian), then the message.

The two ends are the client's event loop and the engine's loop between steps. A socket pair needs
no path, port or broker, keeps order, and its end tells each side that the other is gone.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator

LENGTH = struct.Struct("<I")
RECEIVE_BYTES = 1 << 18
BUFFER_BYTES = 4 << 20
"""Socket buffer asked of the kernel: thousands of steps of outputs."""


def frame(message: bytes) -> bytes:
    return LENGTH.pack(len(message)) + message


class FrameReader:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """All messages that `data` completes."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= LENGTH.size:
                begin = start + LENGTH.size
                end = begin + LENGTH.unpack_from(buffer, start)[0]
                if end > len(buffer):
                    return
                start = end
                yield bytes(buffer[begin:end])
        finally:
            del buffer[:start]


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """(the client's end, the engine's end)"""
    client, engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (client, engine):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return client, engine


class BlockingChannel:
    """The engine's end. Sends block when the client has stopped reading: whoever cannot take
    results gains nothing from more of them, and the client itself never blocks."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = FrameReader()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        self._socket.sendall(frame(message))

    def receive(self, timeout: float) -> list[bytes] | None:
        """The messages that are there, after waiting up to `timeout` seconds for the first.

        None once the client is gone.
        """
        readable, _, _ = select.select([self._socket], [], [], timeout)
        if not readable:
            return []
        data = self._socket.recv(RECEIVE_BYTES)
        return list(self._reader.feed(data)) if data else None

    def close(self) -> None:
        self._socket.close()
