"""The engine process: reads requests from a socket between steps, sends each step's outputs back.

Started by `process_client`. Its configuration is the first line of standard input, which then
stays open as a lifeline: when it ends, the parent is gone, and the engine goes with it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Literal, NoReturn

import msgspec

from headrace.config import EngineConfig
from headrace.engine.channel import BlockingChannel
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
from headrace.errors import CheckpointError, ConfigError
from headrace.observability.logging import configure_logging

if TYPE_CHECKING:
    from headrace.engine.engine import AnyEngine

logger = logging.getLogger(__name__)

HEARTBEAT_PERIOD = 1.0  # seconds between signs of life while idle
PROGRESS_PERIOD = 0.1  # seconds between progress messages while loading


class Startup(msgspec.Struct, frozen=True):
    """The first line of standard input, as JSON."""

    socket_fd: int
    config: EngineConfig
    log_level: str
    log_format: Literal["text", "json"]


class EngineProcess:
    """Connects one Engine to one client."""

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._stop = False

    def run(self, config: EngineConfig) -> int:
        """Load, serve until told to stop; the exit status."""
        self._send(Hello(WIRE_VERSION, os.getpid()))
        try:
            engine = self._load(config)
        except (ConfigError, CheckpointError) as error:
            self._send(LoadFailed(error.message, user_error=True))
            return 2
        except Exception as error:
            logger.exception("The engine failed to load")
            self._send(LoadFailed(f"{type(error).__name__}: {error}", user_error=False))
            return 1
        gc.freeze()  # torch and the model stay: looking through them again costs 5% of the steps
        self._send(Heartbeat(engine.stats()))  # gauges are true from the first moment
        self._send(Ready(engine.info))
        while not self._stop:
            self._receive(engine, wait=not engine.has_work and not engine.idle())
            if engine.has_work:
                self._send(StepDone(engine.step()))
        return 0

    def _load(self, config: EngineConfig) -> AnyEngine:
        # torch takes seconds to import; the client has heard Hello by now.
        from headrace.engine.build import build_engine

        last = 0.0

        def progress(bytes_read: int, bytes_total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > PROGRESS_PERIOD or bytes_read == bytes_total:
                last = now
                self._send(LoadProgress(bytes_read, bytes_total))

        return build_engine(config, progress)

    def _receive(self, engine: AnyEngine, *, wait: bool) -> None:
        """Take in all messages there are; with `wait`, sleep until there is one."""
        messages = self._channel.receive(HEARTBEAT_PERIOD if wait else 0.0)
        if messages is None:
            self._stop = True
            return
        for data in messages:
            self._handle(engine, self._decoder.decode(data))
        if wait and not messages:
            self._send(Heartbeat(engine.stats()))

    def _handle(self, engine: AnyEngine, message: ToEngine) -> None:
        match message:
            case Submit(request=request, handle=handle):
                engine.add(request, handle)
            case Abort(request_id=request_id):
                engine.abort(request_id)
            case Spelling(tokenizer_json=tokenizer_json):
                engine.use_tokenizer(tokenizer_json)
            case ResetPrefixCache():
                self._send(PrefixCacheReset(engine.reset_prefix_cache()))
            case Shutdown():
                self._stop = True

    def _send(self, message: FromEngine) -> None:
        self._channel.send(self._encoder.encode(message))


def _die_with_parent() -> None:
    """Ends this process, whatever it is doing, when standard input does."""
    with contextlib.suppress(OSError):
        sys.stdin.buffer.read()
    os._exit(1)


def main(process: type[EngineProcess] = EngineProcess) -> NoReturn:
    """`process`: one with another way to load an engine, for stand-ins."""
    startup = msgspec.json.decode(sys.stdin.buffer.readline(), type=Startup)
    threading.Thread(target=_die_with_parent, name="lifeline", daemon=True).start()
    # A terminal's Ctrl-C and a supervisor's SIGTERM reach every process of the group; the
    # client decides when the streams are finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging(startup.log_level, startup.log_format)
    channel = BlockingChannel(socket.socket(fileno=startup.socket_fd))
    try:
        status = process(channel).run(startup.config)
    except Exception:
        logger.exception("A bug ended the engine")
        status = 1
    # The channel closes with the process: earlier, the parent would drop the lifeline first.
    logging.shutdown()
    os._exit(status)  # torch's and the lifeline's threads are not worth waiting for


if __name__ == "__main__":
    main()
