"""Where the files of a model are: on this machine, or downloaded first."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from headrace.config import EngineConfig
from headrace.loading.resolver import resolve_model

T = TypeVar("T")


async def find_model(config: EngineConfig) -> Path:
    """Of the model's files, downloaded if they are on a hub. Raises CheckpointError."""
    revision = config.model_options.revision
    return await _in_daemon_thread(lambda: resolve_model(config.model, revision=revision))


async def _in_daemon_thread(function: Callable[[], T]) -> T:
    """Run what may take very long (a download) where it cannot keep the process from ending."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def deliver(value: T | None, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]  # T may itself be optional

    def work() -> None:
        value, error = None, None
        try:
            value = function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, value, error)

    threading.Thread(target=work, name="model-files", daemon=True).start()
    return await result
