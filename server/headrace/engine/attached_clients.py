"""The engine's end of the clients that attach: API processes that share one engine.

They connect to a listening socket that outlives engines, come and go as they like, and can hold up
nobody: sends to them never block, and when one ends its requests end with it.
"""

from __future__ import annotations

import itertools
import logging
import selectors
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

from headrace.engine.channel import RECEIVE_BYTES, BlockingChannel, FrameReader, frame
from headrace.engine.client import StepOutputs

logger = logging.getLogger(__name__)

HANDLE_BITS = 40
"""A client's handles are below 2^40; above stands, within the engine, the client's number."""
MAX_UNSENT_BYTES = 64 << 20
"""What may wait for a client that does not read; then the engine lets it go."""


class AttachedClient:
    def __init__(self, number: int, end: socket.socket) -> None:
        self.number = number
        self.socket = end
        self.request_ids: set[str] = set()
        """Of its requests that live."""
        self.last_sent = 0.0
        self.unsent = bytearray()
        self._reader = FrameReader()

    def receive(self) -> list[bytes] | None:
        """The messages that are there; None once the client is gone."""
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return list(self._reader.feed(data)) if data else None

    def send(self, message: bytes) -> bool:
        """False if the client is gone, or must go: it has not read for too long."""
        self.last_sent = time.monotonic()
        self.unsent += frame(message)
        return self.flush() and len(self.unsent) <= MAX_UNSENT_BYTES

    def flush(self) -> bool:
        """Send what the kernel takes now. False if the client is gone."""
        try:
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


class Incoming(NamedTuple):
    client: AttachedClient | None
    """None: the client that started this engine."""
    messages: list[bytes] | None
    """None: the client is gone."""


class AttachedClients:
    """Waits for all clients at once, the one at `channel` included, and sorts steps by client."""

    def __init__(self, listener: socket.socket, channel: BlockingChannel) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._channel = channel
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(channel, selectors.EVENT_READ)
        self._numbers = itertools.count(1)
        self._by_number: dict[int, AttachedClient] = {}
        self._owners: dict[str, int] = {}
        """Request id -> number of its client."""
        self._orphans: list[str] = []
        self._newcomers: list[AttachedClient] = []

    def __iter__(self) -> Iterator[AttachedClient]:
        return iter(list(self._by_number.values()))

    def __contains__(self, client: AttachedClient) -> bool:
        return client.number in self._by_number

    def receive(self, timeout: float) -> list[Incoming]:
        """What has come, after waiting up to `timeout` seconds for the first of it."""
        incoming = []
        listener_is_ready = False
        if any(client.unsent for client in self):
            timeout = min(timeout, 0.05)
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._listener:
                listener_is_ready = True
            elif key.fileobj is self._channel:
                incoming.append(Incoming(None, self._channel.receive(0.0)))
            else:
                client: AttachedClient = key.data
                incoming.append(Incoming(client, client.receive()))
        for client in self:
            if not client.flush():
                self.drop(client)
        if listener_is_ready:
            self._accept()
        return incoming

    def _accept(self) -> None:
        """A newcomer is read from the next call on: the requests of one that left are aborted by
        then, and may be submitted again under the same ids."""
        try:
            end, _ = self._listener.accept()
        except OSError:  # it has left again
            return
        end.setblocking(False)
        client = AttachedClient(next(self._numbers), end)
        self._by_number[client.number] = client
        self._newcomers.append(client)
        self._selector.register(end, selectors.EVENT_READ, client)

    def take_newcomers(self) -> list[AttachedClient]:
        """Those accepted since the last call: to be told what this engine is."""
        newcomers, self._newcomers = self._newcomers, []
        return newcomers

    def take_orphans(self) -> list[str]:
        """Requests whose clients left since the last call: to be aborted."""
        orphans, self._orphans = self._orphans, []
        return orphans

    def drop(self, client: AttachedClient) -> None:
        if self._by_number.pop(client.number, None) is None:
            return
        if client.request_ids:
            logger.warning(
                "An API process is gone; its requests are aborted: %d", len(client.request_ids)
            )
        self._selector.unregister(client.socket)
        client.socket.close()
        self._orphans += client.request_ids
        for request_id in client.request_ids:
            self._owners.pop(request_id, None)

    def own(self, client: AttachedClient, request_id: str, handle: int) -> int:
        """Note whose request this is; its handle within the engine."""
        client.request_ids.add(request_id)
        self._owners[request_id] = client.number
        return client.number << HANDLE_BITS | handle

    def send(self, client: AttachedClient, message: bytes) -> None:
        if not client.send(message):
            self.drop(client)

    def split(self, outputs: StepOutputs) -> Iterator[tuple[AttachedClient, StepOutputs]]:
        """The part of each attached client that has one; what is left is the first client's."""
        parts: dict[int, StepOutputs] = {}

        def part(number: int) -> StepOutputs:
            if (found := parts.get(number)) is None:
                found = parts[number] = StepOutputs([], [], [], outputs.stats)
            return found

        mask = (1 << HANDLE_BITS) - 1
        for handle, token_id in zip(outputs.handles, outputs.token_ids, strict=True):
            mine = part(handle >> HANDLE_BITS)
            mine.handles.append(handle & mask)
            mine.token_ids.append(token_id)
        for output in outputs.details:
            number = self._owners.get(output.request_id, 0)
            part(number).details.append(output)
            if number and output.finish_reason is not None:
                del self._owners[output.request_id]
                self._by_number[number].request_ids.discard(output.request_id)
        rest = part(0)
        outputs.handles, outputs.token_ids = rest.handles, rest.token_ids
        outputs.details = rest.details
        for number, mine in parts.items():
            if number in self._by_number:
                yield self._by_number[number], mine
