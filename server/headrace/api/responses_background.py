"""Responses that are made in the background, and the events that are kept of them.

A response belongs to the process that took it, which holds the record's lease while it lives. When
that process ends, the lease runs out and whoever reads the record next finds the response failed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from headrace.api.responses_answer import ENDED, ResponseAnswer, ending_event
from headrace.api.responses_items import Item
from headrace.api.responses_output import event_bytes
from headrace.api.responses_store import RESPONSE, KeptResponses, with_response
from headrace.api.store import LeaseLostError, Part, Record
from headrace.errors import HeadraceError, NotFoundError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 15.0
TICK_SECONDS = 0.2
"""How long news may take to get into the store."""
POLL_SECONDS = 0.1
_POLLS_PER_CHECK = 50
_EVENT = "event"
_PAGE = 1000


class BackgroundJob:
    """Makes one response. `emit` numbers and keeps its events, if it is given to the answer."""

    def __init__(self, kept: KeptResponses) -> None:
        self._kept = kept
        self._owner = secrets.token_hex(16)
        self._answer: ResponseAnswer
        self._events: list[bytes] = []
        self._flushed = 0
        self._ended = False
        self._news = asyncio.Event()
        self._told = ""
        """The status that the record has."""

    def emit(self, kind: str, **fields: Any) -> None:
        self._events.append(event_bytes(kind, len(self._events), fields))
        self._news.set()

    async def accept(self, answer: ResponseAnswer, items: list[Item], *, streamed: bool) -> None:
        """Make the record, and take its lease."""
        self._answer = answer
        answer.begin()
        self._told = answer.object["status"]
        await self._kept.put(answer.object, items, streamed=streamed)
        await self._kept.store.lease(RESPONSE, answer.id, self._owner, LEASE_SECONDS)

    async def run(self) -> None:
        """Until the record says how it ended. Cancelled, it leaves the record as it is."""
        answer, store = self._answer, self._kept.store
        task = asyncio.current_task()
        assert task is not None
        tending = asyncio.create_task(self._tend(task))
        ended: dict[str, Any] | None = None
        try:
            ended = await self._work()
        finally:
            answer.generation.close()
            tending.cancel()
            await asyncio.gather(tending, return_exceptions=True)
            try:
                if (kept := await self._settle(ended)) is not None:
                    kind, fields = ending_event(kept)
                    self.emit(kind, **fields)
            finally:
                self._ended = True
                self._news.set()
            await store.release(RESPONSE, answer.id, self._owner)

    async def _work(self) -> dict[str, Any]:
        try:
            return await self._answer.run()
        except HeadraceError as error:
            return self._answer.failed(error)
        except Exception as error:
            logger.exception("Response %s: a bug", self._answer.id)
            return self._answer.failed(error)

    async def _settle(self, ended: dict[str, Any] | None) -> dict[str, Any] | None:
        """The object that is kept in the end: it may have been cancelled. None if it is gone."""
        try:
            await self._flush()
            if ended is None:
                record = await self._kept.store.get(RESPONSE, self._answer.id)
            else:
                record = await self._change(ended)
        except LeaseLostError:
            record = await self._kept.store.get(RESPONSE, self._answer.id)
        return record.value["response"] if record is not None else None

    async def _change(self, response: dict[str, Any]) -> Record | None:
        def change(record: Record) -> Record:
            over = record.value["response"]["status"] in ENDED
            return record if over else with_response(record, response)

        store = self._kept.store
        return await store.update(RESPONSE, self._answer.id, change, owner=self._owner)

    async def _tend(self, work: asyncio.Task[None]) -> None:
        """Keep lease and events, and end `work` when the response is cancelled or deleted."""
        store, response_id = self._kept.store, self._answer.id
        extended = time.monotonic()
        try:
            while True:
                await asyncio.sleep(TICK_SECONDS)
                await self._flush()
                if (status := self._answer.object["status"]) != self._told:
                    self._told = status
                    await self._change(self._answer.object)
                if time.monotonic() - extended < LEASE_SECONDS / 3:
                    continue
                extended = time.monotonic()
                if not await store.lease(RESPONSE, response_id, self._owner, LEASE_SECONDS):
                    break
                record = await store.get(RESPONSE, response_id)
                if record is None or record.value["response"]["status"] in ENDED:
                    break
        except LeaseLostError:
            pass
        except Exception:
            logger.exception("Response %s cannot be kept", response_id)
        work.cancel()

    async def _flush(self) -> None:
        new = self._events[self._flushed :]
        if not new:
            return
        parts = [Part(number, _EVENT, event) for number, event in enumerate(new, self._flushed)]
        await self._kept.store.add_parts(RESPONSE, self._answer.id, parts, owner=self._owner)
        self._flushed += len(new)

    async def events(self) -> AsyncIterator[bytes]:
        """All events, as they come."""
        position = 0
        while True:
            while position < len(self._events):
                yield self._events[position]
                position += 1
            if self._ended:
                return
            self._news.clear()
            await self._news.wait()


async def kept_events(kept: KeptResponses, response_id: str, after: int) -> AsyncIterator[bytes]:
    """The events of a response with numbers above `after`, to its end, whoever makes it. A comment
    comes first, for the next event may be far."""
    yield b": goes on\n\n"
    store = kept.store
    polls = 0
    while True:
        try:
            record = (
                await kept.get(response_id)
                if polls % _POLLS_PER_CHECK == 0
                else (await store.get(RESPONSE, response_id))
            )
        except NotFoundError:
            return
        if record is None:
            return
        response = record.value["response"]
        parts = await store.parts(RESPONSE, response_id, tag=_EVENT, after=after, limit=_PAGE)
        if parts:
            yield b"".join(part.value for part in parts)
            after = parts[-1].number
        if len(parts) == _PAGE:
            continue
        if response["status"] in ENDED:
            numbers = (await store.part_numbers(RESPONSE, response_id)).get(_EVENT, [])
            last = max(numbers, default=-1) + 1
            if last > after:
                kind, fields = ending_event(response)
                yield event_bytes(kind, last, fields)
            return
        polls += 1
        await asyncio.sleep(POLL_SECONDS)
