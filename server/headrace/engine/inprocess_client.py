"""EngineClient with the engine in this process, for `LLM` and tests. A step blocks its loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from headrace.engine.client import (
    EngineState,
    EngineStats,
    ModelInfo,
    QueueLimits,
    RequestRecord,
    Workload,
)
from headrace.engine.live_requests import LiveRequests, LiveStream
from headrace.errors import EngineError, UnavailableError
from headrace.sampling_params import GenerateRequest

if TYPE_CHECKING:
    from headrace.engine.engine import AnyEngine

NO_LIMITS = QueueLimits(max_queued_requests=1 << 31, max_queued_tokens=1 << 62)


class InProcessEngineClient:
    """Implements client.EngineClient over an Engine that it steps while there is work."""

    def __init__(
        self,
        build: Callable[[], AnyEngine],
        *,
        limits: QueueLimits = NO_LIMITS,
        on_record: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        self.state = EngineState.LOADING
        self.info: ModelInfo | None = None
        self.stats = EngineStats()
        self.restarts = 0
        self.tokenizer_json = ""
        """How tokens are spelled: what requests with grammars need. Set it before they come."""
        self._build = build
        self._engine: AnyEngine | None = None
        self._live = LiveRequests(limits, on_abort=self._abort, on_end=on_record)
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._last_seen = time.monotonic()

    @property
    def workload(self) -> Workload:
        return self._live.queue.workload

    @property
    def last_seen_age(self) -> float:
        return time.monotonic() - self._last_seen

    async def start(self) -> None:
        self._engine = self._build()
        self.info = self._engine.info
        self.state = EngineState.READY
        self._task = asyncio.create_task(self._run(self._engine), name="engine")

    async def wait_ready(self) -> ModelInfo:
        assert self.info is not None, "start() comes first"
        return self.info

    def submit(self, request: GenerateRequest) -> LiveStream:
        if self._engine is None or self.info is None or self.state is not EngineState.READY:
            raise UnavailableError("The engine is not running.")
        handle, stream = self._live.admit(request, self.info)
        if request.grammar:
            self._engine.use_tokenizer(self.tokenizer_json)
        self._engine.add(stream.request, handle)
        self._work.set()
        return stream

    async def reset_prefix_cache(self) -> bool:
        return self._engine is not None and self._engine.reset_prefix_cache()

    async def close(self) -> None:
        self.state = EngineState.DEAD
        self._live.fail_all(UnavailableError("The engine was closed."))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._engine = None

    def _abort(self, request_id: str) -> None:
        if self._engine is not None:
            self._engine.abort(request_id)
            self._work.set()

    async def _run(self, engine: AnyEngine) -> None:
        try:
            while True:
                while engine.idle():
                    await asyncio.sleep(0)  # lets requests in
                if not engine.has_work:
                    self._work.clear()
                    await self._work.wait()
                outputs = engine.step()
                self._last_seen = time.monotonic()
                if outputs.stats is not None:
                    self._live.queue.speed.observe(self.stats, outputs.stats)
                    self.stats = outputs.stats
                self._live.deliver(outputs)
                await asyncio.sleep(0)  # lets readers take what was delivered
        except Exception as error:
            self.state = EngineState.DEAD
            self._live.fail_all(EngineError(f"The engine failed: {error}"))
            raise
