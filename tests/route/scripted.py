"""Replicas whose answers are known, on real sockets, and a door in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from headrace.listening import listen
from headrace.route.config import parse_config
from headrace.route.door import Door

PATIENCE = 20.0
TEXT = "The water of a headrace turns the wheel, and the wheel the stone."


@dataclass
class Request:
    """As a replica got it."""

    head: bytes
    body: bytes

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    def header(self, name: str) -> str:
        found = re.search(rf"(?im)^{name}: *(.*?)\r?$", self.head.decode("latin-1"))
        return found[1] if found else ""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Handler = Callable[["Replica", Request, asyncio.StreamWriter], Any]


async def generate(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
    """Answers chat with TEXT, a character a token, as seam B says. May die where it is told to."""
    if request.path != "/v1/chat/completions":
        await reply(writer, 404, {"error": {"message": "nothing here", "code": "not_found"}})
        return
    if not request.json.get("stream"):
        if replica.dies_after == 0:
            replica.kill()
            return
        await reply(writer, 200, {"id": "c-1", "choices": [{"message": {"content": TEXT}}]})
        return
    data = b"".join(stream_of(request))
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    head += b"headrace-journal: 1\r\n" if request.header("headrace-journal") == "1" else b""
    writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
    if replica.dies_after is not None and replica.dies_after < len(data):
        data = data[: replica.dies_after]
        for start in range(0, len(data), replica.piece):
            writer.write(chunk(data[start : start + replica.piece]))
        await writer.drain()
        replica.kill()
        return
    for start in range(0, len(data), replica.piece):
        writer.write(chunk(data[start : start + replica.piece]))
        await writer.drain()
        if replica.pause is not None:
            await asyncio.sleep(replica.pause)
    writer.write(b"0\r\n\r\n")


def stream_of(request: Request) -> list[bytes]:
    """All events of an answer, from where `headrace_resume` says."""
    journaled = request.header("headrace-journal") == "1"
    resume = request.json.get("headrace_resume", {"head": None, "c": [], "events": 0})
    assert not resume["c"] or resume["head"] == {"id": "c-7"}
    done = resume["c"][0][1] if resume["c"] else []
    events: list[bytes] = []
    for number, (line, content) in enumerate(_plain_events()):
        if number < resume["events"]:
            continue
        mark = (
            f": headrace {json.dumps(line)}\n".encode() if line is not None and journaled else b""
        )
        events.append(mark + f"data: {content}\n\n".encode())
    told = [ord(letter) for letter in TEXT[: len(done)]]
    assert done == told, "the ids are those of the events that were forwarded"
    return events


def _plain_events() -> list[tuple[Any, str]]:
    def delta(content: Any, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": content, "finish_reason": finish}
        return json.dumps({"id": "c-7", "choices": [choice]})

    events: list[tuple[Any, str]] = [
        ({"c": [], "head": {"id": "c-7"}}, delta({"role": "assistant"}))
    ]
    for number, letter in enumerate(TEXT):
        last = "stop" if number == len(TEXT) - 1 else None
        events.append(({"c": [[0, [ord(letter)], last]]}, delta({"content": letter}, last)))
    return [
        *events,
        (None, json.dumps({"usage": {"completion_tokens": len(TEXT)}})),
        (None, "[DONE]"),
    ]


WHOLE = b"".join(f"data: {content}\n\n".encode() for _, content in _plain_events())
"""What a client sees of an undisturbed stream."""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def reply(writer: asyncio.StreamWriter, status: int, content: Any, more: str = "") -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} Some\r\ncontent-type: application/json\r\n{more}"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()


@dataclass
class Replica:
    """A server that answers what its handler says. Can be killed and started again."""

    handler: Handler = generate
    names: tuple[str, ...] = ("llama",)
    dies_after: int | None = None
    """Bytes of a stream, after which all its connections break."""
    piece: int = 1 << 20
    """Bytes of a chunk."""
    pause: float | None = None
    port: int = 0
    ready: bool = True
    digest: str | None = "d"
    requests: list[Request] = field(default_factory=list)
    gone: int = 0
    """Clients that left before the end."""
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        while self._server is None:
            with contextlib.suppress(OSError):  # the one that was killed is still closing
                self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            await asyncio.sleep(0)
        self.port = self._server.sockets[0].getsockname()[1]

    def kill(self) -> None:
        """As kill -9 does: no more connections, those there are break."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request = Request(head, b"")
                if length := request.header("content-length"):
                    request.body = await reader.readexactly(int(length))
                elif request.header("transfer-encoding"):
                    request.body = await _dechunked(reader)
                await self._answer(request, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        if request.path == "/load":
            load = {"version": 1, "ready": self.ready, "running": 0, "digest": self.digest}
            await reply(writer, 200, load)
        elif request.path == "/v1/models":
            await reply(
                writer, 200, {"data": [{"id": name, "digest": self.digest} for name in self.names]}
            )
        else:
            self.requests.append(request)
            try:
                await self.handler(self, request, writer)
            except ConnectionError:
                self.gone += 1
                raise


async def _dechunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return body


@contextlib.asynccontextmanager
async def door_before(*replicas: Replica, **more: Any) -> AsyncIterator[tuple[Door, int]]:
    """A door in front of replicas of the model "llama", and its port. `more`: of its file."""
    for replica in replicas:
        await replica.start()
    content = {"models": {"llama": {"replicas": [it.url for it in replicas]}}, **more}
    door = Door(parse_config(content, origin="test"))
    listener = listen("127.0.0.1", 0)
    await door.start(listener)
    try:
        await door.fleet.settle(PATIENCE)
        yield door, listener.getsockname()[1]
    finally:
        await door.close()
        for replica in replicas:
            replica.kill()


def prefer(door: Door, first: Replica) -> None:
    """Requests go there, but where the door has excluded it."""

    def pick(application: str, request: object, excluded: Collection[Any] = ()) -> Any:
        usable = [it for it in door.fleet.usable(application) if it not in excluded]
        return min(usable, key=lambda it: it.url != first.url, default=None)

    door.fleet.pick = pick  # type: ignore[method-assign]


@dataclass
class Got:
    """An answer, as bytes and as what they mean."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def post(content: Any, path: str = "/v1/chat/completions", more: str = "") -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def get(path: str, more: str = "", method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\n{more}\r\n".encode()


async def read_answer(reader: asyncio.StreamReader, *, no_body: bool = False) -> Got:
    async with asyncio.timeout(PATIENCE):
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        if no_body or status == 204:
            body = b""
        elif "transfer-encoding" in headers:
            body = await _dechunked(reader)
        elif "content-length" in headers:
            body = await reader.readexactly(int(headers["content-length"]))
        else:
            body = await reader.read()
    return Got(status, headers, body)


async def ask(port: int, data: bytes) -> Got:
    """One request over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await read_answer(reader, no_body=data.startswith(b"HEAD"))
    finally:
        writer.close()
