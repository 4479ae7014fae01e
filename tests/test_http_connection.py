"""Heads of requests that are too long, too slow, or none: each costs its own connection only."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn

from headrace import http_connection
from headrace.http_connection import HEAD_BYTES, HttpConnection


async def app(scope: dict[str, object], receive: object, send: object) -> None:
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"ok"})  # type: ignore[operator]


@pytest.fixture
async def port() -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=HttpConnection, log_level="critical", lifespan="off", ws="none"
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.005)
    yield listener.getsockname()[1]
    server.should_exit = server.force_exit = True
    await task


async def talk(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """All that the server answers until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(reader.read())
    try:
        async with asyncio.timeout(10):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
            return await answer
    except ConnectionError:  # it was closed while there was more to send
        return answer.result() if answer.done() and not answer.exception() else b""
    finally:
        answer.cancel()
        writer.close()


GET = b"GET / HTTP/1.1\r\nhost: x\r\n"
LAST = b"GET / HTTP/1.0\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "answers"),
    [
        ((GET + b"\r\n", LAST), 2),
        ((3 * (GET + b"\r\n") + LAST,), 4),
        ((b"GET / HT", b"TP/1.0\r\n", b"host: x\r\n", b"\r\n"), 1),
    ],
    ids=["one after the other", "pipelined", "in pieces"],
)
async def test_good_requests(port: int, pieces: tuple[bytes, ...], answers: int) -> None:
    answer = await talk(port, *pieces, pause=0.01)
    assert answer.count(b"HTTP/1.1 200 OK") == answers


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (GET, b"x-more: " + b"a" * 1000 + b"\r\n"),
        (GET + b"x-one: ", b"a" * 1000),
        (b"GET /", b"a" * 1000),
    ],
    ids=["headers", "one header", "path"],
)
async def test_heads_without_end(port: int, start: bytes, more: bytes) -> None:
    for before in (b"", GET + b"\r\n"):
        answer = await talk(port, before + start, *[more] * (2 * HEAD_BYTES // 1000), pause=0.001)
        if answer:  # what it sent may be lost with a connection that it resets
            assert b"HTTP/1.1 431 " in answer or b"HTTP/1.1 400 " in answer
        assert b" 200 OK" in await talk(port, LAST)


async def test_slow_heads(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEAD_SECONDS", 0.2)
    for pieces in ((), (b"GET ",), (GET,), (b"GET / HTTP/1.1\r\n", *[b"x: y\r\n"] * 20)):
        answer = await talk(port, *pieces, pause=0.05)
        assert answer.startswith(b"HTTP/1.1 408 ") or len(pieces) > 4
        assert b"200" not in answer
    answer = await talk(port, GET + b"\r\n" + b"GET /")  # a later request of a connection
    assert answer.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 408 " in answer


@pytest.mark.parametrize(
    "sent",
    [
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"GET \xff HTTP/1.1\r\n\r\n",
        b"INVENTED / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: " + b"9" * 30 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header: x\r\n\r\n",
    ],
)
async def test_what_is_no_request(port: int, sent: bytes) -> None:
    answer = await talk(port, sent)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"Traceback" not in answer
    assert b" 200 OK" in await talk(port, LAST)
