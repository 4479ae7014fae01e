"""Finds batches that have work left, and does it: one at a time, under a lease.

Any number of processes may share a store, each with a runner: a batch belongs to the one that holds
its lease, and goes to another when that one dies or drains.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from starlette.types import ASGIApp

from headrace.api.batch_job import BatchJob
from headrace.api.batches import BATCH, OPEN
from headrace.api.services import Services
from headrace.api.store import LeaseLostError, Record, Store
from headrace.errors import ModelNotFoundError, UnavailableError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 15.0
POLL_SECONDS = 5.0
SWEEP_SECONDS = 600.0
MAX_ATTEMPTS = 3
"""Times that a batch may end this process's work on it with a bug before it fails."""


class BatchRunner:
    """`start` it when the models are ready; `stop` leaves unfinished batches to others."""

    def __init__(
        self,
        app: ASGIApp,
        services: Services,
        *,
        lease_seconds: float = LEASE_SECONDS,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._app = app
        self._services = services
        self._lease_seconds = lease_seconds
        self._poll_seconds = poll_seconds
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(8)}"
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._held: dict[str, asyncio.Task[None]] = {}
        """Batch id -> what works on it."""
        self._working: str | None = None
        """The one batch whose lines are answered; others are only ended."""
        self._attempts: dict[str, int] = {}

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Abort running lines and give leases back. Idempotent; `close` waits for it."""
        # Once: a second cancellation would end the wait for what the first one stops.
        if self._task is not None and not self._stopped:
            self._stopped = True
            self._task.cancel()

    async def close(self) -> None:
        self.stop()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        swept = 0.0
        news = self._services.batch_news
        store = self._services.kept()
        try:
            while True:
                news.clear()
                try:
                    if time.monotonic() - swept > SWEEP_SECONDS:
                        await store.sweep()
                        swept = time.monotonic()
                    await self._look(store)
                except Exception:
                    logger.exception("Batches cannot be looked through; trying again soon")
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_seconds):
                        await news.wait()
        finally:
            for task in self._held.values():
                task.cancel()
            await asyncio.gather(*self._held.values(), return_exceptions=True)

    async def _look(self, store: Store) -> None:
        async for batch in _open_batches(store):
            if batch.id in self._held:
                if _early_end(batch) and batch.id == self._working:
                    self._working = None
                    self._held[batch.id].cancel()  # once that is over it is taken to be ended
                continue
            works = _early_end(batch) is None
            if works and (self._working is not None or not self._serves(batch)):
                continue
            if not await store.lease(BATCH, batch.id, self._owner, self._lease_seconds):
                continue
            if works:
                self._working = batch.id
            task = asyncio.create_task(self._hold(store, batch.id), name=batch.id)
            self._held[batch.id] = task
            task.add_done_callback(self._let_go)

    def _let_go(self, task: asyncio.Task[None]) -> None:
        batch_id = task.get_name()
        del self._held[batch_id]
        if not task.cancelled() and (error := task.exception()):
            logger.error("Batch %s: its lease cannot be kept", batch_id, exc_info=error)
        if self._working == batch_id:
            self._working = None
        self._services.batch_news.set()

    def _serves(self, batch: Record) -> bool:
        try:
            return self._services.models.find(batch.value["model"]).ready
        except (ModelNotFoundError, UnavailableError):
            return False

    async def _hold(self, store: Store, batch_id: str) -> None:
        """Work on a batch that is leased, and keep the lease while that lasts."""
        work = asyncio.create_task(self._work(store, batch_id))
        try:
            while not (await asyncio.wait({work}, timeout=self._lease_seconds / 3))[0]:
                if not await store.lease(BATCH, batch_id, self._owner, self._lease_seconds):
                    break
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await store.release(BATCH, batch_id, self._owner)

    async def _work(self, store: Store, batch_id: str) -> None:
        # Read again under the lease: another process may have finished it just before.
        batch = await store.get(BATCH, batch_id)
        if batch is None or batch.tag != OPEN:
            return
        job = BatchJob(self._app, self._services, batch, self._owner)
        try:
            if ending := _early_end(batch):
                await job.end(ending)
            else:
                logger.info("Batch %s: at work", batch_id)
                await job.run()
            logger.info("Batch %s: done", batch_id)
        except LeaseLostError:
            logger.warning("Batch %s: another process goes on with it", batch_id)
        except Exception:
            attempts = self._attempts[batch_id] = self._attempts.get(batch_id, 0) + 1
            logger.exception("Batch %s: attempt %d failed", batch_id, attempts)
            if attempts < MAX_ATTEMPTS:
                await asyncio.sleep(self._poll_seconds)
                return
            message = "The server failed on this batch; its log has the reason."
            with suppress(LeaseLostError):
                await job.fail([{"code": "internal_error", "message": message}])


def _early_end(batch: Record) -> str | None:
    """The status that a batch is to end with before all of its lines are answered."""
    if batch.value["status"] == "cancelling":
        return "cancelled"
    if batch.value["status"] != "finalizing" and batch.value["expires_at"] <= time.time():
        return "expired"
    return None


async def _open_batches(store: Store) -> AsyncIterator[Record]:
    """The oldest first."""
    after = None
    while True:
        page = await store.page(BATCH, limit=100, after=after, newest_first=False, tag=OPEN)
        for batch in page.records:
            yield batch
        if not page.has_more:
            return
        after = page.records[-1].id
