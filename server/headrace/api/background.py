"""Work that goes on after its request has been answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)

END_SECONDS = 5.0
"""How long work may take to end when the server does."""


class BackgroundWork:
    """Named tasks. They hold on to nothing of the request that started them."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks[name] = task
        task.add_done_callback(self._ended)

    def cancel(self, name: str) -> None:
        """Does nothing where no such work is done in this process."""
        if (task := self._tasks.get(name)) is not None:
            task.cancel()

    async def close(self) -> None:
        """Wait for what is about to end by itself, cancel the rest."""
        tasks = set(self._tasks.values())
        if tasks:
            _, unfinished = await asyncio.wait(tasks, timeout=END_SECONDS)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task.get_name()]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s: a bug", task.get_name(), exc_info=error)
