"""The parent of several API processes and of the engine they share. It answers no HTTP itself.

Each API process has a socket of its own at the same port (SO_REUSEPORT), over which the kernel
spreads connections, and one to the engine. One that dies takes only its own requests with it, and
is replaced; one engine follows another as with a single API process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from headrace.api.store_sqlite import SqliteStore
from headrace.api_processes.control import (
    Drain,
    Drained,
    EngineLost,
    EngineRestarts,
    FromApiProcess,
    Link,
    MetricsText,
    ModelFound,
    Ping,
    Scrape,
    Started,
    StartFailed,
    Startup,
    Stop,
    ToApiProcess,
)
from headrace.api_processes.shared_folder import SharedFolder
from headrace.config import (
    EngineConfig,
    ServerOptions,
    api_process_environment,
    default_data_dir,
)
from headrace.engine.channel import socket_pair
from headrace.engine.process_client import ProcessEngineClient
from headrace.errors import ConfigError, EngineError, HeadraceError
from headrace.hosting.model_files import find_model
from headrace.hosting.model_host import Progress, ServedFacts, queue_limits, show_model
from headrace.hosting.version_folder import version_folder
from headrace.listening import reserve, url_of
from headrace.observability.merged import MergedMetrics
from headrace.serve import EXIT_ENGINE_LOST, Lifetime, served_names, until_ended

logger = logging.getLogger(__name__)

MAX_API_PROCESSES = 64
STOP_SECONDS = 10.0
"""What an API process gets to end by itself; its batches give their leases back meanwhile."""
MAX_SILENCE = 60.0
"""Seconds without an answer after which a process is replaced; `step_timeout`, if that is less."""
MIN_DELAY, MAX_DELAY = 0.5, 30.0
"""Seconds before a process is started that takes the place of one that ended young."""
LONG_ENOUGH = 60.0
"""A process that lived for this many seconds is replaced at once."""


class ApiProcess:
    """One of them, from its start to its end."""

    def __init__(self, index: int, process: subprocess.Popen[bytes], link: Link) -> None:
        self.index = index
        self.process = process
        self.link = link
        self.started: Started | None = None
        self.drained = False
        self.last_heard = time.monotonic()


class Supervisor:
    """Keeps `options.api_processes` API processes and an engine alive."""

    def __init__(
        self,
        config: EngineConfig,
        options: ServerOptions,
        folder: Path,
        *,
        port: int,
        on_dead: Callable[[HeadraceError], None],
        on_progress: Progress,
    ) -> None:
        names = served_names(config, options)
        self._config = config
        self._options = replace(options, served_model_name=names)
        self._port = port
        self._folder = SharedFolder(folder, options.api_processes)
        self._board = self._folder.board()
        self._listener = self._folder.listen_for_engines()
        self._on_dead = on_dead
        self._processes: dict[int, ApiProcess] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._path: Path | None = None
        self._all_started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ending = asyncio.Event()
        self.metrics = MergedMetrics(names[0], folder, self._api_pids)
        self.client = ProcessEngineClient(
            config,
            limits=queue_limits(options),
            step_timeout=options.step_timeout,
            log_level=options.log_level,
            log_format=options.log_format,
            on_stats=self.metrics.observe_stats,
            on_progress=on_progress,
            on_dead=self._engine_lost,
            on_restart=lambda: self._tell_all(EngineRestarts(self.client.restarts)),
            listener=self._listener,
        )
        self.metrics.attach_engine(self.client, lambda: self._board.others()[1])

    async def start(self) -> None:
        """Returns when every process answers. Raises what `Service.start` raises."""
        await self._make_store()
        self._keepers = [
            asyncio.create_task(self._keep(index), name=f"api-process-{index}")
            for index in range(self._options.api_processes)
        ]
        self._path = await find_model(self._config)
        self.client.config = replace(self._config, model=str(self._path))
        self._tell_all(ModelFound(str(self._path)))
        await self.client.start()
        info, _ = await asyncio.gather(self.client.wait_ready(), self._all_started)
        show_model(
            self.metrics, info, self._started().digest, self._config.model_options.revision or ""
        )

    def facts(self) -> ServedFacts:
        assert self.client.info is not None and self._path is not None
        names = self._options.served_model_name
        return ServedFacts(names, self._path, self.client.info, self._started().text_formats)

    def _started(self) -> Started:
        return next(p.started for p in self._processes.values() if p.started is not None)

    async def _make_store(self) -> None:
        """Before several processes open it at once. They say what is wrong where it cannot be."""
        options = self._options
        store = SqliteStore(Path(options.data_dir) if options.data_dir else default_data_dir())
        try:
            await store.open()
        except ConfigError:
            if options.data_dir:
                raise
        finally:
            await store.close()

    # --- one API process --------------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        """One process after another in the same place."""
        delay = 0.0
        while not self._ending.is_set():
            began = time.monotonic()
            status = await self._one_life(index)
            if self._ending.is_set():
                return
            if not self._all_started.done():
                self._all_started.set_exception(
                    EngineError(f"An API process ended with status {status} while it started.")
                )
                return
            lived = time.monotonic() - began
            delay = 0.0 if lived > LONG_ENOUGH else min(max(2 * delay, MIN_DELAY), MAX_DELAY)
            logger.error(
                "API process %d ended with status %d; starting another in %.1f s",
                index,
                status,
                delay,
            )
            self.metrics.api_process_restarts.inc()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), delay)

    async def _one_life(self, index: int) -> int:
        """From start to death; the exit status."""
        ours, theirs = socket_pair()
        with theirs:
            process = self._spawn(index, theirs.fileno())
        link = Link(FromApiProcess, lambda message: self._handle(api_process, message))
        api_process = self._processes[index] = ApiProcess(index, process, link)
        await asyncio.get_running_loop().create_connection(lambda: link, sock=ours)
        link.send(EngineRestarts(self.client.restarts))
        if self._path is not None:
            link.send(ModelFound(str(self._path)))
        try:
            await self._watch(api_process)
        finally:
            link.close()
            process.kill()  # it ended, or is about to
            assert process.stdin is not None
            process.stdin.close()
        status = await asyncio.to_thread(process.wait)
        del self._processes[index]
        self._board.clear(index)
        self.metrics.retire(process.pid)
        return status

    async def _watch(self, api_process: ApiProcess) -> None:
        """Until it ends, or is stuck: an event loop that does not run is of no use to anybody."""
        patience = min(self._options.step_timeout, MAX_SILENCE)
        while not api_process.link.ended.done():
            silence = time.monotonic() - api_process.last_heard
            if api_process.started and silence > patience:
                logger.error(
                    "API process %d has said nothing for %.0f s: killing it",
                    api_process.index,
                    silence,
                )
                return
            api_process.link.send(Ping())
            await asyncio.wait([api_process.link.ended], timeout=patience / 10)

    def _spawn(self, index: int, socket_fd: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "headrace.api_processes.worker"],
            stdin=subprocess.PIPE,
            bufsize=0,
            pass_fds=[socket_fd],
            env=api_process_environment(self._folder.path),
        )
        startup = Startup(
            socket_fd,
            index,
            str(self._folder.path),
            self._port,
            self._config,
            self._options,
            replaces=self._is_up,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already; its exit tells
            process.stdin.write(msgspec.json.encode(startup) + b"\n")
        return process

    def _handle(self, sender: ApiProcess, message: FromApiProcess) -> None:
        sender.last_heard = time.monotonic()
        match message:
            case Started():
                sender.started = message
                everyone = len(self._processes) == self._options.api_processes
                if everyone and all(p.started for p in self._processes.values()):
                    self._set_started(None)
            case StartFailed():
                kind = ConfigError if message.user_error else EngineError
                if self._is_up:
                    logger.error("API process %d cannot start: %s", sender.index, message.message)
                    sender.process.kill()
                self._set_started(kind(message.message))
            case Drained():
                sender.drained = True
            case Scrape():
                asyncio.get_running_loop().create_task(self._answer_scrape(sender))

    @property
    def _is_up(self) -> bool:
        """Whether all processes have answered once; not so if the start failed or was given up."""
        started = self._all_started
        return started.done() and not started.cancelled() and started.exception() is None

    def _set_started(self, error: HeadraceError | None) -> None:
        if self._all_started.done():
            return
        if error is None:
            self._all_started.set_result(None)
        else:
            self._all_started.set_exception(error)

    async def _answer_scrape(self, sender: ApiProcess) -> None:
        # What the engine has told already is read first: it is counted in the answer.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        sender.link.send(MetricsText(self.metrics.render()))

    def _tell_all(self, message: ToApiProcess) -> None:
        for api_process in self._processes.values():
            api_process.link.send(message)

    def _api_pids(self) -> list[int]:
        return [api_process.process.pid for api_process in self._processes.values()]

    # --- the end ----------------------------------------------------------------------------

    def _engine_lost(self, error: HeadraceError) -> None:
        # First: API processes that start say it too, in a message without its kind.
        self._set_started(error)
        self._tell_all(EngineLost(error.message))
        if self._is_up:  # else `start` raises it
            self._on_dead(error)

    @property
    def num_live(self) -> int:
        return self._board.num_live

    def drain(self) -> None:
        self._ending.set()
        self._tell_all(Drain())

    async def drained(self, timeout: float) -> bool:
        """Wait until no process has a request; False if one still has after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not all(api_process.drained for api_process in self._processes.values()):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    async def close(self) -> None:
        self._ending.set()
        self._tell_all(Stop())
        if self._keepers:
            _, pending = await asyncio.wait(self._keepers, timeout=STOP_SECONDS)
            for api_process in self._processes.values() if pending else ():
                api_process.process.kill()
            await asyncio.gather(*self._keepers, return_exceptions=True)
        await self.client.close()
        self._listener.close()
        if self._all_started.done() and not self._all_started.cancelled():
            self._all_started.exception()  # told already, or of no interest any more


async def run(
    config: EngineConfig,
    options: ServerOptions,
    *,
    on_ready: Callable[[ServedFacts, str], None] = lambda facts, url: None,
    on_progress: Progress = lambda read, total: None,
) -> int:
    """As `serve.run`, with `options.api_processes` processes that answer HTTP."""
    if not 1 <= options.api_processes <= MAX_API_PROCESSES:
        raise ConfigError(f"--api-processes must be 1 to {MAX_API_PROCESSES}.")
    if version_folder(config, options) is not None:
        raise ConfigError(
            f"--api-processes {options.api_processes}: a folder of versions is served by one API "
            f"process. Leave the option out, or give one version: a folder in {config.model}."
        )
    lifetime = Lifetime(options.shutdown_timeout)
    with _reserved(options) as (port, url), _private_folder() as folder:
        lifetime.service = supervisor = Supervisor(
            config,
            options,
            folder,
            port=port,
            on_dead=lambda error: lifetime.end(EXIT_ENGINE_LOST),
            on_progress=on_progress,
        )
        try:
            return await until_ended(
                lifetime, supervisor.start(), lambda: on_ready(supervisor.facts(), url)
            )
        finally:
            await supervisor.close()


@contextlib.contextmanager
def _reserved(options: ServerOptions) -> Iterator[tuple[int, str]]:
    """(port, URL), ours as long as the block lasts."""
    with reserve(options.host, options.port) as holder:
        yield holder.getsockname()[1], url_of(holder)


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="headrace-", ignore_cleanup_errors=True) as name:
        yield Path(name)
