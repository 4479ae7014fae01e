"""The heartbeat: schedule, launch, update. Token ids in, token ids out."""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

from headrace.engine.batch import (
    NO_RESULT,
    NO_WORK,
    FinishedStep,
    PendingStep,
    ScheduledBatch,
)
from headrace.engine.client import (
    EngineStats,
    FinishReason,
    ModelInfo,
    RequestOutput,
    StepOutputs,
)
from headrace.engine.constrained_rows import start_masks
from headrace.engine.grammar import GrammarCompiler
from headrace.engine.resident_bytes import ResidentBytes
from headrace.engine.scheduler import Scheduler
from headrace.sampling_params import GenerateRequest

COMPILE_WAIT = 0.005  # seconds that a step without other work waits for grammars


class Runner(Protocol):
    overlaps: bool
    """Whether a step may be launched before the result of the one before it is known."""

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Start a step. Steps run in the order of their launches, on one stream.

        RunningRequests are read now only. Inputs that are UNKNOWN_TOKEN stand for what the row
        sampled in the step before; if that was NO_TOKEN any token will do, as for a row that
        stopped: what the row computes now is dropped.
        """
        ...

    def idle(self) -> bool:
        """Do a few milliseconds of what waits for idle time; False if there is nothing."""
        ...


class AnyEngine(Protocol):
    """What a process that owns an engine asks of it; see Engine."""

    info: ModelInfo

    def add(self, request: GenerateRequest, handle: int) -> None: ...

    def abort(self, request_id: str) -> None: ...

    @property
    def has_work(self) -> bool: ...

    def step(self) -> StepOutputs: ...

    def idle(self) -> bool: ...

    def reset_prefix_cache(self) -> bool: ...

    def use_tokenizer(self, tokenizer_json: str) -> None: ...

    def stats(self) -> EngineStats: ...

    def check_invariants(self) -> None: ...


class Step(NamedTuple):
    batch: ScheduledBatch
    pending: PendingStep


IDLE = Step(NO_WORK, FinishedStep(NO_RESULT))


class Engine:
    """Requests in, `StepOutputs` out. Not thread-safe: one owner calls everything."""

    def __init__(self, scheduler: Scheduler, runner: Runner, info: ModelInfo) -> None:
        self.info = info
        self._scheduler = scheduler
        self._runner = runner
        self._grammars = GrammarCompiler(info.vocab_size, info.eos_token_ids)
        self._aborted: list[str] = []
        self._in_flight = IDLE
        self._steps = 0
        self._oom_retries = 0
        self._step_tokens = 0
        self._resident_bytes = ResidentBytes()

    def add(self, request: GenerateRequest, handle: int) -> None:
        """Queue a request, once its grammar is compiled if it has one."""
        if request.grammar:
            self._grammars.start(request, handle)
        else:
            self._scheduler.add(request, handle)

    def use_tokenizer(self, tokenizer_json: str) -> None:
        """How tokens are spelled, as a tokenizer.json: before the first request with a grammar."""
        self._grammars.use_tokenizer(tokenizer_json)

    def abort(self, request_id: str) -> None:
        """Takes effect, blocks and all, before the next step's work is chosen."""
        self._aborted.append(request_id)

    @property
    def has_work(self) -> bool:
        in_flight = self._in_flight is not IDLE
        return (
            in_flight or self._scheduler.has_work or bool(self._aborted) or len(self._grammars) > 0
        )

    def step(self) -> StepOutputs:
        """Compute one batch. What ended, and each new token, is in the result.

        With a runner that overlaps, the batch is launched, and the result is that of the batch
        before, which the device computed meanwhile.
        """
        ended = self._take_aborts()
        if len(self._grammars):
            ended += self._take_compiled()
        batch = self._scheduler.schedule()
        launched = IDLE
        if batch:
            start_masks(self._scheduler.running, batch.rows[batch.samples])
            launched = Step(batch, self._runner.launch(batch))
        done = self._collect(launched)
        result = done.pending.result()
        self._oom_retries += result.oom_retries
        outputs = self._scheduler.update(done.batch, result)
        outputs.details.extend(ended)
        if tokens := self._scheduler.num_filed_tokens:
            self._steps, self._step_tokens = self._steps + 1, tokens
        outputs.stats = self.stats()
        return outputs

    def idle(self) -> bool:
        """Prepare later steps while there is no work; False if nothing is left to prepare."""
        return not self.has_work and self._runner.idle()

    def _collect(self, launched: Step) -> Step:
        """The step to wait for now; IDLE if none is old enough."""
        if not self._runner.overlaps:
            return launched
        done, self._in_flight = self._in_flight, launched
        return done

    def _take_aborts(self) -> list[RequestOutput]:
        ended = []
        for request_id in self._aborted:
            if (source := self._grammars.cancel(request_id)) is not None:
                ended.append(self._scheduler.refuse(source, FinishReason.ABORT))
            elif (output := self._scheduler.abort(request_id)) is not None:
                ended.append(output)
        self._aborted.clear()
        return ended

    def _take_compiled(self) -> list[RequestOutput]:
        """Queue the requests whose grammars are through; the ends of those whose are refused."""
        if self._in_flight is IDLE and not self._scheduler.has_work:
            self._grammars.wait(COMPILE_WAIT)
        refused = []
        for source, handle, constraint, error in self._grammars.take():
            if constraint is None:
                refused.append(self._scheduler.refuse(source, FinishReason.REFUSED, error))
            else:
                self._scheduler.add(source, handle, constraint)
        return refused

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False, and no change, while requests run."""
        if self._scheduler.num_running:
            return False
        self._scheduler.kv_cache.reset_prefix_cache()
        return True

    def stats(self) -> EngineStats:
        scheduler, kv_cache = self._scheduler, self._scheduler.kv_cache
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting + len(self._grammars),
            kv_blocks_used=kv_cache.num_used_blocks,
            kv_blocks_total=kv_cache.pool.num_blocks,
            prefix_query_tokens=kv_cache.query_tokens,
            prefix_hit_tokens=kv_cache.hit_tokens,
            preemptions=scheduler.num_preemptions,
            oom_retries=self._oom_retries,
            steps=self._steps,
            step_tokens=self._step_tokens,
            last_step_time=time.monotonic(),
            resident_bytes=self._resident_bytes(),
        )

    def check_invariants(self) -> None:
        self._scheduler.check_invariants()
