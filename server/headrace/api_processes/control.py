"""What the parent and its API processes say to each other, and the socket pair they say it over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import msgspec

from headrace.config import EngineConfig, ServerOptions
from headrace.engine.channel import FrameReader, frame


class Startup(msgspec.Struct, frozen=True):
    """The first line of an API process's standard input, as JSON."""

    socket_fd: int
    index: int
    """Of this process, among `options.api_processes`."""
    folder: str
    """Of what the processes share."""
    port: int
    config: EngineConfig
    options: ServerOptions
    replaces: bool
    """Others answer already: this one is to listen once it can."""


class ModelFound(msgspec.Struct, frozen=True, tag="model_found"):
    path: str


class EngineRestarts(msgspec.Struct, frozen=True, tag="engine_restarts"):
    """How many there have been; sent after each, and to each new process."""

    count: int


class EngineLost(msgspec.Struct, frozen=True, tag="engine_lost"):
    """There will be no engine any more."""

    message: str


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Answered with a Pong by a process whose event loop runs."""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take no new requests, and say when none is left."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End now; requests that live fail."""


class MetricsText(msgspec.Struct, frozen=True, tag="metrics_text"):
    text: bytes


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The process answers requests."""

    digest: str
    """Of the model."""
    text_formats: str


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    message: str
    user_error: bool


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    pass


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    pass


class Scrape(msgspec.Struct, frozen=True, tag="scrape"):
    """Asks for a MetricsText; answers come in the order of the questions."""


ToApiProcess = ModelFound | EngineRestarts | EngineLost | Ping | Drain | Stop | MetricsText
FromApiProcess = Started | StartFailed | Pong | Drained | Scrape


class Link(asyncio.Protocol):
    """One end. `ended` resolves when the other one is gone."""

    def __init__(self, message_type: Any, handle: Callable[[Any], None]) -> None:
        """`handle` gets every message, of `message_type`, that the other end sends."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._handle = handle
        self._reader = FrameReader()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(message_type)
        self._transport: asyncio.WriteTransport | None = None

    def send(self, message: ToApiProcess | FromApiProcess) -> None:
        """Does nothing once the other end is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(self._encoder.encode(message)))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._handle(self._decoder.decode(message))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
