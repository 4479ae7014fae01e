"""One request on its way: which replica, what it is sent, and what happens when that fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from headrace.errors import EngineError, HeadraceError, UnavailableError
from headrace.route.asked import Asked, Kind, with_model
from headrace.route.choose import RouteRequest
from headrace.route.events import Journal, with_resumption
from headrace.route.fleet import Fleet, Replica
from headrace.route.guide import Guide, Whereabouts
from headrace.route.http_text import JOURNAL, Headers, relayed, request_head
from headrace.route.metrics import DoorMetrics
from headrace.route.relay import BUSY, Answer, Outcome
from headrace.route.upstream import Connection

logger = logging.getLogger(__name__)

MAX_LOSSES = 8
"""Replicas that may die of one request: it could be what kills them."""
RESUME_SECONDS = 30.0
"""How long the rest of a stream waits for a replica that can go on with it."""
RESUME_PAUSE = 0.25
_OURS = frozenset((JOURNAL, b"content-length", b"expect", b"x-request-id"))


class Upload(Protocol):
    """A body that is relayed as it comes."""

    length: int | None

    async def piece(self) -> bytes:
        """Empty at the end."""


class Around(Protocol):
    """What requests have in common: the door."""

    fleet: Fleet
    guide: Guide
    whereabouts: Whereabouts
    metrics: DoorMetrics
    wait_for_replica: Callable[[str, Asked], Awaitable[bool]]


class Pending:
    """One request in the counts of one replica."""

    def __init__(self, replica: Replica, request: RouteRequest) -> None:
        self._view, self._request = replica.view, request
        self._answered = False
        self._view.sent(request)

    def answered(self) -> None:
        if not self._answered:
            self._answered = True
            self._view.answered(self._request)

    def end(self) -> None:
        self.answered()
        self._view.ended()


class Dispatch:
    """One request's tries. `run` ends when the client has its answer; cancelled, the replica is
    told by the end of its connection."""

    def __init__(
        self,
        door: Around,
        asked: Asked,
        answer: Answer,
        applications: Sequence[str],
        upload: Upload | None = None,
    ) -> None:
        """`applications`: the one to ask, and those to ask where it has nobody."""
        self._door, self._asked, self._answer = door, asked, answer
        self._applications = applications
        self._place = 0
        """Among them, of the one that is asked."""
        self._upload = upload
        self._tried: set[Replica] = set()
        """In this round: those that refused, or died."""
        self._losses = 0
        self._wait_until = 0.0
        """For the rest of a stream."""
        self._connection: Connection | None = None
        self._request = door.guide.request(applications[0], asked)

    async def run(self) -> None:
        """Raises HeadraceError if there is no answer but that."""
        try:
            while not await self._one_round():
                pass
        except HeadraceError as error:
            if self._answer.held is not None and not self._answer.status:
                self._answer.send(self._answer.held)  # what a replica said tells more
                return
            raise error
        finally:
            if self._connection is not None:
                self._connection.abort()

    @property
    def _application(self) -> str:
        return self._applications[self._place]

    def _turn_to(self, place: int) -> None:
        self._place = place
        self._request = self._door.guide.request(self._application, self._asked)

    async def _one_round(self) -> bool:
        """Try one replica; whether that was the last."""
        replica = self._pick()
        if replica is None:
            await self._none_left()
            return False
        outcome = await self._try(replica)
        if outcome is Outcome.DONE:
            return True
        if outcome is Outcome.HELD:
            return self._judge(replica)
        if outcome is Outcome.REFUSED:
            self._tried.add(replica)
            return False
        return self._after_loss()

    def _pick(self) -> Replica | None:
        asked, fleet = self._asked, self._door.fleet
        if thing := asked.thing:
            known = self._door.whereabouts.get(thing)
            if known is not None and known.usable and known not in self._tried:
                return known
        if asked.kind in (Kind.KEPT, Kind.BY_ID):
            everywhere = asked.kind is Kind.BY_ID  # whichever model made it
            return fleet.keeper(self._application, self._tried, everywhere=everywhere)
        return fleet.pick(self._application, self._request, self._tried)

    async def _none_left(self) -> None:
        """No replica that was not tried. Returns if there may be one now."""
        answer = self._answer
        if self._place + 1 < len(self._applications):
            self._turn_to(self._place + 1)
            return
        if answer.status:  # the rest of a stream
            now = time.monotonic()
            self._wait_until = self._wait_until or now + RESUME_SECONDS
            if now > self._wait_until:
                raise EngineError(
                    f"The replica that answered is gone, and none went on within "
                    f"{RESUME_SECONDS:g} s. Ask again."
                )
            await asyncio.sleep(RESUME_PAUSE)
            self._tried.clear()
            self._turn_to(0)
            return
        if answer.held is not None:
            raise UnavailableError("All replicas refuse.")  # `run` gives what the last one said
        waits = not self._tried or not self._door.fleet.usable(self._application)
        if waits and await self._door.wait_for_replica(self._application, self._asked):
            self._tried.clear()
            return
        raise UnavailableError(
            f"No replica of {self._application!r} is ready; come back in a moment."
        )

    # --- one try ------------------------------------------------------------------------------

    async def _try(self, replica: Replica) -> Outcome:
        """Raises nothing but what ends the whole request."""
        asked, answer = self._asked, self._answer
        guide = self._door.guide
        guide.sent(self._application, asked, replica)
        pending = Pending(replica, self._request)
        try:
            for fresh in (not asked.repeatable, True):
                try:
                    connection = await replica.pool.connect(fresh=fresh)
                except OSError as error:
                    replica.failed(error.strerror or str(error))
                    self._tried.add(replica)
                    self._door.metrics.retries.labels("refused").inc()
                    return Outcome.REFUSED
                was_used, events = connection.used, answer.journal and answer.journal.events
                outcome = await self._talk(replica, connection, pending)
                unseen = (answer.journal and answer.journal.events) == events
                if not (outcome is Outcome.LOST and was_used and unseen and not fresh):
                    break  # else it may just have closed a connection that rested
            if outcome is Outcome.LOST:
                self._tried.add(replica)
                replica.failed("a connection broke")
            elif outcome is not Outcome.REFUSED:
                told = answer.tail
                guide.answered(self._application, asked, self._request, replica, told)
            return outcome
        finally:
            pending.end()

    async def _talk(self, replica: Replica, connection: Connection, pending: Pending) -> Outcome:
        asked, answer, upload = self._asked, self._answer, self._upload
        if not answer.status:
            answer.journal = None
        try:
            body = self._body(replica)
        except ValueError:
            connection.abort()
            raise EngineError("The journal of the replica that died cannot be read.") from None
        length = upload.length if upload is not None else len(body)
        head = request_head(asked.method, asked.url, self._headers(), length)
        self._connection = connection
        answer.begin_try(connection, pending.answered)
        connection.single_use = upload is not None
        connection.send(head + body, answer, is_head=asked.method == b"HEAD")
        if upload is not None:
            await self._send_upload(upload, connection, chunked=length is None)
        outcome = await answer.outcome
        self._connection = None
        if outcome is Outcome.REFUSED:
            connection.abort()
        return outcome

    def _headers(self) -> Headers:
        asked = self._asked
        headers = relayed(asked.headers, without=_OURS)
        headers.append((b"x-request-id", asked.request_id.encode("latin-1")))
        if asked.streams:
            headers.append((JOURNAL, b"1"))
        return headers

    def _body(self, replica: Replica) -> bytes:
        """What the client sent; under the replica's name of the model, from where it stopped."""
        asked, journal = self._asked, self._answer.journal
        body = asked.body
        names = replica.names
        if isinstance(asked.model, str) and asked.model and names and asked.model not in names:
            body = with_model(body, names[0])
        if self._answer.status and isinstance(journal, Journal):
            body = with_resumption(body, journal.resumption())
        return body

    async def _send_upload(self, upload: Upload, connection: Connection, *, chunked: bool) -> None:
        answer = self._answer
        while not answer.outcome.done() and connection.usable:
            data = await upload.piece()
            if chunked:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if data:
                connection.write(data)
            if not data or data == b"0\r\n\r\n":
                return
            waiting: asyncio.Future[None] = asyncio.ensure_future(answer.writable())
            events: list[asyncio.Future[Any]] = [waiting, answer.outcome]
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        self._asked.keep_alive = False  # the rest of the body is not read

    # --- what a try means -----------------------------------------------------------------------

    def _judge(self, replica: Replica) -> bool:
        """A whole answer: give it to the client, or try another replica."""
        held = self._answer.held
        assert held is not None
        missing = held.status == 404 and self._asked.searches
        if (held.status in BUSY or missing) and self._upload is None:
            self._tried.add(replica)
            if not missing:
                self._door.metrics.retries.labels(str(held.status)).inc()
            return False
        if held.status < 300:
            self._door.whereabouts.learn(self._asked, held.body, replica)
        self._answer.send(held)
        return True

    def _after_loss(self) -> bool:
        """The replica died; whether that is the end."""
        asked, answer = self._asked, self._answer
        self._losses += 1
        if self._losses > MAX_LOSSES:
            raise EngineError(f"{MAX_LOSSES} replicas died while they worked on this request.")
        if not answer.status:
            if not asked.repeatable:
                raise EngineError(
                    "The replica died while it worked on this request, which is not sent again: "
                    "it may have been done."
                )
            self._door.metrics.replays.labels("again").inc()
            return False
        journal = answer.journal
        if journal is not None and journal.complete:
            answer.end_complete()
            return True
        if not isinstance(journal, Journal):
            self._door.metrics.replays.labels("lost").inc()
            raise EngineError("The replica died in the middle of this answer. Ask again.")
        self._door.metrics.replays.labels("resumed").inc()
        logger.info("%d events of a stream were sent; another replica goes on", journal.events)
        return False
