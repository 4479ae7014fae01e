"""What the door knows beyond loads: which replica has what.

`Guide` feeds choose(); `Whereabouts` remembers who keeps a stored response, a file or a batch.
"""

from __future__ import annotations

import re
from collections import OrderedDict

from headrace.route.asked import Asked, Kind
from headrace.route.choose import RouteRequest
from headrace.route.fleet import Replica
from headrace.route.prefix import Prefix, PrefixIndex, prefix_of

MAX_THINGS = 100_000
_ID = re.compile(rb'"id":\s*"((?:resp|file|batch)[-_][\w-]{1,100})"')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,12})')
_CACHED = re.compile(rb'"cached_tokens":\s*(\d{1,12})')
_PROMPTS = ("messages", "prompt", "input")
_RESPONSES = "/v1/responses"
_LOOK = 4096
"""Bytes at the beginning of an answer in which the id of what it made stands."""


class Guide:
    """Says what choose() is to know of a request, and hears what became of it."""

    def __init__(self) -> None:
        self._indexes: dict[str, PrefixIndex] = {}

    def request(self, application: str, asked: Asked) -> RouteRequest:
        prefix = self._prefix(asked)
        if prefix is None:
            return asked.route_request()
        return self._index(application).request(prefix, asked.session)

    def sent(self, application: str, asked: Asked, replica: Replica) -> None:
        """It goes there."""
        prefix = self._prefix(asked)
        if prefix is not None:
            index, load = self._index(application), replica.view.load
            if load.kv_total_blocks:
                index.set_capacity(replica.url, load.kv_total_blocks * load.block_size)
            index.sent(prefix, replica.url)

    def answered(
        self, application: str, asked: Asked, request: RouteRequest, replica: Replica, told: bytes
    ) -> None:
        """`told`: the end of the answer; where it has the usage, the belief is corrected."""
        prefix = self._prefix(asked)
        found = _PROMPT.search(told) if prefix is not None else None
        if prefix is None or found is None:
            return
        cached = int(match[1]) if (match := _CACHED.search(told)) else 0
        index = self._index(application)
        index.answered(prefix, request, replica.url, int(found[1]), cached)

    def restarted(self, application: str, replica: Replica) -> None:
        """It was down: its cache is empty."""
        self._index(application).forget(replica.url)

    def _index(self, application: str) -> PrefixIndex:
        return self._indexes.get(application) or self._indexes.setdefault(
            application, PrefixIndex()
        )

    def _prefix(self, asked: Asked) -> Prefix | None:
        """None where there is no prompt."""
        members = asked.parsed if asked.kind is Kind.MODEL else None
        if asked.prefix is None and members and not members.keys().isdisjoint(_PROMPTS):
            asked.prefix = prefix_of(members)
        return asked.prefix


class Whereabouts:
    """Id -> the replica that keeps it, for the newest ones. Another door, or this one after a
    restart, finds them by asking all replicas in turn."""

    def __init__(self) -> None:
        self._replicas: OrderedDict[str, Replica] = OrderedDict()

    def get(self, thing: str) -> Replica | None:
        return self._replicas.get(thing)

    def note(self, thing: str, replica: Replica) -> None:
        self._replicas[thing] = replica
        self._replicas.move_to_end(thing)
        if len(self._replicas) > MAX_THINGS:
            self._replicas.popitem(last=False)

    def learn(self, asked: Asked, answer: bytes, replica: Replica) -> None:
        """`replica` answered `asked` well."""
        makes = asked.method == b"POST" and (asked.kind is Kind.KEPT or asked.path == _RESPONSES)
        if asked.kind is Kind.BY_ID:
            self.note(asked.thing, replica)
        elif makes and (match := _ID.search(answer[:_LOOK])):
            self.note(match[1].decode(), replica)
