"""Requests whose model has no replica: they wait, so many and so long, while one is started.

What waits is told to whoever scales: the registry of replicas under Ray, and
`headrace_door_queued_requests` for Kubernetes. Nothing here starts a replica.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from headrace.errors import UnavailableError
from headrace.observability.families import Family

if TYPE_CHECKING:
    from headrace.route.config import Wake
    from headrace.route.door import Door

FAMILIES: tuple[Family, ...] = (
    Family(
        "door_queued_requests",
        "gauge",
        "Requests that wait at the door for a replica of their model to start.",
    ),
    Family(
        "door_unqueued_requests_total",
        "counter",
        "Requests that waited for a replica, by what became of them: ready, full, late, gone.",
        ("model_name", "outcome"),
    ),
)
OUTCOMES = ("ready", "full", "late", "gone")

EXPERIENCE = 0.3
"""Weight of the last start-up in the expected one."""

ReportDemand = Callable[[Mapping[str, int]], None]
"""Takes application -> requests that wait, all of them, whenever that changes."""


class Limits(Protocol):
    """How an application's requests may wait: config.Wake."""

    @property
    def queue(self) -> int: ...
    @property
    def deadline_s(self) -> float: ...


class WaitingRoom:
    """Who waits for one application, first come first served. It never looks at a clock: `now` is
    seconds that only grow."""

    def __init__(self) -> None:
        self._tickets: dict[int, None] = {}
        """In order of arrival."""
        self._last_ticket = 0
        self._since = 0.0
        """When it was empty for the last time."""
        self._startup_s = 0.0

    def __len__(self) -> int:
        return len(self._tickets)

    def enter(self, now: float, size: int) -> int | None:
        """A ticket, or None if `size` wait already."""
        if len(self._tickets) >= size:
            return None
        if not self._tickets:
            self._since = now
        self._last_ticket += 1
        self._tickets[self._last_ticket] = None
        return self._last_ticket

    def leave(self, ticket: int) -> bool:
        """Whether it still waited."""
        if ticket not in self._tickets:
            return False
        del self._tickets[ticket]
        return True

    def open(self, now: float) -> list[int]:
        """There is a replica: all leave, in order. How long the first one waited is remembered."""
        tickets = list(self._tickets)
        if tickets:
            waited = now - self._since
            known = self._startup_s
            self._startup_s = waited if not known else known + EXPERIENCE * (waited - known)
        self._tickets.clear()
        return tickets

    def retry_after(self, now: float, otherwise: float) -> float:
        """Seconds until a replica is there by experience; `otherwise` before there is any."""
        if not self._startup_s:
            return otherwise
        passed = now - self._since if self._tickets else 0.0
        return max(1.0, self._startup_s - passed)


class Waking:
    """The waiting rooms of a door."""

    def __init__(
        self,
        wakes: Callable[[], Mapping[str, Limits]],
        report: ReportDemand = lambda queued: None,
        count: Callable[[str, str], None] = lambda application, outcome: None,
    ) -> None:
        """`wakes`: the settings of each application that may sleep, as they are now. `count` takes
        the application and one of OUTCOMES."""
        self._wakes = wakes
        self._report = report
        self._count = count
        self._rooms: dict[str, WaitingRoom] = {}
        self._doors: dict[tuple[str, int], asyncio.Future[None]] = {}

    @property
    def queued(self) -> dict[str, int]:
        """Application -> requests that wait; of those that may sleep, 0 included."""
        return {name: len(self._rooms.get(name, ())) for name in self._wakes()}

    async def wait(self, application: str) -> bool:
        """Return True once the application has a replica; False at once if it is not one that
        sleeps. Raises UnavailableError when too many wait, or when this one has waited too long."""
        wake = self._wakes().get(application)
        if wake is None:
            return False
        room = self._rooms.setdefault(application, WaitingRoom())
        now = time.monotonic()
        ticket = room.enter(now, wake.queue)
        if ticket is None:
            self._count(application, "full")
            raise UnavailableError(
                f"{application!r} has no replica yet, and {len(room)} requests wait for it "
                "already. Come back when it has started.",
                retry_after=room.retry_after(now, wake.deadline_s),
            )
        opened = self._doors[application, ticket] = asyncio.get_running_loop().create_future()
        self._report(self.queued)
        outcome = "gone"
        try:
            async with asyncio.timeout(wake.deadline_s):
                await opened
            outcome = "ready"
            return True
        except TimeoutError:
            outcome = "late"
            raise UnavailableError(
                f"No replica of {application!r} has started within {wake.deadline_s:g} s.",
                retry_after=room.retry_after(time.monotonic(), wake.deadline_s),
            ) from None
        finally:
            del self._doors[application, ticket]
            self._count(application, outcome)
            if room.leave(ticket):
                self._report(self.queued)

    def on_up(self, application: str) -> None:
        """A replica of `application` is ready: all that wait go there."""
        room = self._rooms.get(application)
        tickets = room.open(time.monotonic()) if room is not None else []
        for ticket in tickets:
            opened = self._doors[application, ticket]
            if not opened.done():
                opened.set_result(None)
        if tickets:
            self._report(self.queued)


def attach(door: Door, report: ReportDemand = lambda queued: None) -> None:
    """Let requests for models with `wake` wait at `door`, which was made with FAMILIES."""

    def wakes() -> dict[str, Wake]:
        routes = door.config.models.items()
        return {door.policy.main_application(name): it.wake for name, it in routes if it.wake}

    def model_of(application: str) -> str:
        for name in door.config.models:
            if door.policy.main_application(name) == application:
                return name
        return application

    gauge = door.metrics.family("door_queued_requests")
    ended = door.metrics.family("door_unqueued_requests_total")
    waking = Waking(
        wakes,
        report,
        lambda application, outcome: ended.labels(model_of(application), outcome).inc(),
    )

    def show() -> None:
        for application, count in waking.queued.items():
            gauge.labels(model_of(application)).set(count)

    door.metrics.before.append(show)
    door.fleet.on_up.append(lambda application, replica: waking.on_up(application))
    door.wait_for_replica = lambda application, asked: waking.wait(application)
