"""The versions of one model, served by one process: watches their folder and does what `Rollout`
says, with a host for each version.

Whoever had looked up an entry of the table before a switch finishes on it: a version is unloaded
when every HTTP request that had begun by then has ended, and its engine has none left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from headrace.api.model_table import ModelTable, UnservedVersion
from headrace.api.open_requests import OpenRequests
from headrace.config import EngineConfig, ServerOptions
from headrace.engine.client import EngineStats, ModelInfo
from headrace.errors import CheckpointError, HeadraceError
from headrace.hosting.fit import Question, Verdict, beside, fits
from headrace.hosting.model_host import (
    HostEvents,
    ModelHost,
    keep_out_of_collections,
    show_model,
)
from headrace.hosting.rollout import Action, Do, Phase, Rollout, Seen
from headrace.hosting.version_folder import VersionFolder
from headrace.observability.metrics import Metrics

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
"""Between two looks at whether a version's last request has ended."""


class _NoRoomError(Exception):
    pass


class VersionedModels:
    """Implements serve.Models."""

    def __init__(
        self,
        folder: VersionFolder,
        config: EngineConfig,
        options: ServerOptions,
        names: Sequence[str],
        events: HostEvents,
        *,
        table: ModelTable,
        metrics: Metrics,
        open_requests: OpenRequests,
        make_host: Callable[..., ModelHost] = ModelHost,
        fits: Callable[[Question], Awaitable[Verdict]] = fits,
    ) -> None:
        self._folder = folder
        self._config = config
        self._options = options
        self._names = tuple(names)
        self._events = events
        self._table = table
        self._metrics = metrics
        self._open_requests = open_requests
        self._make_host = make_host
        self._fits = fits
        self._rollout = Rollout(folder.policy)
        self._hosts: dict[int, ModelHost] = {}
        self._work: dict[int, asyncio.Task[None]] = {}
        """A load or a drain; a version has one at a time."""
        self._watching: asyncio.Task[None] | None = None
        self._first: asyncio.Future[ModelInfo] | None = None
        self._shown: ModelHost | None = None
        """Of what the served name stands for; None: nothing."""
        self._last: ModelHost | None = None
        """While nothing is: of what was, or is to be."""
        self._last_error: HeadraceError = CheckpointError(f"{folder.path}: no version to serve.")
        self._folder_error = ""
        self._lost = False
        self._closing = False

    # --- serve.Models -----------------------------------------------------------------------

    @property
    def host(self) -> ModelHost:
        host = self._shown or self._last
        assert host is not None, "start() comes first"
        return host

    @property
    def num_live(self) -> int:
        return sum(host.client.num_live for host in self._hosts.values())

    async def start(self) -> ModelInfo:
        """Returns when one version can be asked: the newest that can be loaded, where one is
        wanted. The others follow. Raises the error of the last one tried, if none can."""
        self._first = asyncio.get_running_loop().create_future()
        self._watching = asyncio.create_task(self._watch(), name="versions")
        return await self._first

    async def close(self) -> None:
        self._closing = True
        tasks = [*self._work.values()]
        if self._watching is not None:
            tasks.append(self._watching)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(host.close() for host in self._hosts.values()))

    # --- the folder -------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            try:
                if (seen := await self._look()) is not None:
                    self._rollout.look(seen)
                    self._act()
            except Exception:
                logger.exception("The versions cannot be looked through; trying again soon")
            await asyncio.sleep(self._folder.poll_interval)

    async def _look(self) -> Seen | None:
        """None if the folder cannot be read: nothing is taken to have changed."""
        error = ""
        try:
            return await asyncio.to_thread(self._folder.look)
        except OSError as caught:
            error = str(caught)
            if error != self._folder_error:
                logger.error("%s cannot be read: %s", self._folder.path, error)
            return None
        finally:
            self._folder_error = error

    # --- what the rollout says --------------------------------------------------------------

    def _act(self) -> None:
        if self._closing:
            return
        for action in self._rollout.decide():
            self._begin(action)
        self._show()
        lost = self._rollout.is_lost()
        if lost and not self._lost:
            self._give_up()
        self._lost = lost

    def _begin(self, action: Action) -> None:
        what, number = action
        match what:
            case Do.LOAD:
                self._start_work(number, lambda: self._load(number))
            case Do.ABANDON:
                logger.info("Version %d is not wanted any more; its load ends", number)
                self._work[number].cancel()
            case Do.DRAIN:
                self._start_work(number, lambda: self._drain(number, float("inf")))
            case Do.HURRY:
                timeout = self._options.shutdown_timeout
                self._start_work(number, lambda: self._drain(number, timeout))
            case Do.READMIT:
                logger.info("Version %d is wanted again", number)
                self._work.pop(number).cancel()

    def _start_work(self, number: int, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            try:
                await work()
            except asyncio.CancelledError:
                version = self._rollout.versions.get(number)
                if self._closing or version is None or version.phase is not Phase.CLOSING:
                    raise
                await self._discard(number)  # it was abandoned
                self._rollout.unloaded(number)
            # Unless it was readmitted, and has other work by now.
            if self._work.get(number) is asyncio.current_task():
                del self._work[number]
            self._act()

        self._work[number] = asyncio.create_task(run(), name=f"version-{number}")

    async def _load(self, number: int) -> None:
        logger.info("Loading version %d of %s", number, self._names[0])
        try:
            await self._open(number)
        except _NoRoomError as error:
            self._make_room_for(number, str(error))
        except HeadraceError as error:
            await self._fail(number, error)
        except Exception as error:
            logger.exception("Version %d: a bug", number)
            await self._fail(number, CheckpointError(f"{type(error).__name__}: {error}"))
        else:
            self._metrics.observe_load("ok")
            self._rollout.loaded(number)

    async def _open(self, number: int) -> None:
        """Its host, ready. Raises _NoRoomError, or what hosts raise."""
        path = self._folder.path_of(number)
        config = replace(self._config, model=str(path))
        if self._hosts:  # else the engine says all of this itself
            config = await self._beside(config)
        events = replace(
            self._events,
            on_stats=lambda stats: self._observe_stats(host, stats),
            on_dead=lambda error: self._died(number, host, error),
        )
        host = self._hosts[number] = self._make_host(
            config,
            self._options,
            (self._pinned(number),),
            events,
            revision=str(number),
            version=number,
        )
        if self._shown is None:
            self._last = host
        await host.start(path)

    async def _beside(self, config: EngineConfig) -> EngineConfig:
        """With which it is loaded beside the hosts that there are."""
        infos = [host.client.info for host in self._hosts.values()]
        largest = max((info.kv_cache_bytes for info in infos if info is not None), default=0)
        question = Question(config, beside(config, largest), self._freed(), self._claimed())
        verdict = await self._fits(question)
        if verdict.error:
            raise CheckpointError(verdict.error)
        if verdict.no_room:
            raise _NoRoomError(verdict.no_room)
        return question.beside

    def _freed(self) -> int:
        hosts = (self._hosts[n] for n in self._rollout.replaceable() if n in self._hosts)
        infos = [host.client.info for host in hosts]
        return sum(info.weight_bytes + info.kv_cache_bytes for info in infos if info is not None)

    def _claimed(self) -> int:
        claimed = 0
        for host in self._hosts.values():
            info = host.client.info
            if info is not None and info.device == "cpu":
                whole = info.weight_bytes + info.kv_cache_bytes
                claimed += max(0, whole - host.client.stats.resident_bytes)
        return claimed

    def _make_room_for(self, number: int, reason: str) -> None:
        advice = "Give each version less, with --kv-cache-memory-bytes, or serve fewer."
        action = self._rollout.no_room(number, f"No room: {reason} {advice}")
        if number in self._rollout.versions:  # nothing could go
            self._tell_failure(number)
            return
        logger.warning(
            "Version %d has no room beside what is loaded (%s). %s",
            number,
            reason,
            "It waits for what is being unloaded."
            if action is None
            else f"Version {action[1]} is unloaded first; meanwhile requests are answered 503.",
        )
        if action is not None:
            self._begin(action)

    async def _drain(self, number: int, timeout: float) -> None:
        """`timeout`: in seconds; whatever has not ended then fails."""
        loop = asyncio.get_running_loop()
        host, mark, deadline = (
            self._hosts[number],
            self._open_requests.mark(),
            loop.time() + timeout,
        )
        logger.info("Draining version %d: %d requests", number, host.client.num_live)
        while host.client.num_live or not self._open_requests.passed(mark):
            if loop.time() > deadline:
                logger.warning(
                    "%d requests to version %d did not finish within %.0f s and are ended with an "
                    "error",
                    host.client.num_live,
                    number,
                    timeout,
                )
                break
            await asyncio.sleep(POLL_SECONDS)
        self._rollout.closing(number)
        await self._discard(number)
        self._rollout.unloaded(number)
        logger.info("Version %d is unloaded", number)
        keep_out_of_collections()

    # --- the ends of versions ---------------------------------------------------------------

    async def _fail(self, number: int, error: HeadraceError) -> None:
        await self._discard(number)
        self._last_error = error
        self._rollout.failed(number, error.message)
        self._tell_failure(number)

    def _tell_failure(self, number: int) -> None:
        self._metrics.observe_load("failed")
        logger.error(
            "Version %d of %s was not loaded; it is tried again when its files change. %s",
            number,
            self._names[0],
            self._rollout.versions[number].reason,
        )

    def _died(self, number: int, host: ModelHost, error: HeadraceError) -> None:
        """An engine is lost for good; while it is loaded, its load tells."""
        if self._rollout.is_draining(number):
            self._rollout.closing(number)  # it cannot be taken back
        if number in self._rollout.serving() and self._hosts.get(number) is host:
            self._last_error = error
            self._rollout.failed(number, error.message)
            self._start_work(number, lambda: self._discard(number))
            self._act()

    async def _discard(self, number: int) -> None:
        if (host := self._hosts.get(number)) is not None:
            await host.close()
            if self._hosts.get(number) is host:
                del self._hosts[number]

    def _give_up(self) -> None:
        """Nothing serves, and there is nothing that could be tried."""
        assert self._first is not None
        if not self._first.done():
            self._first.set_exception(self._last_error)
        else:
            self._events.on_dead(self._last_error)

    # --- the table --------------------------------------------------------------------------

    def _show(self) -> None:
        serving = self._rollout.serving()
        for number in serving:
            pinned = self._pinned(number)
            model = self._hosts[number].model
            newest = number == serving[0]
            model.name = self._names[0] if newest else pinned
            model.aliases = (*self._names[1:], pinned) if newest else ()
        self._table.replace(
            (self._hosts[number].model for number in serving),
            (
                UnservedVersion(name=self._pinned(number), version=number, state=state, reason=why)
                for number, state, why in self._rollout.unserved()
            ),
        )
        self._stand_for(self._hosts[serving[0]] if serving else None)

    def _stand_for(self, host: ModelHost | None) -> None:
        """The served name stands for this one from now on; None: for nothing just now."""
        if host is self._shown:
            return
        if host is None:
            self._last, self._shown = self._shown, None
            self._metrics.attach_engine(None)
            self._metrics.set_version(0)
            return
        info, version = host.client.info, host.model.version
        assert info is not None and version is not None, "it is ready"
        self._shown = host
        self._metrics.attach_engine(host.client)
        self._metrics.set_version(version)
        show_model(self._metrics, info, host.model.digest, host.model.revision)
        logger.info("%s is version %d", self._names[0], version)
        if self._first is not None and not self._first.done():
            self._first.set_result(info)

    def _pinned(self, number: int) -> str:
        """The name of one version."""
        return f"{self._names[0]}@{number}"

    def _observe_stats(self, host: ModelHost, stats: EngineStats) -> None:
        if host is self._shown:
            self._metrics.observe_stats(stats)
