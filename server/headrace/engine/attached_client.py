"""EngineClient of an API process that shares an engine: it attaches to one that its parent keeps.

When the engine dies, the parent starts another behind the same address; requests are replayed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from headrace.engine.client import EngineState, EngineStats, QueueLimits, RequestRecord
from headrace.engine.queue_board import QueueBoard
from headrace.engine.socket_client import Connection, SocketEngineClient
from headrace.errors import HeadraceError, UnavailableError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.05


class AttachedEngineClient(SocketEngineClient):
    """Implements client.EngineClient with an engine that another process starts and restarts."""

    def __init__(
        self,
        path: Path,
        *,
        limits: QueueLimits,
        board: QueueBoard,
        on_record: Callable[[RequestRecord], None],
    ) -> None:
        """`path`: of the socket at which engines accept."""
        super().__init__(limits, on_record=on_record, board=board)
        self._path = str(path)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._stay_attached(), name="engine-client")

    def lost(self, error: HeadraceError) -> None:
        """There will be no engine any more; every request fails with `error`."""
        self._fail(error)

    async def close(self) -> None:
        """Ends live requests with an error. The engine stays, for others."""
        self._closing = True
        self._live.fail_all(UnavailableError("The server is shutting down."))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._ready is not None and not self._ready.done():
            self._ready.cancel()

    async def _stay_attached(self) -> None:
        """One connection after another; each is accepted when there is an engine to accept it."""
        loop = asyncio.get_running_loop()
        while True:
            connection = Connection(self._handle, loop.create_future())
            try:
                self._transport, _ = await loop.create_unix_connection(
                    lambda made=connection: made,  # type: ignore[misc]
                    self._path,
                )
            except OSError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._last_seen = time.monotonic()
            try:
                await connection.ended
            finally:
                self._transport.close()
                self._disconnected()
            if self.state is not EngineState.DEAD:
                self.state = EngineState.RESTARTING if self.info else EngineState.LOADING
                self._observe(EngineStats())
                logger.warning(
                    "The engine is gone; %d requests will be replayed on the next", len(self._live)
                )
