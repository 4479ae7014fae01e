"""The heartbeat: schedule, execute, update. Token ids in, token ids out."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import psutil

from headrace.engine.batch import ScheduledBatch, StepResult
from headrace.engine.client import EngineStats, ModelInfo, RequestOutput
from headrace.engine.scheduler import Scheduler
from headrace.engine.wire import StepOutputs
from headrace.sampling_params import GenerateRequest

NOTHING = StepResult(token_ids=np.empty(0, np.int64))
RESIDENT_BYTES_PERIOD = 1.0  # seconds; reading it costs more than scheduling a step


class Runner(Protocol):
    def execute(self, batch: ScheduledBatch) -> StepResult: ...


class Engine:
    """Requests in, `StepOutputs` out. Not thread-safe: one owner calls everything."""

    def __init__(self, scheduler: Scheduler, runner: Runner, info: ModelInfo) -> None:
        self.info = info
        self._scheduler = scheduler
        self._runner = runner
        self._aborted: list[str] = []
        self._steps = 0
        self._step_tokens = 0
        self._process = psutil.Process()
        self._resident_bytes = 0
        self._resident_bytes_time = 0.0

    def add(self, request: GenerateRequest, handle: int) -> None:
        self._scheduler.add(request, handle)

    def abort(self, request_id: str) -> None:
        """Takes effect, blocks and all, before the next step's work is chosen."""
        self._aborted.append(request_id)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._aborted)

    def step(self) -> StepOutputs:
        """Compute one batch. What ended, and each new token, is in the result."""
        aborted = self._take_aborts()
        batch = self._scheduler.schedule()
        result = self._runner.execute(batch) if batch else NOTHING
        outputs = self._scheduler.update(batch, result)
        outputs.details.extend(aborted)
        self._steps += 1
        self._step_tokens = batch.num_tokens
        outputs.stats = self.stats()
        return outputs

    def _take_aborts(self) -> list[RequestOutput]:
        ended = [self._scheduler.abort(request_id) for request_id in self._aborted]
        self._aborted.clear()
        return [output for output in ended if output is not None]

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False, and no change, while requests run."""
        if self._scheduler.num_running:
            return False
        self._scheduler.kv_cache.reset_prefix_cache()
        return True

    def stats(self) -> EngineStats:
        scheduler, kv_cache = self._scheduler, self._scheduler.kv_cache
        now = time.monotonic()
        if now - self._resident_bytes_time > RESIDENT_BYTES_PERIOD:
            self._resident_bytes = self._process.memory_info().rss
            self._resident_bytes_time = now
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_blocks_used=kv_cache.num_used_blocks,
            kv_blocks_total=kv_cache.pool.num_blocks,
            prefix_query_tokens=kv_cache.query_tokens,
            prefix_hit_tokens=kv_cache.hit_tokens,
            preemptions=scheduler.num_preemptions,
            steps=self._steps,
            step_tokens=self._step_tokens,
            last_step_time=now,
            resident_bytes=self._resident_bytes,
        )

    def check_invariants(self) -> None:
        self._scheduler.check_invariants()
