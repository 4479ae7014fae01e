"""The serving assembly: the models of this process and the HTTP app become one server.

`headrace serve` runs it on uvicorn, as does `headrace chat`, in a thread; a Ray Serve replica uses
the same `Service` behind its own HTTP server. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI

from headrace import __version__
from headrace.api.api_config import ApiConfig
from headrace.api.app import create_app
from headrace.api.batch_runner import BatchRunner
from headrace.api.model_table import ModelTable, ServedModel
from headrace.api.services import Services
from headrace.api.store_sqlite import SqliteStore
from headrace.config import EngineConfig, ServerOptions, default_data_dir
from headrace.engine.attached_client import AttachedEngineClient
from headrace.engine.client import ModelInfo
from headrace.engine.process_client import ProcessEngineClient
from headrace.errors import ConfigError, HeadraceError
from headrace.hosting.model_host import (
    HostEvents,
    ModelHost,
    Progress,
    ServedFacts,
    Sharing,
    SingleModel,
    keep_out_of_collections,
)
from headrace.hosting.version_folder import version_folder
from headrace.hosting.versioned import VersionedModels
from headrace.http_connection import HttpConnection
from headrace.listening import listen, url_of
from headrace.loading.resolver import DEFAULT_MODEL
from headrace.observability.logging import configure_logging
from headrace.observability.metrics import Metrics

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_ENGINE_LOST, EXIT_INTERRUPTED = 0, 1, 130


class Models(Protocol):
    """The models of a process: one, or the versions of one."""

    @property
    def host(self) -> ModelHost:
        """Of what the served name stands for now."""
        ...

    @property
    def num_live(self) -> int:
        """Requests that their engines work on."""
        ...

    async def start(self) -> ModelInfo:
        """Returns when requests can come. Raises CheckpointError, ConfigError or EngineError if
        there is nothing that can be served."""
        ...

    async def close(self) -> None: ...


class Service:
    """What a process serves, and the app in front of it."""

    def __init__(
        self,
        config: EngineConfig,
        options: ServerOptions,
        *,
        on_dead: Callable[[HeadraceError], None] = lambda error: None,
        on_progress: Progress = lambda read, total: None,
        sharing: Sharing | None = None,
    ) -> None:
        """`sharing`: with other processes, an engine that is started elsewhere."""
        names = served_names(config, options)
        self.metrics = Metrics(names[0], read_elsewhere=sharing is not None)
        self.table = ModelTable(expected=names)
        self.app: FastAPI = create_app(self.table, _api_config(options), self.metrics)
        services: Services = self.app.state.services
        events = HostEvents(
            on_record=services.ledger.close,
            on_stats=self.metrics.observe_stats,
            on_progress=on_progress,
            on_dead=on_dead,
        )
        self.models: Models
        if (folder := version_folder(config, options)) is not None:
            self.models = VersionedModels(
                folder,
                config,
                options,
                names,
                events,
                table=self.table,
                metrics=self.metrics,
                open_requests=services.open_requests,
            )
        else:
            revision = config.model_options.revision or ""
            host = ModelHost(config, options, names, events, revision=revision, sharing=sharing)
            self.models = SingleModel(host, config, self.metrics, sharing)
            self.table.add(host.model)
        self._data_dir = options.data_dir
        self._batches: BatchRunner | None = None

    async def start(self) -> ModelInfo:
        """Find and load what is served; returns when requests can come.

        Raises CheckpointError, ConfigError or EngineError for a model that cannot be served.
        """
        await self._open_store()
        info = await self.models.start()
        services: Services = self.app.state.services
        if services.store is not None:
            self._batches = BatchRunner(self.app, services)
            self._batches.start()
        keep_out_of_collections()
        return info

    @property
    def client(self) -> ProcessEngineClient | AttachedEngineClient:
        """Of the engine behind the served name; another one after a switch of versions."""
        return self.models.host.client

    @property
    def model(self) -> ServedModel:
        return self.models.host.model

    def facts(self) -> ServedFacts:
        """What is served, once it is."""
        return self.models.host.facts()

    @property
    def num_live(self) -> int:
        return self.models.num_live

    async def _open_store(self) -> None:
        """Raises ConfigError for a folder that was asked for and cannot be used."""
        services: Services = self.app.state.services
        folder = Path(self._data_dir) if self._data_dir else default_data_dir()
        store = SqliteStore(folder)
        try:
            await store.open()
        except ConfigError as error:
            await store.close()
            if self._data_dir:
                raise
            logger.warning("No files, batches and stored responses: %s", error.message)
            services.store_problem = error.message
        else:
            services.store = store

    def drain(self) -> None:
        """Take no new requests: /readyz says 503, and so do they. Running ones go on, but for lines
        of batches, which another process or a later one computes again."""
        self.app.state.services.draining = True
        if self._batches is not None:
            self._batches.stop()

    async def drained(self, timeout: float) -> bool:
        """Wait until no request lives; False if some still do after `timeout` seconds."""
        deadline = asyncio.get_running_loop().time() + timeout
        while self.num_live:
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    async def close(self) -> None:
        if self._batches is not None:
            await self._batches.close()
        await self.models.close()
        await self.app.state.services.background.close()
        store = self.app.state.services.store
        if store is not None:
            await store.close()


def _api_config(options: ServerOptions) -> ApiConfig:
    return ApiConfig(
        api_keys=(options.api_key,) if options.api_key else (),
        max_body_bytes=options.max_body_bytes,
        max_file_bytes=options.max_file_bytes,
        data_limit=options.data_limit,
        max_stored_responses=options.max_stored_responses,
        batch_concurrency=options.batch_concurrency,
        step_age_limit=options.step_timeout,
        strict_fields=options.strict_fields,
        trust_request_chat_template=options.trust_request_chat_template,
        cors_origins=options.cors_origin,
        version=__version__,
    )


def served_names(config: EngineConfig, options: ServerOptions) -> tuple[str, ...]:
    """The name of the model in the API, and its aliases."""
    return options.served_model_name or (_default_name(config.model),)


def _default_name(reference: str) -> str:
    """What clients call the model when nobody says: as it was asked for, or its file's name."""
    if not reference:
        return DEFAULT_MODEL
    path = Path(reference)
    if not path.exists():
        return reference
    return path.stem if path.suffix == ".gguf" else path.resolve().name


# --- `headrace serve` -------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: `Lifetime` decides what a signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Drainable(Protocol):
    @property
    def num_live(self) -> int: ...

    def drain(self) -> None: ...

    async def drained(self, timeout: float) -> bool: ...


class Lifetime:
    """When the process ends, and with which status."""

    def __init__(self, shutdown_timeout: float) -> None:
        """Takes signals from now on, on the running event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.on_signal, number)
        self.status: asyncio.Future[int] = loop.create_future()
        self.service: Drainable | None = None
        self._shutdown_timeout = shutdown_timeout
        self._draining: asyncio.Task[None] | None = None

    def end(self, status: int) -> None:
        if not self.status.done():
            self.status.set_result(status)

    def on_signal(self, number: int) -> None:
        if self.service is None or self._draining is not None:
            logger.warning("%s: ending now", signal.Signals(number).name)
            self.end(EXIT_INTERRUPTED)
            return
        logger.info(
            "%s: not ready any more; requests to finish: %d",
            signal.Signals(number).name,
            self.service.num_live,
        )
        self._draining = asyncio.create_task(self._drain(self.service))

    async def _drain(self, service: Drainable) -> None:
        service.drain()
        if not await service.drained(self._shutdown_timeout):
            logger.warning(
                "%d requests did not finish within %.0f s and are ended with an error",
                service.num_live,
                self._shutdown_timeout,
            )
        self.end(EXIT_OK)


async def run(
    config: EngineConfig,
    options: ServerOptions,
    *,
    on_ready: Callable[[ServedFacts, str], None] = lambda facts, url: None,
    on_progress: Progress = lambda read, total: None,
) -> int:
    """Serve until a signal or the engine's end; the process's exit status.

    The first SIGTERM or SIGINT drains: not ready, streams finish within `shutdown_timeout`, 0.
    A second one ends everything at once. An engine that is lost for good ends it with 1. Raises
    HeadraceError if the model cannot be served.
    """
    lifetime = Lifetime(options.shutdown_timeout)
    listener = listen(options.host, options.port)
    lifetime.service = service = Service(
        config,
        options,
        on_dead=lambda error: lifetime.end(EXIT_ENGINE_LOST),
        on_progress=on_progress,
    )
    async with answering(service, listener):
        return await until_ended(
            lifetime, service.start(), lambda: on_ready(service.facts(), url_of(listener))
        )


async def until_ended(
    lifetime: Lifetime, start: Coroutine[Any, Any, object], on_started: Callable[[], None]
) -> int:
    """Run `start` and wait for the end, whichever comes first; the exit status. Raises what
    `start` raises."""
    starting = asyncio.create_task(start)
    try:
        events: list[asyncio.Future[Any]] = [starting, lifetime.status]
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            on_started()
        return await lifetime.status
    finally:
        starting.cancel()


@contextlib.asynccontextmanager
async def answering(service: Service, listener: socket.socket) -> AsyncIterator[socket.socket]:
    """HTTP at `listener`; in the end the service is closed first, so that streams hear of it."""
    server = _Server(
        uvicorn.Config(
            service.app,
            http=HttpConnection,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            server_header=False,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener
    finally:
        await service.close()
        server.should_exit = True
        await serving


@contextlib.contextmanager
def in_background(
    config: EngineConfig,
    options: ServerOptions,
    *,
    on_progress: Progress = lambda read, total: None,
) -> Iterator[tuple[str, str]]:
    """A server in a thread of this process, for it alone, as long as the block lasts: (URL, key)
    once it is ready. It has a free port and a key made up, and logs nothing but errors.

    Signals stay with the caller. Raises HeadraceError if the model cannot be served.
    """
    key = secrets.token_urlsafe()
    options = replace(options, host="127.0.0.1", port=0, api_key=key, log_level="error")
    configure_logging(options.log_level, options.log_format)
    ready: Future[str] = Future()

    async def live() -> None:
        service = Service(config, options, on_progress=on_progress)
        async with answering(service, listen(options.host, options.port)) as listener:
            await service.start()
            ready.set_result(url_of(listener))
            await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    task = loop.create_task(live())

    def work() -> None:
        loop.run_until_complete(asyncio.wait([task]))
        if not task.cancelled() and (error := task.exception()) and not ready.done():
            ready.set_exception(error)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=work, name="server")
    thread.start()
    try:
        yield ready.result(), key
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
