"""Autoscaling by what users were promised, against a fixed fleet and against Ray's own policy.

    python -m bench.autoscaling [--trace step] [--output bench/results/autoscaling.json]

A model of a fleet plays traces of requests: replicas batch, prefill in chunks and slow down with
their batch, take their time to start, and report late, as under Ray. The policies see the reports
only; `headrace.deploy.sizing` is the shipped code. Virtual time: a run repeats exactly.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

from headrace.deploy.autoscaling import stats_of
from headrace.deploy.sizing import Fleet, Memory, Targets, decide

TICK_S = 0.25
REPORT_S, LOOK_BACK_S = 5.0, 30.0
"""Between two reports of a replica; how far back a policy sees them. Under Ray 10 and 30."""


@dataclass(frozen=True)
class Speed:
    """A replica, as fast as SmolLM2-135M on a few cores, or as a large model on a GPU."""

    prefill_tokens_per_s: float = 2000.0
    step_s: float = 0.02
    per_request_s: float = 0.002
    chunk_tokens: int = 256
    max_num_seqs: int = 32
    kv_blocks: int = 1200
    block_size: int = 16
    startup_s: float = 30.0


@dataclass
class Request:
    arrival: float
    prompt: int
    output: int
    first_token: float = math.inf
    end: float = math.inf

    def meets(self, targets: Targets) -> bool:
        if self.first_token - self.arrival > targets.ttft_s:
            return False
        return self.end - self.first_token <= targets.tpot_s * max(1, self.output - 1)


class Replica:
    """One engine: a queue, a prefill in chunks, and a batch that gets a token each a step."""

    def __init__(self, speed: Speed, now: float) -> None:
        self.speed, self.now, self.born = speed, now, now
        self.queue: deque[Request] = deque()
        self.prefilling: Request | None = None
        self.left = 0
        self.tokens = 0
        """Steps that running requests have seen."""
        self.batch: list[tuple[int, int, Request]] = []
        self.used_blocks = 0
        self.prompt_tokens = self.requests = self.output_tokens = 0
        self.prefill_speed = self.decode_step_s = 0.0
        """Moving averages, as the engine's client keeps them."""
        self.points: dict[str, deque[SimpleNamespace]] = {}

    @property
    def in_flight(self) -> int:
        return len(self.queue) + len(self.batch) + (self.prefilling is not None)

    def _blocks(self, request: Request) -> int:
        return -(-(request.prompt + request.output) // self.speed.block_size)

    def _admit(self) -> None:
        if self.prefilling is not None or not self.queue:
            return
        needed = self._blocks(self.queue[0])
        if len(self.batch) >= self.speed.max_num_seqs:
            return
        if self.used_blocks + needed > self.speed.kv_blocks:
            return
        self.prefilling = self.queue.popleft()
        self.left = self.prefilling.prompt
        self.used_blocks += needed
        self.prompt_tokens += self.prefilling.prompt

    def advance(self, until: float) -> Iterator[Request]:
        """Run to about `until`; yields requests that end."""
        speed = self.speed
        while self.now < until:
            self._admit()
            if not self.batch and self.prefilling is None:
                self.now = until
                return
            chunk = min(self.left, speed.chunk_tokens) if self.prefilling else 0
            decode = (speed.step_s + speed.per_request_s * len(self.batch)) if self.batch else 0.0
            step = max(decode, speed.step_s) + chunk / speed.prefill_tokens_per_s
            # Steps without a prefill are alike until one of them ends a request.
            steps = 1
            if not chunk:
                steps = max(1, min(self.batch[0][0] - self.tokens, int((until - self.now) / step)))
            self.now += steps * step
            self._count(chunk, step, steps)
            yield from self._end_step(chunk, steps)

    def _count(self, chunk: int, step: float, steps: int) -> None:
        self.output_tokens += steps * len(self.batch)
        if chunk > 2 * len(self.batch):
            rate = chunk / step
            self.prefill_speed += (0.1 if self.prefill_speed else 1.0) * (rate - self.prefill_speed)
        else:
            weight = 1 - 0.9**steps if self.decode_step_s else 1.0
            self.decode_step_s += weight * (step - self.decode_step_s)

    def _end_step(self, chunk: int, steps: int) -> Iterator[Request]:
        self.tokens += steps
        while self.batch and self.batch[0][0] <= self.tokens:
            request = heapq.heappop(self.batch)[2]
            request.end = self.now
            self.used_blocks -= self._blocks(request)
            yield request
        if self.prefilling is None:
            return
        self.left -= chunk
        if not self.left:
            request, self.prefilling = self.prefilling, None
            request.first_token = self.now
            entry = (self.tokens + request.output - 1, id(request), request)
            heapq.heappush(self.batch, entry)

    def report(self, now: float) -> None:
        queued_tokens = sum(request.prompt for request in self.queue) + self.left
        values = {
            "running": len(self.batch),
            "queued": len(self.queue) + (self.prefilling is not None),
            "queued_tokens": queued_tokens,
            "kv_used_blocks": self.used_blocks,
            "kv_total_blocks": self.speed.kv_blocks,
            "max_num_seqs": self.speed.max_num_seqs,
            "prefill_tokens_per_s": self.prefill_speed,
            "decode_step_s": self.decode_step_s,
            "prompt_tokens": self.prompt_tokens,
            "requests": self.requests,
            "output_tokens": self.output_tokens,
        }
        for name, value in values.items():
            points = self.points.setdefault(name, deque())
            points.append(SimpleNamespace(timestamp=now, value=value))
            while now - points[0].timestamp > LOOK_BACK_S:
                points.popleft()


@dataclass
class Model:
    """The fleet. `sizes`: (time, ready, target) whenever the target changed."""

    speed: Speed
    target: int
    min_replicas: int = 1
    max_replicas: int = 32
    now: float = 0.0
    ready: list[Replica] = field(default_factory=list)
    draining: list[Replica] = field(default_factory=list)
    starting: list[float] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    """There was no replica when they came."""
    done: list[Request] = field(default_factory=list)
    replica_seconds: float = 0.0
    sizes: list[tuple[float, int, int]] = field(default_factory=list)
    deaf: bool = False
    """Reports get lost."""

    def __post_init__(self) -> None:
        self.ready = [Replica(self.speed, 0.0) for _ in range(self.target)]
        self.sizes = [(0.0, self.target, self.target)]

    def resize(self, target: int) -> None:
        target = max(self.min_replicas, min(self.max_replicas, target))
        if target != self.target:
            self.sizes.append((self.now, len(self.ready), target))
        self.target = target
        while len(self.ready) + len(self.starting) < target:
            self.starting.append(self.now + self.speed.startup_s)
        while len(self.ready) + len(self.starting) > target:
            if self.starting:
                self.starting.pop()
            else:
                self.draining.append(self.ready.pop())

    def kill(self, count: int) -> None:
        """Replicas die; their requests begin again elsewhere, and Ray starts others."""
        for replica in [self.ready.pop() for _ in range(count)]:
            lost = [*replica.queue, *(entry[2] for entry in replica.batch)]
            lost += [replica.prefilling] if replica.prefilling else []
            for request in lost:
                request.first_token = math.inf
                self.submit(request)
        self.resize(self.target)

    def submit(self, request: Request) -> None:
        if not self.ready:
            self.waiting.append(request)
            return
        replica = min(self.ready, key=lambda one: one.in_flight)
        replica.queue.append(request)
        replica.requests += 1

    def tick(self, arrivals: list[Request]) -> None:
        self.now += TICK_S
        for at in [at for at in self.starting if at <= self.now]:
            self.starting.remove(at)
            self.ready.append(Replica(self.speed, self.now))
        if self.ready:
            arrivals, self.waiting = [*self.waiting, *arrivals], []
        for request in arrivals:
            self.submit(request)
        for replica in [*self.ready, *self.draining]:
            self.done.extend(replica.advance(self.now))
            if not self.deaf and (self.now - replica.born) % REPORT_S < TICK_S:
                replica.report(self.now)
        self.draining = [replica for replica in self.draining if replica.in_flight]
        count = len(self.ready) + len(self.draining) + len(self.starting)
        self.replica_seconds += TICK_S * count

    @property
    def ongoing(self) -> int:
        """Requests that replicas have, as Ray counts them for its own policy."""
        return sum(replica.in_flight for replica in self.ready) + len(self.waiting)

    def raw_metrics(self) -> dict[str, dict[int, list[SimpleNamespace]]]:
        raw: dict[str, dict[int, list[SimpleNamespace]]] = {}
        for replica in self.ready:
            for name, points in replica.points.items():
                raw.setdefault(name, {})[id(replica)] = list(points)
        return raw


Policy = Callable[[Model], int]
"""Asked every second."""


class Ours:
    def __init__(self, targets: Targets) -> None:
        self.targets, self.memory = targets, Memory()
        self.decisions: list[tuple[float, str, int]] = []

    def __call__(self, model: Model) -> int:
        fleet = Fleet(
            ready=len(model.ready),
            target=model.target,
            min_replicas=model.min_replicas,
            max_replicas=model.max_replicas,
            waiting=len(model.waiting),
        )
        stats = stats_of(model.raw_metrics(), model.now)
        decision = decide(stats, fleet, self.targets, self.memory, model.now)
        self.memory = decision.memory
        if decision.replicas != model.target:
            self.decisions.append((model.now, decision.reason, decision.replicas))
        return decision.replicas


class Ongoing:
    """Ray's default policy: mean ongoing requests over the look-back, and its default delays."""

    def __init__(self, target: float, upscale_s: float = 30.0, downscale_s: float = 600.0) -> None:
        self.target, self.upscale_s, self.downscale_s = target, upscale_s, downscale_s
        self.seen: deque[float] = deque(maxlen=int(LOOK_BACK_S))
        self.since, self.direction = 0.0, 0

    def __call__(self, model: Model) -> int:
        self.seen.append(model.ongoing)
        desired = math.ceil(sum(self.seen) / len(self.seen) / self.target)
        desired = max(model.min_replicas, min(model.max_replicas, desired))
        direction = (desired > model.target) - (desired < model.target)
        if direction != self.direction:
            self.direction, self.since = direction, model.now
        delay = self.upscale_s if direction > 0 else self.downscale_s
        if not direction or model.now - self.since < delay:
            return model.target
        self.direction = 0
        return desired


# --- traces ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    seconds: float
    rate: Callable[[float], float]
    """Requests per second at a time."""
    start: int
    """Replicas at the beginning."""
    outage_at: float = math.inf
    """Half of the replicas die."""


def _step(t: float) -> float:
    return 8.0 if 300 <= t < 1200 else 2.0


def _ramp(t: float) -> float:
    return 1.0 + 11.0 * min(1.0, max(0.0, (t - 300) / 900))


def _day(t: float) -> float:
    """24 hours in 4: a quiet night, a busy day, and ten minutes of twice as much, five times."""
    wave = 0.5 - 0.5 * math.cos(2 * math.pi * t / 14_400)
    burst = 2.0 if t % 2880 > 2280 else 1.0
    return (0.5 + 6.0 * wave) * burst


TRACES = {
    "steady": Trace(2400, lambda t: 6.0, 4),
    "step": Trace(2400, _step, 2),
    "ramp": Trace(1800, _ramp, 2),
    "day": Trace(14_400, _day, 1),
    "outage": Trace(1200, lambda t: 6.0, 6, outage_at=400),
}


def play(
    trace: Trace, policy: Policy, speed: Speed, seed: int = 0, **bounds: int
) -> tuple[Model, list[Request]]:
    """(the fleet afterwards, all requests) of a trace."""
    chance = random.Random(seed)
    model = Model(speed, trace.start, **bounds)
    requests: list[Request] = []
    next_decision = 0.0
    while model.now < trace.seconds:
        arrivals = []
        at = model.now + chance.expovariate(max(1e-9, trace.rate(model.now)))
        while at < model.now + TICK_S:
            prompt = min(1024, max(8, int(chance.lognormvariate(5.3, 0.6))))
            output = min(512, max(2, int(chance.expovariate(1 / 60))))
            arrivals.append(Request(at, prompt, output))
            at += chance.expovariate(trace.rate(model.now))
        requests += arrivals
        model.tick(arrivals)
        if model.now - TICK_S < trace.outage_at <= model.now:
            model.kill(len(model.ready) // 2)
        if model.now >= next_decision:
            model.resize(policy(model))
            next_decision = model.now + 1.0
    return model, requests


def attainment(requests: list[Request], targets: Targets, after: float = 0.0) -> float:
    """The share of requests that got both times; one that never ended did not."""
    judged = [request for request in requests if request.arrival >= after]
    return sum(request.meets(targets) for request in judged) / len(judged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", choices=TRACES, nargs="*", default=list(TRACES))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    targets, speed = Targets(ttft_s=2.0, tpot_s=0.1), Speed()
    rows = []
    for name in arguments.trace:
        trace = TRACES[name]
        ours, _ = result = play(trace, Ours(targets), speed)
        hours = ours.replica_seconds / 3600
        mean = max(1, round(ours.replica_seconds / trace.seconds))
        runs: dict[str, tuple[Model, list[Request]]] = {"SLO policy": result}
        peak = max(size[2] for size in ours.sizes)
        for count in sorted({mean, peak}):
            still = Trace(trace.seconds, trace.rate, count, trace.outage_at)
            runs[f"fixed {count}"] = play(still, lambda model: model.target, speed)
        for ongoing in (2, 8, 16):
            runs[f"ongoing {ongoing}"] = play(trace, Ongoing(ongoing), speed)
        for policy, (model, requests) in runs.items():
            row = {
                "trace": name,
                "policy": policy,
                "requests": len(requests),
                "attained": round(attainment(requests, targets), 4),
                "replica_hours": round(model.replica_seconds / 3600, 3),
                "most_replicas": max(size[2] for size in model.sizes),
                "changes": len(model.sizes) - 1,
            }
            rows.append(row)
            print(
                f"{name:8} {policy:12} attained {row['attained']:7.2%}  replica-hours "
                f"{row['replica_hours']:6.2f} ({row['replica_hours'] / hours:4.2f}x)  most "
                f"{row['most_replicas']:2}  changes {row['changes']}"
            )
    if arguments.output:
        record = {
            "command": "python -m bench.autoscaling --output bench/results/autoscaling.json",
            "targets": targets.model_dump(),
            "speed": asdict(speed),
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
