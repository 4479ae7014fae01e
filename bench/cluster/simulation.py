"""A fleet of simulated replicas behind doors that choose as `headrace route` does.

Time is an event queue. A policy sees only what a door sees: its own requests, and each replica's
load as of the last poll. The policy "oracle" alone looks into the caches: what is left to gain.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from bench.cluster.replica import EngineShape, Job, Replica, block_keys
from bench.cluster.traffic import Conversation

from headrace.route.choose import (
    BALANCE_BOUND,
    ReplicaLoad,
    ReplicaView,
    RouteRequest,
    choose,
    rank,
)
from headrace.route.prefix import PrefixIndex, news_of

POLICIES = ("round-robin", "least-connections", "hash-512", "hash-512-bounded", "ours", "oracle")
HASHED_BYTES = 512

Scaler = Callable[[float, Sequence[ReplicaLoad]], int]
"""(now, loads of replicas that are not draining) -> how many replicas there are to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What does not change in a run."""

    shape: EngineShape
    replicas: int = 4
    policy: str = "ours"
    doors: int = 1
    poll_s: float = 0.5
    """Between two GET /load of a door to each replica."""
    start_delay_s: float = 10.0
    """Of a replica that a scaler asks for, until it is ready."""
    scale_every_s: float = 1.0


class Door:
    """What one door knows and does."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.views: list[ReplicaView] = []
        self.index = PrefixIndex()
        self._turn = 0
        self._polled = 0.0
        self._heard: dict[str, int] = {}

    def poll(self, fleet: Sequence[Replica], now: float) -> None:
        for view, replica in zip(self.views, fleet, strict=True):
            load = replica.load(view, now)
            view.load = load
            view.fade(now - self._polled)
            if self.policy == "ours":
                self.index.set_capacity(view.address, load.kv_total_blocks * load.block_size)
                fresh = self._heard.get(view.address, 0)
                self._heard[view.address] = len(replica.news)
                self.index.heard(view.address, replica.news[fresh:])
        self._polled = now

    def pick(self, job: Job, fleet: Sequence[Replica]) -> tuple[int, RouteRequest]:
        """Where to send it, and what choose() was told."""
        if self.policy == "ours":
            request = self.index.request(job.prefix)
            index = choose(self.views, request)
            self.index.sent(job.prefix, self.views[index].address)
            return index, request
        request = RouteRequest(prompt_tokens=job.prompt_tokens, affinity=_of_first_bytes(job))
        usable = [i for i, view in enumerate(self.views) if view.load.usable]
        if self.policy == "oracle":
            request = replace(request, affinity=job.prefix.opening, cached_tokens=_held(job, fleet))
            return choose(self.views, request), request
        if self.policy.startswith("hash"):
            if self.policy == "hash-512-bounded":
                busy = [self.views[i].in_flight for i in usable]
                bound = BALANCE_BOUND * (sum(busy) + 1) / len(usable)
                usable = [i for i, count in zip(usable, busy, strict=True) if count <= bound - 1
                          ] or usable  # fmt: skip
            return max(usable, key=lambda i: rank(request.affinity, self.views[i].key)), request
        self._turn += 1
        turned = usable[self._turn % len(usable) :] + usable[: self._turn % len(usable)]
        if self.policy == "least-connections":
            return min(turned, key=lambda i: self.views[i].in_flight), request
        return turned[0], request

    def answered(self, job: Job, request: RouteRequest, view: ReplicaView) -> None:
        view.answered(request)
        if self.policy == "ours":
            self.index.answered(job.prefix, request, view.address, job.prompt_tokens, job.cached)


def _of_first_bytes(job: Job) -> int:
    """What the first bytes of a body tell: the first cut, or where they reach into later ones."""
    prefix = job.prefix
    for key, end in zip(prefix.keys, prefix.ends, strict=True):
        if end >= HASHED_BYTES:
            return key
    return prefix.keys[-1]


def _held(job: Job, fleet: Sequence[Replica]) -> dict[str, int]:
    size = fleet[0].shape.block_size
    keys = block_keys(job.parts, size)[: (job.prompt_tokens - 1) // size]
    found = {replica.address: replica.cache.find(keys) * size for replica in fleet}
    return {address: tokens for address, tokens in found.items() if tokens}


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    jobs: list[Job] = field(default_factory=list)
    """All that ended."""
    replicas: list[Replica] = field(default_factory=list)
    """All that there ever were."""
    seconds: float = 0.0
    replica_seconds: float = 0.0
    sizes: list[tuple[float, int]] = field(default_factory=list)
    """(time, number of replicas) at each change."""


class Simulation:
    """One run: `start` what is asked, then `run`."""

    def __init__(self, cluster: Cluster, scaler: Scaler | None = None) -> None:
        self.cluster = cluster
        self.outcome = Outcome()
        self.fleet: list[Replica] = []
        self.doors = [Door(cluster.policy) for _ in range(cluster.doors)]
        self._scaler = scaler
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = itertools.count()
        self._live = 0
        self._of_job: dict[Job, tuple[Door, ReplicaView, RouteRequest]] = {}
        self._next_door = itertools.cycle(self.doors)
        self._waiting: list[Job] = []
        for _ in range(cluster.replicas):
            self._add_replica(0.0, 0.0)
        self._pending = 0
        """Events that bring work; polls alone do not keep a run going."""

    def start(self, traffic: Iterable[tuple[float, Conversation]] | Iterable[Job]) -> None:
        """Conversations, or jobs of a trace."""
        for item in traffic:
            self._pending += 1
            if isinstance(item, Job):
                self._at(item.arrival, lambda now, job=item: self._arrive(job, now))  # type: ignore[misc]
            else:
                self._at(item[0], lambda now, said=item[1]: self._speak(said, now))  # type: ignore[misc]

    def run(self) -> Outcome:
        self._poll(0.0)
        if self._scaler is not None:
            self._scale(0.0)
        now = last = 0.0
        while self._pending or self._live or self._waiting:
            now, _, happen = heapq.heappop(self._events)
            self.outcome.replica_seconds += (now - last) * len(self.fleet)
            last = now
            happen(now)
        self.outcome.seconds = now
        return self.outcome

    # --- requests ---------------------------------------------------------------------------

    def _speak(self, said: Conversation, now: float) -> None:
        job = said.next(now)
        assert job is not None
        job.on_end = lambda end: self._listen(said, end)
        self._arrive(job, now)

    def _listen(self, said: Conversation, now: float) -> None:
        if said.think_s:
            self._pending += 1
            self._at(now + said.think_s, lambda then: self._speak(said, then))

    def _arrive(self, job: Job, now: float) -> None:
        self._pending -= 1
        self._route(job, now)

    def _route(self, job: Job, now: float) -> None:
        door = next(self._next_door)
        if not any(view.load.usable for view in door.views):
            self._waiting.append(job)  # until there is a replica
            return
        index, request = door.pick(job, self.fleet)
        view, target = door.views[index], self.fleet[index]
        view.sent(request)
        self._of_job[job] = (door, view, request)
        self._live += 1
        before = target.step_end
        target.add(job, now)
        if len(self.doors) > 1:
            target.news.append(news_of(job.prefix))
        if target.step_end != before:
            self._await(target)

    def _await(self, replica: Replica) -> None:
        end = replica.step_end
        if end is not None:
            self._at(end, lambda now: self._step(replica, now))

    def _step(self, replica: Replica, now: float) -> None:
        if replica.step_end != now:
            return  # it was cut short, and has its own event
        first, ended = replica.end_step(now)
        for job in first:
            door, view, request = self._of_job[job]
            door.answered(job, request, view)
        for job in ended:
            self._of_job.pop(job)[1].ended()
            self._live -= 1
            self.outcome.jobs.append(job)
            if job.on_end is not None:
                job.on_end(now)
        self._await(replica)
        if replica.draining and not replica.num_live and replica in self.fleet:
            self._remove(replica, now)

    # --- doors and the fleet ----------------------------------------------------------------

    def _poll(self, now: float) -> None:
        for door in self.doors:
            door.poll(self.fleet, now)
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            self._route(job, now)
        self._at(now + self.cluster.poll_s, self._poll)

    def _scale(self, now: float) -> None:
        assert self._scaler is not None
        blank = ReplicaView("")
        staying = [replica for replica in self.fleet if not replica.draining]
        target = self._scaler(now, [replica.load(blank, now) for replica in staying])
        for _ in range(target - len(staying)):
            self._add_replica(now, now + self.cluster.start_delay_s)
        # Those that start go first, then the emptiest.
        staying.sort(key=lambda replica: (replica.ready_at <= now, replica.num_live))
        for replica in staying[: max(len(staying) - target, 0)]:
            replica.draining = True
            if not replica.num_live:
                self._remove(replica, now)
        for door in self.doors:
            for view, replica in zip(door.views, self.fleet, strict=True):
                if replica.draining:
                    view.load = replace(view.load, draining=True)
        self._at(now + self.cluster.scale_every_s, self._scale)

    def _add_replica(self, now: float, ready_at: float) -> None:
        address = f"http://10.0.0.{len(self.outcome.replicas)}:8000"
        replica = Replica(self.cluster.shape, address, ready_at)
        self.outcome.replicas.append(replica)
        self.fleet.append(replica)
        for door in self.doors:
            view = ReplicaView(address)
            view.load = replica.load(view, now)
            door.views.append(view)
        self.outcome.sizes.append((now, len(self.fleet)))

    def _remove(self, replica: Replica, now: float) -> None:
        index = self.fleet.index(replica)
        del self.fleet[index]
        for door in self.doors:
            door.index.forget(door.views.pop(index).address)
        self.outcome.sizes.append((now, len(self.fleet)))

    def _at(self, when: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), happen))
