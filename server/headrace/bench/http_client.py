"""A small HTTP/1.1 client for load generation: one connection per request, bytes stamped with their
time of arrival before anything is parsed. It knows server-sent events, not what is in them.

General clients cost tens to hundreds of microseconds per event, which a load generator would
report as the server's latency; here, parsing and recording one takes about three.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httptools
import msgspec

from headrace.errors import ConfigError

_QUESTION_SECONDS = 60.0

OnEvent = Callable[[float, bytes], None]
"""(time.perf_counter() seconds at which it arrived, the data of one server-sent event)"""


class Response(msgspec.Struct, frozen=True):
    status: int
    body: bytes
    """Empty for a stream of events, which went to `on_event`."""


class HttpClient:
    """Talks to one server. `base_url`: `http[s]://host[:port][/prefix]`, without `/v1`.

    Methods raise OSError when the server cannot be reached or the connection breaks, and
    ConnectionError (a kind of it) when the response is not HTTP or ends too early.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        url = _split_base_url(base_url)
        self.base_url = base_url.rstrip("/")
        self._host = url.hostname or ""
        self._secure = url.scheme == "https"
        self._port = url.port or (443 if self._secure else 80)
        self._prefix = url.path.rstrip("/")
        lines = {"Host": url.netloc.rpartition("@")[2], "Connection": "close", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    async def get(self, path: str) -> Response:
        """Raises TimeoutError (an OSError) after a minute: no question that is not generation
        takes longer."""
        async with asyncio.timeout(_QUESTION_SECONDS):
            return await self._exchange(self._encode("GET", path, b""), None)

    async def post(self, path: str, body: bytes, on_event: OnEvent | None = None) -> Response:
        """Send `body` (JSON). With `on_event`, the events of a 200 response go there as they come;
        it returns at the end of the response either way."""
        return await self._exchange(self._encode("POST", path, body), on_event)

    async def get_json(self, path: str) -> Any:
        """The decoded body, or None when the server does not answer 200 with JSON."""
        return _decoded(await self.get(path))

    async def post_json(self, path: str, content: Any) -> Any:
        """Like `get_json`."""
        return _decoded(await self.post(path, msgspec.json.encode(content)))

    def _encode(self, method: str, path: str, body: bytes) -> bytes:
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
        if method == "POST":
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode("latin-1") + b"\r\n" + body

    async def _exchange(self, request: bytes, on_event: OnEvent | None) -> Response:
        loop = asyncio.get_running_loop()
        exchange = _Exchange(loop.create_future(), on_event)
        transport, _ = await loop.create_connection(
            lambda: exchange, self._host, self._port, ssl=self._secure or None
        )
        try:
            transport.write(request)
            return await exchange.response
        finally:
            transport.close()


class _Exchange(asyncio.Protocol):
    """The response on one connection. `on_*` are httptools' callbacks."""

    def __init__(self, response: asyncio.Future[Response], on_event: OnEvent | None) -> None:
        self.response = response
        self._on_event = on_event
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._ends_with_connection = True
        self._body = bytearray()
        self._arrived = 0.0

    def data_received(self, data: bytes) -> None:
        self._arrived = time.perf_counter()
        if self.response.done():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error.__context__ or ConnectionError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._status and self._ends_with_connection and exc is None:
            self.on_message_complete()
        else:
            self._fail(exc or ConnectionError("the connection broke before the response ended"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._body += data
        if self._on_event is None or self._status != 200:
            return
        *lines, rest = self._body.split(b"\n")
        self._body = rest
        for line in lines:
            # Each data line is an event: OpenAI's are JSON on one line. Lines that start with a
            # colon are comments, sent to keep the connection alive.
            if line.startswith(b"data:"):
                self._on_event(self._arrived, bytes(line[5:].strip()))

    def on_message_complete(self) -> None:
        if not self.response.done():
            self.response.set_result(Response(self._status, bytes(self._body)))

    def _fail(self, error: BaseException) -> None:
        if not self.response.done():
            self.response.set_exception(error)


def _split_base_url(base_url: str) -> SplitResult:
    try:
        url = urlsplit(base_url)
        port = url.port  # raises for a port that is no number
    except ValueError as error:
        raise ConfigError(f"--base-url {base_url!r}: {error}.") from error
    if url.scheme not in ("http", "https") or not url.hostname or port == 0:
        raise ConfigError(f"--base-url must look like http://HOST:PORT, got {base_url!r}.")
    return url


def _decoded(response: Response) -> Any:
    if response.status != 200:
        return None
    try:
        return msgspec.json.decode(response.body)
    except msgspec.DecodeError:
        return None
