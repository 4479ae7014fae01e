"""A connection of uvicorn's with limits on the head of a request, which it has none of.

A head that never ends would hold memory and a socket: that is all which a slow or hostile client
needs. Bodies have their limits where they are read.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 2**16
"""Of the request line and the headers together, beyond what arrives in one piece."""
HEAD_SECONDS = 30.0
"""From the connection, or from the first byte of a later request, to the end of the headers."""


class HttpConnection(HttpToolsProtocol):
    _awaits_head = True
    """From the first byte on, and before the first request."""
    _head_size = 0
    _too_slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._awaits_head or self.transport.is_closing():
            return
        self._head_size += len(data)
        if self._head_size > HEAD_BYTES:
            self._refuse("431 Request Header Fields Too Large", f"more than {HEAD_BYTES} bytes")
        elif self._too_slow is None:
            self._start_clock()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._awaits_head = True
        self._head_size = 0

    def on_headers_complete(self) -> None:
        self._awaits_head = False
        self._stop_clock()
        super().on_headers_complete()

    def _start_clock(self) -> None:
        self._too_slow = self.loop.call_later(
            HEAD_SECONDS, self._refuse, "408 Request Timeout", f"{HEAD_SECONDS:g} s without its end"
        )

    def _stop_clock(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()
            self._too_slow = None

    def _refuse(self, status: str, reason: str) -> None:
        self._stop_clock()
        if self.transport.is_closing():
            return
        busy = self.cycle is not None and not self.cycle.response_complete
        if not busy:  # else it would be read as a part of the answer before
            text = f"The head of the request: {reason}."
            head = f"HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\n"
            head += f"content-length: {len(text)}\r\nconnection: close\r\n\r\n"
            self.transport.write((head + text).encode())
        self.transport.close()
