"""How many replicas a model needs, from what its replicas report and what its users were promised.

`decide` is a pure function of numbers: tests, the simulator and Ray Serve call the same one. It
sizes the fleet by the load itself, not by how wrong the present size is, so replicas that are
ordered and not yet there are never ordered twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

SMOOTHING_S = 10.0
"""Time constant of the load's moving averages."""
UP_TOLERANCE, DOWN_MARGIN = 0.05, 0.1
"""A fleet grows when it is too small by the one share, and shrinks when it stays large enough by
the other: between them nothing happens."""
TAIL = 3.0
"""The 95th percentile of an exponential waiting time, as a multiple of its mean."""
MIN_UTILIZATION = 0.3
"""A TTFT that hardly leaves time for its own prefill must not order an endless fleet."""
FULL = 0.9
"""The share of KV blocks or sequences in use from which requests wait for others to end."""
MAX_GROWTH = 4
"""Times the replicas that are ready: one wrong number must not fill the cluster."""
MANY = 1e6
"""Replicas: a speed of nearly nothing asks for no more."""
MAX_AHEAD = 0.25
"""Of the present need: as much growth is foreseen at most."""
STEADY_GROWTH = 0.8
"""Share of the variance that a straight line must explain to be a trend. A single step reaches 3/4
at most: it is seen, not foreseen."""
REMEMBERED = 0.995
"""What a point in the fit of step times keeps of its weight when the next one comes."""
IDENTIFIED = 0.1
"""The least relative spread of batch sizes from which the cost of one more sequence is known."""
REACHABLE = 1.5
"""Times the step of an empty batch: a shorter TPOT cannot be had by more replicas."""


class Targets(BaseModel):
    """What users were promised, and what replicas are like: the `policy_kwargs`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_s: float = Field(default=2.0, gt=0, description="Time to first token, of 19 in 20.")
    tpot_s: float = Field(default=0.1, gt=0, description="Time per output token.")
    headroom: float = Field(
        default=0.2, ge=0, lt=1, description="Share of the measured capacity that is kept free."
    )
    startup_s: float = Field(
        default=30.0, ge=0, description="From the order of a replica to its first request."
    )
    downscale_delay_s: float = Field(
        default=300.0, ge=0, description="The fleet shrinks to what it needed at most meanwhile."
    )
    idle_s: float = Field(
        default=600.0, ge=0, description="Without a request, until min_replicas: 0 is reached."
    )
    stale_s: float = Field(
        default=30.0, gt=0, description="An older report is none. Replicas send one every 10 s."
    )


@dataclass(frozen=True, kw_only=True)
class ReplicaStats:
    """The load of one replica, as it reported it. Zero is unknown in all rates and totals."""

    age_s: float = 0.0
    """Since the report."""
    running: float = 0.0
    queued: float = 0.0
    queued_tokens: float = 0.0
    """Of prompts that wait."""
    kv_used_blocks: float = 0.0
    kv_total_blocks: float = 0.0
    max_num_seqs: float = 0.0
    prefill_tokens_per_s: float = 0.0
    """The speed of steps with a prefill."""
    decode_step_s: float = 0.0
    """The length of a step without one."""
    arriving_tokens_per_s: float = 0.0
    """Prompt tokens to compute that came to this replica."""
    arriving_requests_per_s: float = 0.0
    generated_tokens_per_s: float = 0.0

    @property
    def is_full(self) -> bool:
        """Whether requests wait for others to end, and not for their own prefill."""
        seqs, blocks = self.max_num_seqs, self.kv_total_blocks
        return bool(self.queued) and (
            (seqs > 0 and self.running >= FULL * seqs)
            or (blocks > 0 and self.kv_used_blocks >= FULL * blocks)
        )


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The replicas there are, and those there may be."""

    ready: int
    target: int
    """Ordered: those that start or stop are not among the ready ones yet, or no more."""
    min_replicas: int
    max_replicas: int
    waiting: int = 0
    """Requests that wait in front, because there is no replica."""


class StepTimes(NamedTuple):
    """A decode step's time as a line over the batch: decayed sums of a least-squares fit."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def with_point(self, running: float, step_s: float) -> StepTimes:
        point = (1.0, running, step_s, running * running, running * step_s)
        return StepTimes(*(REMEMBERED * old + new for old, new in zip(self, point, strict=True)))

    @property
    def line(self) -> tuple[float, float] | None:
        """(seconds of an empty step, seconds that each request adds); None while batches differ
        too little to tell."""
        if not self.weight:
            return None
        x, y = self.x / self.weight, self.y / self.weight
        variance = self.xx / self.weight - x * x
        if variance <= (IDENTIFIED * x) ** 2:
            return None
        slope = (self.xy / self.weight - x * y) / variance
        slope = min(max(0.0, slope), y / x)
        return y - slope * x, slope


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one decision leaves to the next."""

    time: float = -math.inf
    arriving_tokens: float = 0.0
    """Per second, smoothed, of the whole fleet; as the next two."""
    generated_tokens: float = 0.0
    """Per second."""
    concurrency: float = 0.0
    prefill_speed: float = 0.0
    """Tokens per second of one replica."""
    prompt_tokens: float = 0.0
    """Of a mean request."""
    steps: StepTimes = StepTimes()
    busy_time: float = -math.inf
    """When there last was a request."""
    trend: tuple[tuple[float, float], ...] = ()
    """(time, replicas needed), over the time in which growth is foreseen."""
    needs: tuple[tuple[float, int], ...] = ()
    """(time, replicas needed with margin) of the last downscale_delay_s; falling, since what is
    older and less than a newer one cannot matter any more."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    replicas: int
    reason: str
    """What sets the number, for people."""
    required: float
    """Before rounding, bounds and delays."""
    ttft_s: float
    """Predicted wait and prefill of a request that comes now, with the replicas that are ready."""
    tpot_s: float
    memory: Memory


def decide(
    stats: Sequence[ReplicaStats], fleet: Fleet, targets: Targets, memory: Memory, now: float
) -> Decision:
    """The replicas to have: as many as keep `targets` at the load that is there when a replica that
    is ordered now is ready.

    It grows at once. It shrinks to the most that was needed in `downscale_delay_s`, and never
    while a report is missing or stale. now: seconds of any clock that never goes back.
    """
    fresh = [one for one in stats if one.age_s <= targets.stale_s]
    memory = _observe(fresh, fleet, memory, now)
    needs = _needs(fresh, targets, memory)
    base = max(needs.values(), default=0.0)
    memory, ahead = _foresee(memory, base, targets, now)
    needs = {name: need + ahead * (need == base) for name, need in needs.items()}
    if backlog := _backlog(fresh, targets, memory):
        needs["queue"] = backlog
    if fleet.waiting:
        needs["waiting"] = 1.0  # it will tell what it can do
    reason, required = max(needs.items(), key=lambda item: item[1], default=("idle", 0.0))
    required = min(required, MANY)
    complete = len(fresh) >= fleet.ready > 0
    memory = _remember(memory, required, fleet, targets, now, complete)
    replicas = _bounded(required, fleet, targets, memory, now, complete)
    if replicas < fleet.target:
        reason = "less load" if replicas else "idle"
    return Decision(
        replicas=replicas,
        reason="steady" if replicas == fleet.target else reason,
        required=required,
        ttft_s=_wait(fresh, memory) + _prefill_time(memory),
        tpot_s=_tpot(fresh, memory),
        memory=memory,
    )


def _observe(fresh: Sequence[ReplicaStats], fleet: Fleet, memory: Memory, now: float) -> Memory:
    """The moving averages, with these reports."""
    if memory.busy_time == -math.inf:
        memory = replace(memory, busy_time=now)
    if fleet.waiting or any(
        one.running or one.queued or one.arriving_requests_per_s for one in fresh
    ):
        memory = replace(memory, busy_time=now)
    if not fresh:
        return replace(memory, time=now)
    keep = math.exp(-max(0.0, now - memory.time) / SMOOTHING_S)

    def smooth(old: float, new: float) -> float:
        return keep * old + (1 - keep) * new

    tokens = sum(one.arriving_tokens_per_s for one in fresh)
    requests = sum(one.arriving_requests_per_s for one in fresh)
    queued = sum(one.queued for one in fresh)
    # Those that wait for others to end would run, if there were room.
    full = [1 + one.queued / max(1.0, one.running) * one.is_full for one in fresh]
    concurrency = sum(one.running * more for one, more in zip(fresh, full, strict=True))
    generated = sum(
        one.generated_tokens_per_s * more for one, more in zip(fresh, full, strict=True)
    )
    prompt = memory.prompt_tokens
    if requests > 0 and tokens > 0:
        prompt = smooth(prompt or tokens / requests, tokens / requests)
    elif not prompt and queued:
        prompt = sum(one.queued_tokens for one in fresh) / queued
    steps = memory.steps
    for one in fresh:
        if one.running and one.decode_step_s > 0:
            steps = steps.with_point(one.running, one.decode_step_s)
    speed = _mean([one.prefill_tokens_per_s for one in fresh]) or memory.prefill_speed
    return replace(
        memory,
        time=now,
        arriving_tokens=smooth(memory.arriving_tokens, tokens),
        generated_tokens=smooth(memory.generated_tokens, generated),
        concurrency=smooth(memory.concurrency, concurrency),
        prefill_speed=smooth(memory.prefill_speed or speed, speed),
        prompt_tokens=prompt,
        steps=steps,
    )


def _needs(fresh: Sequence[ReplicaStats], targets: Targets, memory: Memory) -> dict[str, float]:
    """Replicas that each resource asks for at the present load.

    A replica's time goes to prefills and to decode steps of f + c * batch seconds. With `work` as
    all prefills and all c of a second's tokens, n replicas make a token in f / (1 - work / n), and
    hold that many times the tokens of a second in requests: so TPOT, sequences and blocks each
    turn into a number of replicas.
    """
    if not fresh:
        return {}
    free = 1 - targets.headroom
    prefill = _prefill_work(memory)
    needs = {"TTFT": prefill / _utilization(targets, memory)}
    seqs = _mean([one.max_num_seqs for one in fresh])
    blocks = _mean([one.kv_total_blocks for one in fresh])
    running = sum(one.running for one in fresh)
    blocks_each = sum(one.kv_used_blocks for one in fresh) / running if running else 0.0
    if line := memory.steps.line:
        fixed, each = line
        work = prefill + each * memory.generated_tokens
        held = memory.generated_tokens * fixed
        needs["TPOT"] = work / (1 - fixed / max(targets.tpot_s, REACHABLE * fixed)) / free
    else:  # as if a step's time were proportional to its batch
        work, held = 0.0, memory.concurrency
        needs["TPOT"] = len(fresh) * _tpot(fresh, memory) / targets.tpot_s / free
    if seqs:
        needs["sequences"] = work + held / (seqs * free)
    if blocks:
        needs["KV cache"] = work + held * blocks_each / (blocks * free)
    return needs


def _prefill_work(memory: Memory) -> float:
    """Seconds of one replica that the prompts of a second take."""
    return memory.arriving_tokens / memory.prefill_speed if memory.prefill_speed > 0 else 0.0


def _tpot(fresh: Sequence[ReplicaStats], memory: Memory) -> float:
    """Of these replicas, as they are; 0 while nothing is decoded."""
    count = max(1, len(fresh))
    left = max(0.01, 1 - _prefill_work(memory) / count)
    if line := memory.steps.line:
        left = max(0.01, left - line[1] * memory.generated_tokens / count)
        return line[0] / left
    return _mean([one.decode_step_s for one in fresh if one.running]) / left


def _mean(values: Sequence[float]) -> float:
    """Of those that are known."""
    known = [value for value in values if value > 0]
    return sum(known) / len(known) if known else 0.0


def _utilization(targets: Targets, memory: Memory) -> float:
    """The share of time that replicas may prefill, so that 19 requests in 20 wait for others' no
    longer than the TTFT leaves beside their own: an M/M/1 queue, whose mean wait at utilization u
    is u / (1 - u) prefills."""
    ceiling = 1 - targets.headroom
    prefill = _prefill_time(memory)
    if not prefill:
        return ceiling
    waits = max(0.0, targets.ttft_s - prefill) / (TAIL * prefill)
    return min(ceiling, max(MIN_UTILIZATION, waits / (1 + waits)))


def _prefill_time(memory: Memory) -> float:
    return memory.prompt_tokens / memory.prefill_speed if memory.prefill_speed > 0 else 0.0


def _wait(fresh: Sequence[ReplicaStats], memory: Memory) -> float:
    """Seconds until the prompts that wait are computed, shared evenly."""
    speed = memory.prefill_speed * len(fresh)
    return sum(one.queued_tokens for one in fresh) / speed if speed > 0 else 0.0


def _backlog(fresh: Sequence[ReplicaStats], targets: Targets, memory: Memory) -> float:
    """Replicas that serve what comes and also work off what waits too long, in the time in which
    more of it would gather before a replica starts. 0 while nothing does."""
    speed = memory.prefill_speed
    late = _wait(fresh, memory) + _prefill_time(memory) - targets.ttft_s
    if late <= 0 or speed <= 0:
        return 0.0
    arriving = max(memory.arriving_tokens, sum(one.arriving_tokens_per_s for one in fresh))
    drain = max(targets.startup_s, 4 * targets.ttft_s)
    return arriving / (speed * _utilization(targets, memory)) + late * len(fresh) / drain


def _foresee(memory: Memory, need: float, targets: Targets, now: float) -> tuple[Memory, float]:
    """(memory, replicas that steady growth adds by the time a replica that is ordered now starts).

    A trend is a line through the last 2 startup_s that explains nearly all that happened.
    """
    horizon = max(2 * targets.startup_s, 1.0)
    trend = memory.trend
    if not trend or now - trend[-1][0] >= horizon / 20:
        trend = (*(point for point in trend if now - point[0] <= horizon), (now, need))
    memory = replace(memory, trend=trend)
    if len(trend) < 5 or now - trend[0][0] < horizon / 2:
        return memory, 0.0
    count = len(trend)
    mean_t = sum(time for time, _ in trend) / count
    mean_n = sum(need for _, need in trend) / count
    tt = sum((time - mean_t) ** 2 for time, _ in trend)
    nn = sum((need - mean_n) ** 2 for _, need in trend)
    tn = sum((time - mean_t) * (need - mean_n) for time, need in trend)
    if tn <= 0 or nn <= 0 or tn * tn / (tt * nn) < STEADY_GROWTH:
        return memory, 0.0
    return memory, min(tn / tt * targets.startup_s, MAX_AHEAD * need)


def _remember(
    memory: Memory,
    required: float,
    fleet: Fleet,
    targets: Targets,
    now: float,
    complete: bool,
) -> Memory:
    """`required` is kept for the downscale delay. complete: every ready replica has reported."""
    need = math.ceil(required * (1 + DOWN_MARGIN))
    if not complete or not memory.needs:
        need = max(need, fleet.target)  # what nobody knows, may have been needed
    needs = (*(one for one in memory.needs if one[1] > need), (now, need))
    while now - needs[0][0] > targets.downscale_delay_s:
        needs = needs[1:]
    return replace(memory, needs=needs)


def _bounded(
    required: float,
    fleet: Fleet,
    targets: Targets,
    memory: Memory,
    now: float,
    complete: bool,
) -> int:
    """A whole number within the bounds."""
    if not fleet.target:
        wanted = math.ceil(required) if fleet.waiting else 0
    elif required > fleet.target * (1 + UP_TOLERANCE):
        wanted = math.ceil(required)
    elif not complete:
        wanted = fleet.target
    elif not fleet.min_replicas and now - memory.busy_time >= targets.idle_s:
        wanted = 0
    else:
        wanted = max(1, min(fleet.target, memory.needs[0][1]))
    if wanted > fleet.target:
        wanted = max(fleet.target, min(wanted, MAX_GROWTH * max(1, fleet.ready)))
    return max(fleet.min_replicas, min(fleet.max_replicas, wanted))
