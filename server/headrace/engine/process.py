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
from headrace.engine.attached_clients import AttachedClient, AttachedClients, Incoming
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
    from headrace.engine.client import StepOutputs
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
    listener_fd: int | None = None
    """Where further clients attach (attached_clients.py), if any may."""


class EngineProcess:
    """Connects one Engine to the client that started it, and to those that attach."""

    def __init__(self, channel: BlockingChannel, attached: AttachedClients | None = None) -> None:
        self._channel = channel
        self._attached = attached
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
                self._deliver(engine.step())
            if self._attached is not None:
                self._attend(engine, self._attached)
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
        timeout = HEARTBEAT_PERIOD if wait else 0.0
        if self._attached is not None:
            incoming = self._attached.receive(timeout)
        else:
            messages = self._channel.receive(timeout)
            incoming = [] if messages == [] else [Incoming(None, messages)]
        for client, messages in incoming:
            if messages is None and client is None:
                self._stop = True
            elif messages is None:
                assert self._attached is not None and client is not None
                self._attached.drop(client)
            else:
                for data in messages:
                    self._handle(engine, self._decoder.decode(data), client)
        for request_id in () if self._attached is None else self._attached.take_orphans():
            engine.abort(request_id)
        if wait and not incoming:
            self._send(Heartbeat(engine.stats()))

    def _handle(self, engine: AnyEngine, message: ToEngine, client: AttachedClient | None) -> None:
        match message:
            case Submit(request=request, handle=handle):
                if client is not None:
                    assert self._attached is not None
                    if client not in self._attached:  # it was dropped since it sent this
                        return
                    handle = self._attached.own(client, request.request_id, handle)
                engine.add(request, handle)
            case Abort(request_id=request_id):
                engine.abort(request_id)
            case Spelling(tokenizer_json=tokenizer_json):
                engine.use_tokenizer(tokenizer_json)
            case ResetPrefixCache():
                self._send(PrefixCacheReset(engine.reset_prefix_cache()), client)
            case Shutdown():
                self._stop = True

    def _deliver(self, outputs: StepOutputs) -> None:
        """To each client its part. The first one hears of every step, and hears of it first: who
        asks it after its own client had an answer finds that step counted."""
        parts = [] if self._attached is None else list(self._attached.split(outputs))
        self._send(StepDone(outputs))
        for client, part in parts:
            self._send(StepDone(part), client)

    def _attend(self, engine: AnyEngine, attached: AttachedClients) -> None:
        """Greet those that attached, and keep in touch with all."""
        for client in attached.take_newcomers():
            self._send(Hello(WIRE_VERSION, os.getpid()), client)
            self._send(Heartbeat(engine.stats()), client)
            self._send(Ready(engine.info), client)
        silent_since = time.monotonic() - HEARTBEAT_PERIOD
        for client in attached:
            if client.last_sent < silent_since:
                self._send(Heartbeat(engine.stats()), client)

    def _send(self, message: FromEngine, client: AttachedClient | None = None) -> None:
        data = self._encoder.encode(message)
        if client is None:
            self._channel.send(data)
        elif self._attached is not None:
            self._attached.send(client, data)


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
    attached = None
    if startup.listener_fd is not None:
        attached = AttachedClients(socket.socket(fileno=startup.listener_fd), channel)
    try:
        status = process(channel, attached).run(startup.config)
    except Exception:
        logger.exception("A bug ended the engine")
        status = 1
    # The channel closes with the process: earlier, the parent would drop the lifeline first.
    logging.shutdown()
    os._exit(status)  # torch's and the lifeline's threads are not worth waiting for


if __name__ == "__main__":
    main()
