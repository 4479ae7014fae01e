"""The replicas that there are, how they feel, and which one a request goes to.

Sources say which there are (seam: `Source.run`); each is asked for its load every second. What is
down gets no requests until it answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from headrace.route.choose import (
    NoReplicaError,
    ReplicaLoad,
    ReplicaView,
    RouteRequest,
    choose,
    key_of,
    rank,
)
from headrace.route.config import split_url
from headrace.route.http_text import request_head
from headrace.route.upstream import ConnectionPool, Fetched

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
POLL_TIMEOUT = 3.0
REPLICAS_PER_SECOND = 200.0
"""Asked at most: many replicas are each asked less often."""
CARDS_EVERY = 30
"""Polls between two looks at what a replica serves."""
STUCK_SECONDS = 30.0
"""Without an answer to anything after which a replica's streams are taken elsewhere."""

OnChange = Callable[[Mapping[str, Sequence[str]]], None]


class Source(Protocol):
    """Knows addresses: application -> base URLs, such as http://10.0.0.3:30001."""

    async def run(self, on_change: OnChange) -> None:
        """Reports what it knows, whenever it changes, all of it each time."""


class Replica:
    """One server behind the door."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        host, port = split_url(url, "replica")
        self.pool = ConnectionPool(host, port)
        self.view = ReplicaView(address=self.url)
        self.cards: list[dict[str, Any]] = []
        """Of GET /v1/models."""
        self.up = False
        """It answered the last time, and is not known to have died since."""
        self.state = "unknown"
        """For people: unknown, ready, not ready, draining, down."""
        self.last_answer = time.monotonic()
        self.polls = 0
        self.cards_are_due = True
        self._described: tuple[object, ...] = ()
        """What its load says of itself that its cards say, too."""
        self.has_load = True
        """Whether GET /load is known there and open to this door."""
        self.task: asyncio.Task[None] | None = None

    @property
    def names(self) -> list[str]:
        """Of the models it serves, aliases last; empty while not known."""
        return [str(card.get("id")) for card in self.cards]

    @property
    def usable(self) -> bool:
        return self.up and self.view.load.usable

    def failed(self, reason: str) -> None:
        """A connection to it was refused or broke."""
        if self.up:
            logger.warning("Replica %s is down: %s", self.url, reason)
        self.up = False
        self.state = "down"
        self.pool.close_idle()

    # --- polling --------------------------------------------------------------------------------

    async def poll(self, api_key: str | None) -> None:
        """Ask once how it is."""
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                await self._ask_load(api_key)
                if self.cards_are_due or self.polls % CARDS_EVERY == 0:
                    await self._ask_cards(api_key)
                self.polls += 1
        except (OSError, TimeoutError, ValueError) as error:
            self.failed(str(error) or f"no answer within {POLL_TIMEOUT:g} s")
            if time.monotonic() - self.last_answer > STUCK_SECONDS:
                self.pool.lose_all()
            return
        self.last_answer = time.monotonic()
        if not self.up:
            logger.info("Replica %s is up (%s)", self.url, self.state)
        self.up = True

    async def fetch(self, path: str, api_key: str | None) -> tuple[int, bytes]:
        """(status, body). Raises OSError."""
        headers = [(b"host", b"door"), (b"user-agent", b"headrace-route")]
        if api_key:
            headers.append((b"authorization", b"Bearer " + api_key.encode()))
        answer = Fetched()
        for fresh in (False, True):
            connection = await self.pool.connect(fresh=fresh)
            connection.send(request_head(b"GET", path.encode(), headers, 0), answer)
            try:
                status, _, body = await answer
                return status, body
            except ConnectionError:
                if fresh or not connection.used:
                    raise
                answer = Fetched()
            except asyncio.CancelledError:
                connection.abort()
                raise
        raise AssertionError("the second try returns or raises")

    async def _ask_load(self, api_key: str | None) -> None:
        if self.has_load:
            status, body = await self.fetch("/load", api_key)
            if status in (401, 403, 404, 405):
                self.has_load = False
                if status in (401, 403):
                    logger.warning(
                        "%s/load refuses this door: its 'api_key' must be the replica's. Routing "
                        "there goes by this door's own counts.",
                        self.url,
                    )
            elif status == 200:
                self._heard(json.loads(body))
                return
            else:
                self._heard({"version": 1, "ready": False})
                return
        status, _ = await self.fetch("/readyz", api_key)
        self._heard({"version": 1, "ready": status == 200})

    def _heard(self, report: dict[str, Any]) -> None:
        self.view.fade(time.monotonic() - self.last_answer)
        self.view.load = load = ReplicaLoad.of_report(report, self.view)
        described = (load.ready, *(report.get(name) for name in ("model", "revision", "digest")))
        if described != self._described:
            self._described, self.cards_are_due = described, True
        usual = "ready" if load.ready else "not ready"
        self.state = "draining" if load.draining else usual

    async def _ask_cards(self, api_key: str | None) -> None:
        status, body = await self.fetch("/v1/models", api_key)
        if status == 200:
            self.cards_are_due = False
            self.cards = [card for card in json.loads(body).get("data", ()) if "id" in card]


class Fleet:
    """All replicas, by application."""

    def __init__(self, api_key: str | None = None) -> None:
        """`api_key`: to ask replicas with."""
        self.api_key = api_key
        self.applications: dict[str, list[Replica]] = {}
        self.on_up: list[Callable[[str, Replica], None]] = []
        """Called with an application and its replica that became usable."""
        self._known: dict[object, dict[str, list[str]]] = {}
        self._replicas: dict[str, Replica] = {}
        self._sources: list[asyncio.Task[None]] = []

    def start(self, source: Source) -> None:
        task = asyncio.create_task(source.run(lambda found: self.update(source, found)))
        task.add_done_callback(_tell_failure)
        self._sources.append(task)

    def update(self, source: object, found: Mapping[str, Sequence[str]]) -> None:
        """What a source knows now. A replica that is not there any more gets no new requests; what
        it works on goes on."""
        self._known[source] = {name: list(urls) for name, urls in found.items()}
        merged: dict[str, list[str]] = {}
        for known in self._known.values():
            for name, urls in known.items():
                merged.setdefault(name, []).extend(url.rstrip("/") for url in urls)
        wanted = {url for urls in merged.values() for url in urls}
        for url in self._replicas.keys() - wanted:
            logger.info("Replica %s is gone", url)
            replica = self._replicas.pop(url)
            if replica.task is not None:
                replica.task.cancel()
            replica.pool.close_idle()
        for url in wanted - self._replicas.keys():
            replica = self._replicas[url] = Replica(url)
            replica.task = asyncio.create_task(self._watch(replica))
        self.applications = {
            name: [self._replicas[url] for url in dict.fromkeys(urls)]
            for name, urls in merged.items()
        }

    async def _watch(self, replica: Replica) -> None:
        while True:
            was_usable = replica.usable
            try:
                await replica.poll(self.api_key)
            except Exception:
                logger.exception("A bug while %s was asked for its load", replica.url)
            if replica.usable and not was_usable:
                self._tell_up(replica)
            pause = max(POLL_SECONDS, len(self._replicas) / REPLICAS_PER_SECOND)
            await asyncio.sleep(pause)

    def _tell_up(self, replica: Replica) -> None:
        for name, replicas in self.applications.items():
            if replica in replicas:
                for tell in self.on_up:
                    tell(name, replica)

    def usable(self, application: str) -> list[Replica]:
        return [it for it in self.applications.get(application, ()) if it.usable]

    def replicas(self) -> Iterator[Replica]:
        yield from self._replicas.values()

    def pick(
        self, application: str, request: RouteRequest, excluded: Collection[Replica] = ()
    ) -> Replica | None:
        """The replica that `request` should go to; None if there is none that is ready."""
        candidates = [it for it in self.usable(application) if it not in excluded]
        if not candidates:
            return None
        with contextlib.suppress(NoReplicaError):
            return candidates[choose([it.view for it in candidates], request)]
        return None

    def keeper(
        self, application: str, excluded: Collection[Replica] = (), *, everywhere: bool = False
    ) -> Replica | None:
        """The one that gets what only one replica keeps: files, batches. The same for all doors.
        `everywhere`: of other applications, too, when those of this one are excluded."""
        candidates = [it for it in self.usable(application) if it not in excluded]
        if everywhere and not candidates:
            candidates = [it for it in self.replicas() if it.usable and it not in excluded]
        key = key_of(application.encode())
        return max(candidates, key=lambda it: rank(key, it.view.key), default=None)

    async def settle(self, seconds: float) -> None:
        """Wait until every replica was asked once, but not longer than that."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._replicas and all(it.state != "unknown" for it in self._replicas.values()):
                return
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        tasks = [*self._sources, *(it.task for it in self._replicas.values() if it.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self._replicas.values():
            replica.pool.close_idle()


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("A source of addresses ended; the last known ones stay", exc_info=error)
