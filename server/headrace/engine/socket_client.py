"""The part of an EngineClient that talks over a socket, whoever started the engine behind it.

Runs on the API process's event loop; imports no torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from headrace.engine.channel import FrameReader, frame
from headrace.engine.client import (
    EngineState,
    EngineStats,
    ModelInfo,
    QueueLimits,
    RequestRecord,
    Workload,
)
from headrace.engine.live_requests import LiveRequests, LiveStream
from headrace.engine.queue_board import QueueBoard
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
    Spelling,
    StepDone,
    Submit,
    ToEngine,
)
from headrace.errors import ConfigError, EngineError, HeadraceError, UnavailableError
from headrace.sampling_params import GenerateRequest


class SocketEngineClient:
    """Implements client.EngineClient but for `start` and `close`: requests, replays, news."""

    def __init__(
        self,
        limits: QueueLimits,
        *,
        on_record: Callable[[RequestRecord], None],
        on_stats: Callable[[EngineStats], None] = lambda stats: None,
        on_progress: Callable[[int, int], None] = lambda read, total: None,
        board: QueueBoard | None = None,
    ) -> None:
        self.state = EngineState.LOADING
        self.info: ModelInfo | None = None
        self.stats = EngineStats()
        self.restarts = 0
        self.tokenizer_json = ""
        """How tokens are spelled: what requests with grammars need. Set it before they come."""
        self._on_stats = on_stats
        self._on_progress = on_progress
        self._live = LiveRequests(
            limits,
            on_abort=lambda request_id: self._send(Abort(request_id)),
            on_end=on_record,
            board=board,
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._transport: asyncio.WriteTransport | None = None
        self._ready: asyncio.Future[ModelInfo] | None = None
        self._reset_reply: asyncio.Future[bool] | None = None
        self._last_seen = time.monotonic()
        self._closing = False
        self._told_spelling = False

    # --- EngineClient -----------------------------------------------------------------------

    @property
    def workload(self) -> Workload:
        return self._live.queue.workload

    @property
    def last_seen_age(self) -> float:
        return time.monotonic() - self._last_seen

    async def start(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

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

    @property
    def num_live(self) -> int:
        return len(self._live)

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
        self._live.queue.speed.observe(self.stats, stats)
        self.stats = stats
        self._on_stats(stats)

    def _disconnected(self) -> None:
        """The engine of this connection answers nothing any more."""
        self._transport = None
        if self._reset_reply is not None and not self._reset_reply.done():
            self._reset_reply.set_result(False)

    def _fail(self, error: HeadraceError) -> None:
        """There will be no engine any more."""
        self.state = EngineState.DEAD
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # whoever waits still gets it; nobody waiting is no bug
        self._live.fail_all(error)

    def _send(self, message: ToEngine) -> None:
        if self._transport is not None:
            self._transport.write(frame(self._encoder.encode(message)))


class Connection(asyncio.Protocol):
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
