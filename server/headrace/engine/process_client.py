"""EngineClient over a socket: starts the engine process, restarts it when it dies, replays.

Runs on the API process's event loop; imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import msgspec

from headrace.config import EngineConfig, engine_environment
from headrace.engine.channel import FrameReader, frame, socket_pair
from headrace.engine.client import (
    EngineState,
    EngineStats,
    ModelInfo,
    QueueLimits,
    RequestRecord,
)
from headrace.engine.live_requests import LiveRequests, LiveStream
from headrace.engine.process import Startup
from headrace.engine.wire import (
    WIRE_VERSION,
    Abort,
    FromEngine,
    Heartbeat,
    Hello,
    LoadFailed,
    LoadProgress,
    PrefixCacheReset,
    Ready,
    ResetPrefixCache,
    Shutdown,
    Spelling,
    StepDone,
    Submit,
    ToEngine,
)
from headrace.errors import ConfigError, EngineError, HeadraceError, UnavailableError
from headrace.sampling_params import GenerateRequest

logger = logging.getLogger(__name__)

MAX_RESTARTS, RESTART_WINDOW = 3, 600.0
"""More deaths than this within that many seconds, and the client gives up."""
CLOSE_TIMEOUT = 5.0  # seconds an engine gets to end by itself


class ProcessEngineClient:
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
    ) -> None:
        self.state = EngineState.LOADING
        self.info: ModelInfo | None = None
        self.stats = EngineStats()
        self.restarts = 0
        self.config = config
        """What engines are started with; `model` must be a local path by then."""
        self.tokenizer_json = ""
        """How tokens are spelled: what requests with grammars need. Set it before they come."""
        self._step_timeout = step_timeout
        self._log_level = log_level
        self._log_format = log_format
        self._on_stats = on_stats
        self._on_progress = on_progress
        self._on_dead = on_dead
        self._live = LiveRequests(
            limits,
            on_abort=lambda request_id: self._send(Abort(request_id)),
            on_end=on_record,
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[ModelInfo] | None = None
        self._reset_reply: asyncio.Future[bool] | None = None
        self._deaths: deque[float] = deque()
        self._last_seen = time.monotonic()
        self._closing = False
        self._told_spelling = False

    # --- EngineClient -----------------------------------------------------------------------

    @property
    def last_seen_age(self) -> float:
        return time.monotonic() - self._last_seen

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        self._ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise_or_give_up(), name="engine-client")

    async def wait_ready(self) -> ModelInfo:
        assert self._ready is not None, "start() comes first"
        return await asyncio.shield(self._ready)

    def submit(self, request: GenerateRequest) -> LiveStream:
        if self.info is None or self.state is EngineState.LOADING:
            raise UnavailableError("The model is still loading. Retry in a few seconds.")
        if self.state is EngineState.DEAD or self._closing:
            raise UnavailableError("The engine is gone; this server is shutting down.")
        handle, stream = self._live.admit(request, self.info)
        if self.state is EngineState.READY:
            self._submit(stream.request, handle)
        # else: it goes out with the replays, once the engine is back
        return stream

    async def reset_prefix_cache(self) -> bool:
        if self.state is not EngineState.READY:
            return False
        if self._reset_reply is None or self._reset_reply.done():
            self._reset_reply = asyncio.get_running_loop().create_future()
            self._send(ResetPrefixCache())
        return await asyncio.shield(self._reset_reply)

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

    @property
    def num_live(self) -> int:
        return len(self._live)

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
        connection = _Connection(self._handle, loop.create_future())
        self._transport, _ = await loop.create_connection(lambda: connection, sock=ours)
        try:
            while not connection.ended.done():
                await asyncio.wait([connection.ended], timeout=1.0)
                if self.state is EngineState.READY and self.last_seen_age > self._step_timeout:
                    logger.error("No step has ended for %.0f s: killing it", self.last_seen_age)
                    process.kill()
        finally:
            self._transport.close()
            self._transport = None
            assert process.stdin is not None
            process.stdin.close()  # the engine's lifeline, should it still live
        status = await asyncio.to_thread(process.wait)
        failure = connection.ended.result()
        if failure is None and not self._closing:
            logger.error("The engine process ended with status %d", status)
        return failure

    def _spawn(self, socket_fd: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", *self.engine_program],
            stdin=subprocess.PIPE,
            bufsize=0,  # nothing is left to flush, and to fail, when it is closed
            pass_fds=[socket_fd],
            env=engine_environment(),
        )
        startup = Startup(socket_fd, self.config, self._log_level, self._log_format)
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
        self.state = EngineState.DEAD
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # whoever waits still gets it; nobody waiting is no bug
        else:
            logger.critical("%s", error.message)
        self._live.fail_all(error)
        self._on_dead(error)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    # --- messages ---------------------------------------------------------------------------

    def _handle(self, data: bytes) -> HeadraceError | None:
        """File one message. An error if the engine said that it cannot be started."""
        self._last_seen = time.monotonic()
        message = self._decoder.decode(data)
        match message:
            case StepDone(outputs=outputs):
                self._live.deliver(outputs)
                if outputs.stats is not None:
                    self._observe(outputs.stats)
            case Heartbeat():
                self._observe(message.stats)
            case PrefixCacheReset():
                if self._reset_reply is not None and not self._reset_reply.done():
                    self._reset_reply.set_result(message.done)
            case LoadProgress():
                self._on_progress(message.bytes_read, message.bytes_total)
            case Ready():
                self._become_ready(message.info)
            case Hello() if message.wire_version != WIRE_VERSION:
                return EngineError(
                    f"The engine speaks wire version {message.wire_version}, this process "
                    f"{WIRE_VERSION}: two versions of Headrace are mixed in this environment."
                )
            case LoadFailed():
                if message.user_error:
                    return ConfigError(message.message)
                if self.info is None:
                    return EngineError(message.message)
        return None

    def _become_ready(self, info: ModelInfo) -> None:
        self.info = info
        self.state = EngineState.READY
        self._told_spelling = False
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(info)
        for handle, request in self._live.replays():
            self._submit(request, handle)

    def _submit(self, request: GenerateRequest, handle: int) -> None:
        if request.grammar and not self._told_spelling:
            self._told_spelling = True
            self._send(Spelling(self.tokenizer_json))
        self._send(Submit(request, handle))

    def _observe(self, stats: EngineStats) -> None:
        if stats.steps > self.stats.steps and stats.step_tokens > 0:
            elapsed = stats.last_step_time - self.stats.last_step_time
            if 0 < elapsed < 10:
                self._live.observe_prefill_rate(stats.step_tokens / elapsed)
        self.stats = stats
        self._on_stats(stats)

    def _send(self, message: ToEngine) -> None:
        if self._transport is not None:
            self._transport.write(frame(self._encoder.encode(message)))


class _Connection(asyncio.Protocol):
    """Feeds messages to `handle`; `ended` resolves, with the last error it gave, at the end."""

    def __init__(
        self,
        handle: Callable[[bytes], HeadraceError | None],
        ended: asyncio.Future[HeadraceError | None],
    ) -> None:
        self.ended = ended
        self._handle = handle
        self._reader = FrameReader()
        self._error: HeadraceError | None = None

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._error = self._handle(message) or self._error

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(self._error)
