"""Server-sent events on their way through the door: cut at blank lines, their journal taken out.

A replica that knows the header `headrace-journal` begins each event that stands for new tokens
with a comment line: `: headrace {"c": [[CHOICE, [IDS], FINISH_REASON_OR_NULL], ...]}`; the first
one also has "head". Clients never see it. What was forwarded whole can go on at another replica.
"""

from __future__ import annotations

from typing import Any

import msgspec

MARK = b": headrace "
_MAX_TAIL = 1 << 20
"""Bytes without a blank line after which a stream without a journal is no stream of events."""
_FOLD = 4096
"""Journal lines kept as they came; beyond, they become ids."""
_ENDS = (b"data: [DONE]", b"event: message_stop", b"event: response.completed")


class _Line(msgspec.Struct):
    c: list[tuple[int, list[int], str | None]] = []
    head: Any = None


class _Choice:
    __slots__ = ("finish_reason", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None


_decode_line = msgspec.json.Decoder(_Line).decode


class EventCutter:
    """Forwards whole events only, so that an error event can follow, and counts them."""

    def __init__(self) -> None:
        self.events = 0
        """Forwarded; comments are none."""
        self._tail = b""
        self.last = b""
        """What was forwarded last."""

    def feed(self, data: bytes) -> bytes:
        """What can be forwarded."""
        data = self._tail + data if self._tail else data
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
        if end < 4:  # neither was found
            if len(data) <= _MAX_TAIL:
                self._tail = data
                return b""
            end = len(data)
        self._tail = data[end:]
        self.events += 1  # some: only whether there are any counts without a journal
        self.last = data[:end]
        return self.last

    def rest(self) -> bytes:
        """What came after the last whole event; the stream has ended."""
        tail, self._tail = self._tail, b""
        return tail

    @property
    def complete(self) -> bool:
        """Whether the event that ends such streams was forwarded."""
        block = self.last.rstrip().rpartition(b"\n\n")[2]
        return block.startswith(_ENDS)


class Journal(EventCutter):
    """Knows the tokens of the events that were forwarded."""

    def __init__(self) -> None:
        super().__init__()
        self.head: Any = None
        self._lines: list[bytes] = []
        self._choices: dict[int, _Choice] = {}

    def feed(self, data: bytes) -> bytes:
        if self._tail:
            data = self._tail + data
        forwarded = []
        start = 0
        while (end := data.find(b"\n\n", start) + 2) > 1:
            if data.startswith(MARK, start):
                line_end = data.find(b"\n", start)
                self._lines.append(data[start + len(MARK) : line_end])
                start = line_end + 1
                if start + 1 == end:  # the blank line alone: nothing to forward
                    start = end
                    continue
            if not data.startswith(b":", start):
                self.events += 1
            forwarded.append(data[start:end])
            start = end
        self._tail = data[start:]
        if len(self._lines) > _FOLD:
            self._fold()
        if not forwarded:
            return b""
        self.last = forwarded[-1]
        return forwarded[0] if len(forwarded) == 1 else b"".join(forwarded)

    def resumption(self) -> dict[str, Any]:
        """The member `headrace_resume` of the request that goes on from here. Raises ValueError if
        a replica's journal cannot be read."""
        self._fold()
        self._tail = b""
        choices = sorted(self._choices.items())
        return {
            "head": self.head,
            "c": [[index, it.token_ids, it.finish_reason] for index, it in choices],
            "events": self.events,
        }

    def _fold(self) -> None:
        lines, self._lines = self._lines, []
        for line in lines:
            decoded = _decode_line(line)
            if self.head is None:
                self.head = decoded.head
            for index, token_ids, finish_reason in decoded.c:
                choice = self._choices.get(index) or self._choices.setdefault(index, _Choice())
                choice.token_ids += token_ids
                choice.finish_reason = finish_reason or choice.finish_reason


def with_resumption(body: bytes, resumption: dict[str, Any]) -> bytes:
    """A request's body, which is a JSON object with members, with one more."""
    end = body.rindex(b"}")
    return body[:end] + b',"headrace_resume":' + msgspec.json.encode(resumption) + body[end:]
