"""EngineClient over a socket: starts the engine process, restarts it when it dies, replays.

Runs on the API process's event loop; imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import msgspec

from headrace.config import EngineConfig, engine_environment
from headrace.engine.channel import socket_pair
from headrace.engine.client import (
    EngineState,
    EngineStats,
    QueueLimits,
    RequestRecord,
)
from headrace.engine.process import Startup
from headrace.engine.socket_client import Connection, SocketEngineClient
from headrace.engine.wire import Shutdown
from headrace.errors import EngineError, HeadraceError, UnavailableError

logger = logging.getLogger(__name__)

MAX_RESTARTS, RESTART_WINDOW = 3, 600.0
"""More deaths than this within that many seconds, and the client gives up."""
CLOSE_TIMEOUT = 5.0  # seconds an engine gets to end by itself


class ProcessEngineClient(SocketEngineClient):
    """Implements client.EngineClient with the engine in a process of its own."""

    engine_program: ClassVar[Sequence[str]] = ("-m", "headrace.engine.process")
    """Arguments of Python. A stand-in for the engine, which speaks wire.py, is started instead."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        limits: QueueLimits,
        step_timeout: float = 300.0,
        log_level: str = "info",
        log_format: Literal["text", "json"] = "text",
        on_record: Callable[[RequestRecord], None] = lambda record: None,
        on_stats: Callable[[EngineStats], None] = lambda stats: None,
        on_progress: Callable[[int, int], None] = lambda read, total: None,
        on_dead: Callable[[HeadraceError], None] = lambda error: None,
        on_restart: Callable[[], None] = lambda: None,
        listener: socket.socket | None = None,
    ) -> None:
        """`listener`: where other processes attach to the engine, to each that is started."""
        super().__init__(limits, on_record=on_record, on_stats=on_stats, on_progress=on_progress)
        self.config = config
        """What engines are started with; `model` must be a local path by then."""
        self._step_timeout = step_timeout
        self._log_level = log_level
        self._log_format = log_format
        self._listener = listener
        self._on_dead = on_dead
        self._on_restart = on_restart
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._deaths: deque[float] = deque()

    # --- EngineClient -----------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        self._ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise_or_give_up(), name="engine-client")

    async def close(self) -> None:
        """Ends live requests with an error and the engine with them."""
        self._closing = True
        self._live.fail_all(UnavailableError("The server is shutting down."))
        if self.state is EngineState.READY:
            self._send(Shutdown())
        else:
            self._kill()  # it listens to nobody while it loads
        if self._task is not None:
            _, pending = await asyncio.wait([self._task], timeout=CLOSE_TIMEOUT)
            if pending:
                self._kill()
                await self._task
        if self._ready is not None and not self._ready.done():
            self._ready.cancel()

    # --- the engine's lives -----------------------------------------------------------------

    async def _supervise_or_give_up(self) -> None:
        """Whatever goes wrong here, requests must not wait for an engine that never comes."""
        try:
            await self._supervise()
        except Exception as error:
            logger.exception("A bug ended the supervision of the engine")
            self._kill()
            self._give_up(EngineError(f"The engine cannot be supervised: {error}"))

    async def _supervise(self) -> None:
        """One engine after another, until closed or given up."""
        while True:
            failure = await self._one_life()
            if self._closing:
                return
            error = failure or self._count_death()
            if error is not None:
                self._give_up(error)
                return
            self.state = EngineState.RESTARTING if self.info else EngineState.LOADING
            self.restarts += 1
            self._on_restart()
            self._observe(EngineStats())  # nothing runs until the next one is ready
            logger.error(
                "The engine died; restarting it (%d requests will be replayed)", len(self._live)
            )

    async def _one_life(self) -> HeadraceError | None:
        """From spawn to death. An error if starting again cannot help."""
        ours, theirs = socket_pair()
        with theirs:
            self._process = process = self._spawn(theirs.fileno())
        self._last_seen = time.monotonic()
        loop = asyncio.get_running_loop()
        connection = Connection(self._handle, loop.create_future())
        self._transport, _ = await loop.create_connection(lambda: connection, sock=ours)
        try:
            while not connection.ended.done():
                await asyncio.wait([connection.ended], timeout=1.0)
                if self.state is EngineState.READY and self.last_seen_age > self._step_timeout:
                    logger.error("No step has ended for %.0f s: killing it", self.last_seen_age)
                    process.kill()
        finally:
            self._transport.close()
            self._disconnected()
            assert process.stdin is not None
            process.stdin.close()  # the engine's lifeline, should it still live
        status = await asyncio.to_thread(process.wait)
        failure = connection.ended.result()
        if failure is None and not self._closing:
            logger.error("The engine process ended with status %d", status)
        return failure

    def _spawn(self, socket_fd: int) -> subprocess.Popen[bytes]:
        listener_fd = None if self._listener is None else self._listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-P", *self.engine_program],
            stdin=subprocess.PIPE,
            bufsize=0,  # nothing is left to flush, and to fail, when it is closed
            pass_fds=[socket_fd, *([] if listener_fd is None else [listener_fd])],
            env=engine_environment(),
        )
        startup = Startup(socket_fd, self.config, self._log_level, self._log_format, listener_fd)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already; its exit tells
            process.stdin.write(msgspec.json.encode(startup) + b"\n")
        return process

    def _count_death(self) -> HeadraceError | None:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths and now - self._deaths[0] > RESTART_WINDOW:
            self._deaths.popleft()
        if len(self._deaths) <= MAX_RESTARTS:
            return None
        return EngineError(
            f"The engine died {len(self._deaths)} times within {RESTART_WINDOW:.0f} s; giving up."
        )

    def _give_up(self, error: HeadraceError) -> None:
        if self._ready is None or self._ready.done():
            logger.critical("%s", error.message)
        self._fail(error)
        self._on_dead(error)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
