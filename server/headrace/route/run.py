"""`headrace route`: listens, serves until a signal, drains."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping, Sequence

from headrace.listening import listen, url_of
from headrace.route import waking
from headrace.route.config import RouteConfig
from headrace.route.door import Door
from headrace.route.fleet import Source
from headrace.route.ray_source import RegistrySource, ray_source

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_INTERRUPTED = 0, 130
SETTLE_SECONDS = 3.0
"""Until when replicas are asked for the first time before the door says what it found."""


class DoorLife:
    """Signals: the first SIGTERM or SIGINT drains, the second ends; SIGHUP reads the file again.

    One of several processes does not count signals: a supervisor's may come to it, and its parent
    passes it on; the parent ends it.
    """

    def __init__(self, reread: Callable[[], RouteConfig | None], *, alone: bool) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, *((signal.SIGINT,) if alone else ())):
            loop.add_signal_handler(number, self._on_end, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        self.status: asyncio.Future[int] = loop.create_future()
        self.door: Door | None = None
        self._reread = reread
        self._alone = alone
        self._draining: asyncio.Task[None] | None = None

    def _on_end(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._draining is not None and not self._alone:
            return
        if self.door is None or self._draining is not None:
            logger.warning("%s: ending now", name)
            self._end(EXIT_INTERRUPTED)
            return
        logger.info("%s: no new connections; requests to finish: %d", name, self.door.num_live)
        self._draining = asyncio.create_task(self._drain(self.door))

    async def _drain(self, door: Door) -> None:
        door.drain()
        timeout = door.config.shutdown_timeout
        if not await door.drained(timeout):
            logger.warning("%d requests did not finish within %.0f s", door.num_live, timeout)
        self._end(EXIT_OK)

    def _on_hangup(self) -> None:
        config = self._reread()
        if config is not None and self.door is not None:
            self.door.reconfigure(config)
            logger.info("SIGHUP: the configuration was read again")

    def _end(self, status: int) -> None:
        if not self.status.done():
            self.status.set_result(status)


def _sources(config: RouteConfig) -> list[Source]:
    """Raises ConfigError for an address of Ray that is none."""
    if config.ray is None:
        return []
    references = (config.ray.address, config.ray.dashboard)
    return [ray_source(reference) for reference in references if reference]


def _report(sources: Sequence[Source], queued: Mapping[str, int]) -> None:
    """What waits here is told where replicas register."""
    for source in sources:
        if isinstance(source, RegistrySource):
            source.report_demand(queued)


async def run(
    config: RouteConfig,
    *,
    on_ready: Callable[[Door, str], None] = lambda door, url: None,
    reread: Callable[[], RouteConfig | None] = lambda: None,
    metrics_folder: str = "",
    alone: bool = True,
) -> int:
    """Serve until a signal; the process's exit status.

    `on_ready` gets the door and its URL once it listens and has asked its replicas. `alone`: else
    the port is that of other processes, too, who write their metrics to `metrics_folder`, and a
    parent ends them. Raises ConfigError if the address cannot be had.
    """
    listener = listen(config.host, config.port, shared=not alone)
    life = DoorLife(reread, alone=alone)
    sources = _sources(config)
    life.door = door = Door(
        config,
        sources=sources,
        metric_families=waking.FAMILIES,
        metrics_folder=metrics_folder,
    )
    waking.attach(door, lambda queued: _report(sources, queued))
    try:
        await door.start(listener)
        await door.fleet.settle(SETTLE_SECONDS)
        on_ready(door, url_of(listener))
        return await life.status
    finally:
        await door.close()
