"""What a door believes to be in its replicas' KV caches, keyed by the bytes of what it sent there.

A door has no tokenizer. It cuts a request where another one may continue it (at each message, and
in long texts every CHUNK bytes) and chains a 64-bit key along the cuts: equal keys, equal prefix.
Answers tell how many tokens a prompt had and how many of them were cached; from the first it learns
tokens a byte, from the second how much a replica really keeps.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.route.choose import RouteRequest, key_of

CHUNK = 1024
"""Bytes between two cuts in a long text."""
MAX_BYTES = 1 << 18
"""Of a request that are keyed: what comes after is a continuation of no interest. Bounds CPU."""
TOKENS_PER_BYTE = 0.25
"""Until answers tell: English in most vocabularies."""
DEFAULT_CAPACITY = 1 << 17
"""Tokens that a replica is believed to keep until it says."""
TOLERANCE = 128
"""Tokens that may be missing of what was believed cached: a block, or what was estimated."""

NEWS_HEADER = "headrace-prefix"
"""In which a door tells a replica what a request begins with, for the replica to tell other doors
(api/prefix_news.py)."""
PROMPT_HEADER = "headrace-prompt"
"""Of an answer: what `answered` is to be told."""
NEWS_VERSION = "1"
NEWS_CUTS = 8

_RENDERED_FIRST = (
    *("model", "cache_salt", "tools", "functions", "tool_choice", "documents", "chat_template"),
    *("chat_template_kwargs", "reasoning_effort", "system", "instructions", "suffix"),
)
"""Members that stand before the messages in a prompt, or change how all of it is rendered."""
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Prefix:
    """The cuts of one request."""

    keys: tuple[int, ...]
    """Chained, shortest prefix first."""
    ends: tuple[int, ...]
    """Bytes up to each cut."""
    opening: int
    """The key that requests of one conversation share: through its first message that is no
    system prompt."""
    num_bytes: int
    """Of the whole request, keyed or not."""


def prefix_of(body: Mapping[str, Any]) -> Prefix:
    """Cuts and keys of a parsed request body of any endpoint that computes a prompt."""
    parts, opening_part = _parts(body)
    key, total, opening = b"", 0, 0
    keys: list[int] = []
    ends: list[int] = []
    for index, part in enumerate(parts):
        keyed = part[: MAX_BYTES - total]
        for start in range(0, len(keyed), CHUNK):
            chunk = keyed[start : start + CHUNK]
            key = hashlib.blake2b(chunk, digest_size=8, key=key).digest()
            total += len(chunk)
            keys.append(int.from_bytes(key, "little"))
            ends.append(total)
        if index == opening_part:
            opening = keys[-1]
    return Prefix(tuple(keys), tuple(ends), opening, sum(map(len, parts)))


def news_of(prefix: Prefix) -> str:
    """The value of the header NEWS_HEADER for a request: the last of its cuts, and its opening."""
    first = prefix.keys.index(prefix.opening) if prefix.opening in prefix.keys else 0
    cuts = sorted({first, *range(max(len(prefix.keys) - NEWS_CUTS, 0), len(prefix.keys))})
    told = " ".join(f"{prefix.keys[cut]:x}:{prefix.ends[cut]}" for cut in cuts)
    return f"{NEWS_VERSION} {told}"


def told_of(value: str) -> tuple[int, int] | None:
    """(prompt tokens, those of them that were cached) by the header PROMPT_HEADER of an answer, or
    None when it says something else."""
    try:
        told = dict(member.split("=") for member in value.split(";"))
        return int(told["tokens"]), int(told["cached"])
    except (ValueError, KeyError):
        return None


def _parts(body: Mapping[str, Any]) -> tuple[list[bytes], int]:
    """The bytes between places where prompts may part, and the index of the opening part."""
    # No part of its own: without tools it is no prefix worth to be remembered.
    first = _encode([body.get(name) for name in _RENDERED_FIRST])
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        parts = [_encode(message) for message in messages]
        parts[0] = first + parts[0]
        turns = (i for i, message in enumerate(messages) if not _is_system(message))
        return parts, next(turns, len(parts) - 1)
    prompt = body.get("prompt", messages)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]  # of several prompts
    text = prompt.encode("utf-8", "replace") if isinstance(prompt, str) else _encode(prompt)
    # Texts have no turns: what begins alike belongs together.
    return [first + text[:CHUNK], text[CHUNK:]], 0


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


@dataclass(slots=True)
class _Replica:
    """The prefixes that one replica is believed to hold, as its cache would: least recently used
    first, within a number of tokens."""

    largest: int = DEFAULT_CAPACITY
    """Tokens that fit into its KV cache."""
    capacity: float = DEFAULT_CAPACITY
    """Tokens that it has been seen to keep."""
    tokens: int = 0
    segments: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """Key of a cut -> tokens between the cut before it and this one."""


class PrefixIndex:
    """Which replica holds which prefixes, as far as one door can tell. One for each model.

    Each door has its own. What others send it learns from the replicas (`heard`).
    """

    def __init__(self, max_keys: int = 200_000) -> None:
        """`max_keys`: of all replicas together; about 250 bytes each."""
        self.tokens_per_byte = TOKENS_PER_BYTE
        self._max_keys = max_keys
        self._num_keys = 0
        self._replicas: OrderedDict[str, _Replica] = OrderedDict()
        self._holders: dict[int, dict[str, None]] = {}

    def __len__(self) -> int:
        """Keys held, of all replicas."""
        return self._num_keys

    def request(self, prefix: Prefix, session: str | None = None) -> RouteRequest:
        """What choose() needs to know. `session`: what the client calls it, if it does."""
        goes_on = len(prefix.keys) > 1 and prefix.opening in prefix.keys[:-1]
        return RouteRequest(
            continued_tokens=self.estimate(prefix.ends[-2]) if goes_on else 0,
            prompt_tokens=max(self.estimate(prefix.num_bytes), 1),
            affinity=prefix.opening if session is None else key_of(session.encode()),
            prefix_keys=prefix.keys,
            session=session,
            cached_tokens=self.match(prefix),
        )

    def match(self, prefix: Prefix) -> dict[str, int]:
        """Address -> tokens of this prompt that are believed cached there; only those with any."""
        found: dict[str, int] = {}
        for key, end in zip(reversed(prefix.keys), reversed(prefix.ends), strict=True):
            holders = self._holders.get(key)
            if holders and len(holders) > len(found):
                tokens = self.estimate(end)
                for address in holders:
                    found.setdefault(address, tokens)
        return found

    def estimate(self, num_bytes: int) -> int:
        return int(num_bytes * self.tokens_per_byte)

    def sent(self, prefix: Prefix, address: str) -> None:
        """A request went to `address`, which will have all of its prefix when it answers."""
        replica = self._replicas.setdefault(address, _Replica())
        segments, begin = replica.segments, 0
        for key, end in zip(prefix.keys, prefix.ends, strict=True):
            tokens, begin = self.estimate(end) - self.estimate(begin), end
            if key in segments:
                continue
            segments[key] = tokens
            replica.tokens += tokens
            self._num_keys += 1
            self._holders.setdefault(key, {})[address] = None
        for key in reversed(prefix.keys):
            segments.move_to_end(key)  # the tail of a sequence is evicted before its head
        self._evict(address, replica)

    def answered(
        self, prefix: Prefix, request: RouteRequest, address: str, prompt_tokens: int, cached: int
    ) -> None:
        """What the replica told of the request that was sent: tokens of the prompt, and how many
        of them were cached when it came.

        A replica that lacks what it was believed to hold keeps less than was assumed; the belief
        about the prompt itself is right again, for now the replica has computed it.
        """
        if prefix.num_bytes and prompt_tokens > 0:
            self.tokens_per_byte += 0.02 * (prompt_tokens / prefix.num_bytes - self.tokens_per_byte)
        believed = request.cached_tokens.get(address, 0)
        replica = self._replicas.get(address)
        if replica is None or not believed:
            return
        if cached + TOLERANCE + believed // 8 < believed:
            replica.capacity = max(replica.capacity * 0.9, replica.largest / 16)
            self._evict(address, replica)
        else:
            replica.capacity = min(replica.capacity * 1.01, replica.largest)

    def heard(self, address: str, news: Iterable[str]) -> None:
        """Values of the header NEWS_HEADER that a replica got, from this door or another: what is
        in GET /load?since=. Those that cannot be read are left out."""
        for value in news:
            version, _, cuts = value.partition(" ")
            if version != NEWS_VERSION:
                continue
            try:
                pairs = [cut.split(":") for cut in cuts.split()]
                keys = tuple(int(key, 16) for key, _ in pairs)
                ends = tuple(int(end) for _, end in pairs)
            except ValueError:
                continue
            self.sent(Prefix(keys, ends, 0, 0), address)

    def set_capacity(self, address: str, tokens: int) -> None:
        """Tokens that fit into the KV cache of `address`, as GET /load tells (blocks x size)."""
        replica = self._replicas.setdefault(address, _Replica())
        if tokens > 0 and tokens != replica.largest:
            replica.largest = tokens
            replica.capacity = tokens
            self._evict(address, replica)

    def forget(self, address: str) -> None:
        """The replica is gone, or has started anew."""
        replica = self._replicas.pop(address, None)
        if replica is not None:
            for key in list(replica.segments):
                self._drop(address, replica, key)

    def _evict(self, address: str, replica: _Replica) -> None:
        while replica.segments and replica.tokens > replica.capacity:
            self._drop(address, replica, next(iter(replica.segments)))
        while self._num_keys > self._max_keys:
            # The replica whose prefixes are the most: it can spare its oldest.
            fullest = max(self._replicas, key=lambda name: len(self._replicas[name].segments))
            replica = self._replicas[fullest]
            for key in list(replica.segments)[: max(len(replica.segments) // 8, 1)]:
                self._drop(fullest, replica, key)

    def _drop(self, address: str, replica: _Replica, key: int) -> None:
        replica.tokens -= replica.segments.pop(key)
        self._num_keys -= 1
        holders = self._holders[key]
        del holders[address]
        if not holders:
            del self._holders[key]

    def check_invariants(self) -> None:
        """Both directions say the same, and the counts are right; raises AssertionError."""
        pairs = {(key, name) for name, held in self._replicas.items() for key in held.segments}
        assert pairs == {(key, name) for key, names in self._holders.items() for name in names}
        assert len(pairs) == self._num_keys <= self._max_keys
        for replica in self._replicas.values():
            assert replica.tokens == sum(replica.segments.values()) <= max(replica.capacity, 0)
