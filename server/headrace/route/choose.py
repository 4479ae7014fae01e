"""Which replica a request goes to: one pure function, the same in the door and in the simulator.

The answer is the replica with the earliest predicted first token: what waits there, plus the
prefill of the tokens that its KV cache lacks. How far that may pull requests together is bounded.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

LOAD_VERSION = 1
"""Of the answer of GET /load."""

BALANCE_BOUND = 1.25
"""No replica gets a request for its cache while it has more than this times the mean in flight."""
BALANCE_SLACK = 8.0
"""And it may always have this many more than the mean: of few in flight the spread says little, and
to compute a conversation anew costs more than to wait (bench/cluster_sim.py)."""
RECENT_SLACK = 4.0
"""The same for what was sent of late."""
RECENT_HALF_LIFE_S = 60.0
HOME_TRUST = 0.75
"""How much of a conversation that began elsewhere its first choice is expected to hold."""
FULL_KV = 0.95
"""The share of KV blocks in use from which on a request is expected to wait for blocks."""
MAX_HOLDERS = 8
"""Replicas that are weighed for what they hold: bounds the time of a choice."""

_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What a replica last said of itself (GET /load), with the asking door's counts of that time.

    The defaults are those of a replica that has not been asked yet.
    """

    ready: bool = True
    draining: bool = False
    running: int = 0
    """Requests in the running batch."""
    queued: int = 0
    """Requests without a first token."""
    queued_tokens: int = 0
    """Their prompt tokens."""
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    """0: not known."""
    block_size: int = 16
    """Tokens of a block."""
    step_age_s: float = 0.0
    prefill_tokens_per_s: float = 2000.0
    """How fast the engine computes prompts."""
    decode_step_s: float = 0.02
    """Length of a step that makes one token for every running request."""
    door_in_flight: int = 0
    """ReplicaView.in_flight when the report was made: what is more in it is of other doors."""
    door_pending_prompt_tokens: int = 0
    """ReplicaView.pending_prompt_tokens when the report was made."""
    usable: bool = field(init=False)
    others: int = field(init=False)
    """Requests there that are not this door's."""

    def __post_init__(self) -> None:
        # Once a report, not once a request and replica.
        object.__setattr__(self, "usable", self.ready and not self.draining)
        others = self.running + self.queued - self.door_in_flight
        object.__setattr__(self, "others", max(others, 0))

    @classmethod
    def of_report(cls, report: Mapping[str, Any], view: ReplicaView) -> ReplicaLoad:
        """A parsed answer of GET /load, for the door that holds `view`.

        A member that is missing has its default; members that are not known are left out, so that
        replicas may tell more. Raises ValueError for another version of the report.
        """
        if report.get("version") != LOAD_VERSION:
            raise ValueError(
                f"GET /load answered version {report.get('version')!r}; this door reads version "
                f"{LOAD_VERSION}. Update the older of the two."
            )
        told = {
            name: report[name]
            for name in _REPORTED
            if isinstance(report.get(name), int | float) and report[name] >= 0
        }
        for name in ("prefill_tokens_per_s", "decode_step_s"):
            if not told.get(name):
                told.pop(name, None)  # not measured yet
        return cls(
            **told,
            door_in_flight=view.in_flight,
            door_pending_prompt_tokens=view.pending_prompt_tokens,
        )


_REPORTED = tuple(
    field.name for field in fields(ReplicaLoad) if field.init and not field.name.startswith("door_")
)


@dataclass(slots=True, eq=False)
class ReplicaView:
    """One replica as one door sees it. The door keeps it, and counts in it; choose() only reads."""

    address: str
    """Its base URL; tells replicas apart, and ranks them for a key."""
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    in_flight: int = 0
    """Requests that this door has there and that have not ended."""
    pending_tokens: int = 0
    """Prompt tokens, without those believed cached, of this door's requests there that have not
    answered yet."""
    pending_prompt_tokens: int = 0
    """All prompt tokens of those requests: what the replica counts."""
    recent: float = 0.0
    """Requests that this door sent there of late: `sent` adds one, `fade` takes some away."""
    key: int = field(init=False)
    """64 bits of the address, for ranking."""

    def __post_init__(self) -> None:
        self.key = key_of(self.address.encode())

    def sent(self, request: RouteRequest) -> None:
        """A request goes there."""
        self.in_flight += 1
        self.recent += 1.0
        self.pending_tokens += request.missing_at(self.address)
        self.pending_prompt_tokens += request.prompt_tokens

    def answered(self, request: RouteRequest) -> None:
        """Its first byte has come, or it failed before that. Once for each `sent`."""
        self.pending_tokens -= request.missing_at(self.address)
        self.pending_prompt_tokens -= request.prompt_tokens

    def ended(self) -> None:
        """It is over. Once for each `sent`."""
        self.in_flight -= 1

    def fade(self, seconds: float) -> None:
        """So much time has passed; the door calls it with every report."""
        self.recent *= 0.5 ** (seconds / RECENT_HALF_LIFE_S)

    @property
    def busy(self) -> int:
        """Requests there: this door's now, and others' as of the last report."""
        return self.in_flight + self.load.others

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens to compute there before ours. Of others' what is cached is not known."""
        load = self.load
        others = load.queued_tokens - load.door_pending_prompt_tokens
        return self.pending_tokens + (others if others > 0 else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """What choose() knows of a request."""

    prompt_tokens: int
    """Estimated from its bytes."""
    affinity: int = 0
    """64 bits that all requests of a session share; without a session, those that begin alike."""
    prefix_keys: tuple[int, ...] = ()
    """Chained keys of its prefixes, shortest first; see prefix.py."""
    session: str | None = None
    continued_tokens: int = 0
    """Of a conversation that goes on: those that its last turn has computed somewhere."""
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    """Address -> prompt tokens believed in that replica's KV cache; see PrefixIndex.match."""

    def missing_at(self, address: str) -> int:
        """Tokens to compute there. The last one always is."""
        return max(self.prompt_tokens - self.cached_tokens.get(address, 0), 1)


class NoReplicaError(LookupError):
    """No replica is ready and stays."""


def key_of(data: bytes) -> int:
    """64 bits of `data`, the same in every process (blake2b)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def choose(replicas: Sequence[ReplicaView], request: RouteRequest) -> int:
    """The index of the replica that `request` should go to. Pure and deterministic.

    Candidates are the replicas believed to hold the most of the prompt and the two that rank first
    for its affinity key: a door that knows nothing yet sends a session where another door would,
    and to the shorter of two queues. Of those within the balance bound, now and over the last
    minute, the one with the smallest predicted_wait gets it, then the one that ranks higher. When
    none is, all that are within it now compete.

    Raises NoReplicaError when no replica is ready and stays.
    """
    # For a thousand replicas each of these lines counts: no calls in them.
    busy = [
        replica.in_flight + replica.load.others if replica.load.usable else -1
        for replica in replicas
    ]
    num_usable = len(busy) - busy.count(-1)
    if not num_usable:
        raise NoReplicaError("No replica is ready.")
    mean = (sum(busy) + len(busy) - num_usable + 1) / num_usable
    bound = max(BALANCE_BOUND * mean, mean + BALANCE_SLACK) - 1
    candidates = _two_first(replicas, busy, request.affinity)
    request = _trusting(replicas[candidates[0]].address, request)
    if request.cached_tokens:
        holders = _best_holders(request)
        candidates += [
            index for index, replica in enumerate(replicas) if replica.address in holders
        ]
    recent = [
        replica.recent if count >= 0 else 0.0 for replica, count in zip(replicas, busy, strict=True)
    ]
    mean_recent = sum(recent) / num_usable
    recent_bound = max(BALANCE_BOUND * mean_recent, mean_recent + RECENT_SLACK)
    within = [i for i in candidates if 0 <= busy[i] <= bound and recent[i] <= recent_bound]
    # There is always one: the least busy has at most the mean.
    within = within or [index for index, count in enumerate(busy) if 0 <= count <= bound]
    return min(
        within,
        key=lambda index: (
            predicted_wait(replicas[index], request),
            -rank(request.affinity, replicas[index].key),
        ),
    )


def predicted_wait(replica: ReplicaView, request: RouteRequest) -> float:
    """Seconds until the first token there: the prompts before it, its own missing tokens, and
    blocks that must be freed first. Each request there costs a step: it makes all steps longer."""
    load = replica.load
    tokens = replica.waiting_tokens + request.missing_at(replica.address)
    wait = tokens / load.prefill_tokens_per_s + replica.busy * load.decode_step_s
    if load.kv_total_blocks:
        room = FULL_KV * load.kv_total_blocks - load.kv_used_blocks
        short = tokens - room * load.block_size
        if short > 0:
            # In the long run blocks are freed as fast as they are filled: a token a row and step.
            wait += short * load.decode_step_s / max(load.running, 1)
    return wait


def _trusting(home: str, request: RouteRequest) -> RouteRequest:
    """With the belief that its first choice holds a conversation that no known replica does: other
    doors sent it there, if they could."""
    cached = request.cached_tokens
    expected = int(HOME_TRUST * request.continued_tokens)
    if expected <= max(cached.values(), default=0):
        return request
    return replace(request, cached_tokens={**cached, home: expected})


def _best_holders(request: RouteRequest) -> Collection[str]:
    """Addresses that hold the most of the prompt. Of many that hold the same, as with a system
    prompt that all share, a few by the affinity key: different ones for different sessions."""
    cached = request.cached_tokens
    if len(cached) <= MAX_HOLDERS:
        return cached
    addresses = list(cached)
    start = request.affinity % len(addresses)
    turned = addresses[start:] + addresses[:start]
    return heapq.nlargest(MAX_HOLDERS, turned, key=cached.__getitem__)


def rank(affinity: int, replica_key: int) -> int:
    """Rendezvous hashing: the replica with the largest rank for a key keeps it while others come
    and go. Both are hashes already, so that one multiplication mixes them enough."""
    return (affinity ^ replica_key) * _ODD & _MASK


def _two_first(replicas: Sequence[ReplicaView], busy: Sequence[int], affinity: int) -> list[int]:
    """The two usable replicas of the highest rank, or the only one."""
    ranks = [
        (affinity ^ replica.key) * _ODD & _MASK if count >= 0 else -1
        for replica, count in zip(replicas, busy, strict=True)
    ]
    best = ranks.index(max(ranks))
    ranks[best] = -1
    second = ranks.index(max(ranks))
    return [best] if second == best or ranks[second] < 0 else [best, second]
