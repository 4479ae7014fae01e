"""An API process that shares an engine and a port with others: HTTP, tokenizer, templates.

Started by `supervisor`. What it is to do is the first line of standard input, which then stays open
as a lifeline: when it ends, the parent is gone, and this process goes with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from pathlib import Path
from typing import NoReturn

import msgspec
import uvloop

from headrace.api_processes.control import (
    Drain,
    Drained,
    EngineLost,
    EngineRestarts,
    Link,
    MetricsText,
    ModelFound,
    Ping,
    Pong,
    Scrape,
    Started,
    StartFailed,
    Startup,
    Stop,
    ToApiProcess,
)
from headrace.api_processes.shared_folder import SharedFolder
from headrace.engine.attached_client import AttachedEngineClient
from headrace.errors import EngineError, HeadraceError, UnavailableError
from headrace.hosting.model_host import Sharing
from headrace.listening import listen
from headrace.observability.logging import configure_logging
from headrace.serve import Service, answering

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 0.2


class Worker:
    """Serves until told to stop."""

    def __init__(self, startup: Startup) -> None:
        self._startup = startup
        self._link = Link(ToApiProcess, self._handle)
        loop = asyncio.get_running_loop()
        self._stop: asyncio.Future[None] = loop.create_future()
        self._path: asyncio.Future[Path] = loop.create_future()
        self._scrapes: deque[asyncio.Future[bytes]] = deque()
        self._draining: asyncio.Task[None] | None = None
        folder = SharedFolder(Path(startup.folder), startup.options.api_processes)
        sharing = Sharing(folder.engine_path, folder.board(startup.index), self._find_model)
        self._service = Service(startup.config, startup.options, sharing=sharing)
        self._service.app.state.services.scrape = self._scrape

    async def run(self) -> None:
        end = socket.socket(fileno=self._startup.socket_fd)
        await asyncio.get_running_loop().create_connection(lambda: self._link, sock=end)
        tasks = [asyncio.create_task(work) for work in (self._start(), self._flush_metrics())]
        if self._startup.replaces:
            await asyncio.wait([tasks[0], self._stop], return_when=asyncio.FIRST_COMPLETED)
        listener = listen(self._startup.options.host, self._startup.port, shared=True)
        async with answering(self._service, listener):
            await self._stop
            for task in tasks:
                task.cancel()

    async def _start(self) -> None:
        try:
            await self._service.start()
        except HeadraceError as error:
            user_error = not isinstance(error, EngineError | UnavailableError)
            self._link.send(StartFailed(error.message, user_error))
        except Exception as error:
            logger.exception("A bug kept this API process from starting")
            self._link.send(StartFailed(f"{type(error).__name__}: {error}", user_error=False))
        else:
            digest = self._service.model.digest
            self._link.send(Started(digest, self._service.facts().text_formats))

    async def _flush_metrics(self) -> None:
        """What is delivered of long streams shows in scrapes, and outlives this process."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self._service.metrics.flush()

    async def _find_model(self) -> Path:
        return await self._path

    def _handle(self, message: ToApiProcess) -> None:
        client = self._service.client
        assert isinstance(client, AttachedEngineClient)
        match message:
            case ModelFound(path=path):
                if not self._path.done():
                    self._path.set_result(Path(path))
            case EngineRestarts(count=count):
                client.restarts = count
            case EngineLost():
                client.lost(EngineError(message.message))
            case Ping():
                self._link.send(Pong())
            case Drain():
                self._draining = asyncio.create_task(self._drain())
            case Stop():
                if not self._stop.done():
                    self._stop.set_result(None)
            case MetricsText(text=text):
                waiting = self._scrapes.popleft()
                if not waiting.done():
                    waiting.set_result(text)

    async def _drain(self) -> None:
        self._service.drain()
        await self._service.drained(float("inf"))  # the parent knows until when
        self._link.send(Drained())

    async def _scrape(self) -> bytes:
        """The metrics of all processes: the parent puts them together."""
        text: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._scrapes.append(text)
        self._link.send(Scrape())
        return await text


def _die_with_parent() -> None:
    with contextlib.suppress(OSError):
        sys.stdin.buffer.read()
    os._exit(1)


async def _run(startup: Startup) -> None:
    await Worker(startup).run()


def main() -> NoReturn:
    startup = msgspec.json.decode(sys.stdin.buffer.readline(), type=Startup)
    threading.Thread(target=_die_with_parent, name="lifeline", daemon=True).start()
    # Signals of a terminal reach every process of the group; the parent decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging(startup.options.log_level, startup.options.log_format)
    status = 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(startup))
    except Exception:
        logger.exception("A bug ended this API process")
        status = 1
    logging.shutdown()
    os._exit(status)  # the lifeline's thread is not worth waiting for


if __name__ == "__main__":
    main()
