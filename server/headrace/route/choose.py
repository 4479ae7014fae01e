"""Which replica a request goes to: one pure function, the same in the door and in the simulator.

The answer is the replica with the earliest predicted first token: what waits there, plus the
prefill of the tokens that its KV cache lacks. How far that may pull requests together is bounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LOAD_VERSION = 1
"""Of the answer of GET /load."""

BALANCE_BOUND = 1.25
"""No replica gets a request for its cache while it has more than this times the mean in flight."""
BALANCE_SLACK = 2.0
"""And it may always have this many more than the mean: a mean below one says little."""
FULL_KV = 0.95
"""The share of KV blocks in use from which on a request is expected to wait for blocks."""

_MASK = (1 << 64) - 1


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
    door_pending_tokens: int = 0
    """ReplicaView.pending_tokens when the report was made."""

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
            door_pending_tokens=view.pending_tokens,
        )


_REPORTED = frozenset(ReplicaLoad.__dataclass_fields__) - {"door_in_flight", "door_pending_tokens"}


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
    key: int = field(init=False)
    """64 bits of the address, for ranking."""

    def __post_init__(self) -> None:
        self.key = key_of(self.address.encode())

    @property
    def usable(self) -> bool:
        return self.load.ready and not self.load.draining

    @property
    def busy(self) -> int:
        """Requests there: this door's now, and others' as of the last report."""
        load = self.load
        others = load.running + load.queued - load.door_in_flight
        return self.in_flight + (others if others > 0 else 0)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens to compute there before ours."""
        load = self.load
        others = load.queued_tokens - load.door_pending_tokens
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
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    """Address -> prompt tokens believed in that replica's KV cache; see PrefixIndex.match."""


class NoReplicaError(LookupError):
    """No replica is ready and stays."""


def key_of(data: bytes) -> int:
    """64 bits of `data`, the same in every process (blake2b)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def choose(replicas: Sequence[ReplicaView], request: RouteRequest) -> int:
    """The index of the replica that `request` should go to. Pure and deterministic.

    Candidates are the replicas believed to hold a part of the prompt and the two that rank first
    for its affinity key (so that a door which knows nothing yet sends a session where another door
    would, and never more than one of two choices to the longer queue). Among those within the
    balance bound the smallest predicted_wait wins, then rank. If all candidates are beyond the
    bound, all others compete. Raises NoReplicaError.
    """
    usable = [index for index, replica in enumerate(replicas) if replica.usable]
    if not usable:
        raise NoReplicaError("no replica is ready")
    if len(usable) == 1:
        return usable[0]
    busy = {index: replicas[index].busy for index in usable}
    mean = (sum(busy.values()) + 1) / len(usable)
    bound = max(BALANCE_BOUND * mean, mean + BALANCE_SLACK)
    ranked = _two_first(replicas, usable, request.affinity)
    candidates = dict.fromkeys(ranked)
    if request.cached_tokens:
        cached = request.cached_tokens
        candidates.update(dict.fromkeys(i for i in usable if replicas[i].address in cached))
    within = [index for index in candidates if busy[index] + 1 <= bound]
    # There is always one: somebody is at or below the mean.
    within = within or [index for index in usable if busy[index] + 1 <= bound]
    return min(
        within,
        key=lambda index: (
            predicted_wait(replicas[index], request),
            -rank(request.affinity, replicas[index].key),
        ),
    )


def predicted_wait(replica: ReplicaView, request: RouteRequest) -> float:
    """Seconds until the first token there: the prompts before it, its own missing tokens, and
    blocks that must be freed first. A busier batch costs a step a request: its steps are longer."""
    load = replica.load
    missing = request.prompt_tokens - request.cached_tokens.get(replica.address, 0)
    tokens = replica.waiting_tokens + max(missing, 1)
    wait = tokens / load.prefill_tokens_per_s + replica.busy * load.decode_step_s
    if load.kv_total_blocks:
        room = FULL_KV * load.kv_total_blocks - load.kv_used_blocks
        short = tokens - room * load.block_size
        if short > 0:
            # In the long run blocks are freed as fast as they are filled: a token a row and step.
            wait += short * load.decode_step_s / max(load.running, 1)
    return wait


def rank(affinity: int, replica_key: int) -> int:
    """Rendezvous hashing: the replica with the largest rank for a key keeps it while others come
    and go. Two rounds of multiply and shift."""
    mixed = ((affinity ^ replica_key) * 0x9E3779B97F4A7C15) & _MASK
    mixed ^= mixed >> 32
    return (mixed * 0xD6E8FEB86659FD93) & _MASK


def _two_first(
    replicas: Sequence[ReplicaView], usable: Sequence[int], affinity: int
) -> tuple[int, int]:
    """The two usable replicas of the highest rank."""
    best = second = -1
    best_rank = second_rank = -1
    for index in usable:
        own = rank(affinity, replicas[index].key)
        if own > best_rank:
            best, second, best_rank, second_rank = index, best, own, best_rank
        elif own > second_rank:
            second, second_rank = index, own
    return best, second
