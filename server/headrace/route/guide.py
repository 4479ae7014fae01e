"""What the door knows beyond loads: which replica has what.

`Guide` feeds choose(); `Whereabouts` remembers who keeps a stored response, a file or a batch.
"""

from __future__ import annotations

import re
from collections import OrderedDict

from headrace.route.asked import Asked, Kind
from headrace.route.choose import RouteRequest
from headrace.route.fleet import Replica

MAX_THINGS = 100_000
_ID = re.compile(rb'"id":\s*"((?:resp|file|batch)[-_][\w-]{1,100})"')
_RESPONSES = "/v1/responses"
_LOOK = 4096
"""Bytes at the beginning of an answer in which the id of what it made stands."""


class Guide:
    """Says what choose() is to know of a request, and hears what became of it."""

    def request(self, asked: Asked) -> RouteRequest:
        return asked.route_request()

    def sent(self, asked: Asked, replica: Replica) -> None:
        """It goes there."""

    def ended(self, asked: Asked, replica: Replica) -> None:
        """It has ended there, well or not."""


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
