"""The answer of the Messages API: one message of content blocks, whole or as events.

https://platform.claude.com/docs/en/api/messages-streaming
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import Request, Response

from headrace.api.chat import ChatTurn
from headrace.api.generation import Choice, TextDelta
from headrace.api.messages_errors import messages_error
from headrace.api.messages_protocol import MessagesRequest
from headrace.api.reply import server_timing, usage_object
from headrace.api.resume import HEADER, VERSION, Head, first_line, head_line, line
from headrace.api.services import services_of
from headrace.api.streaming import EventStream, Outbox, SlowClientError, unless_disconnected
from headrace.errors import EngineError, HeadraceError
from headrace.text.message_text import MessagePiece, Reasoning
from headrace.text.tool_calls import Arguments, CallBroken, CallEnd, CallStart, Content

logger = logging.getLogger(__name__)

PING_SECONDS = 10.0
"""Between events that tell a client, and proxies, that its stream is alive."""

_encode = msgspec.json.Encoder().encode
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_BLOCKS: dict[str, tuple[dict[str, Any], str, str]] = {
    # kind -> the empty block, the kind of its deltas, and the field of those
    "text": ({"type": "text", "text": ""}, "text_delta", "text"),
    "thinking": (
        {"type": "thinking", "thinking": "", "signature": ""},
        "thinking_delta",
        "thinking",
    ),
    "tool_use": ({"type": "tool_use", "input": {}}, "input_json_delta", "partial_json"),
}


class MessageReply:
    def __init__(self, turn: ChatTurn, body: MessagesRequest, ignored_fields: list[str]) -> None:
        self._turn = turn
        self._body = body
        self._generation = turn.generation
        self._choice = turn.generation.choices[0]
        self._ignored_fields = ignored_fields
        self._text = None if turn.reader is None else turn.reader.message_text()
        self._thought = 0
        self._called = self._broken = False
        self.journal = turn.context.journal
        head = self.journal.head if self.journal else None
        self._id = head.id if head else turn.context.response_id
        if self.journal:
            self._generation.cached_tokens = self.journal.cached_tokens

    async def send(self, request: Request) -> Response:
        """Run the generation and answer with it. It ends if the client goes away."""
        headers = {"headrace-sampling": _encode(self._generation.sampling_in_effect()).decode()}
        if self._body.stream:
            limit = services_of(request).config.max_unsent_bytes
            if self.journal is not None:
                headers[HEADER] = VERSION
            return EventStream(self._stream, max_unsent=limit, headers=headers)
        message = await unless_disconnected(request.receive, self._whole())
        if (timing := self._generation.usage.timing) is not None:
            headers["server-timing"] = server_timing(timing)
        return Response(_encode(message), headers=headers, media_type="application/json")

    def frame(self) -> dict[str, Any]:
        """The message without what is known at its end."""
        frame: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._body.model or self._turn.model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self.usage(),
        }
        if self._ignored_fields:
            frame["headrace"] = {"ignored_fields": self._ignored_fields}
        return frame

    def usage(self) -> dict[str, Any]:
        """As Anthropic counts: input_tokens are those that were not cached."""
        usage = self._generation.usage
        cached = usage.cached_tokens or 0
        shaped: dict[str, Any] = {
            "input_tokens": usage.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage.completion_tokens if self._body.max_tokens else 0,
            "service_tier": "standard",
        }
        if self._turn.reader is not None and self._turn.reader.tells_reasoning:
            shaped["output_tokens_details"] = {"thinking_tokens": self._thought}
        if (account := usage_object(usage).get("headrace")) is not None:
            shaped["headrace"] = account
        return shaped

    @property
    def cached_tokens(self) -> int | None:
        return self._generation.usage.cached_tokens

    def head(self) -> Head:
        """What a stream that goes on elsewhere must not change."""
        return Head(
            id=self._id,
            created=0,  # not told
            seed=self._generation.seed,
            fingerprint=self._turn.model.fingerprint,
            cached_tokens=self.cached_tokens,
        )

    def ending(self) -> dict[str, Any]:
        """stop_reason and stop_sequence."""
        sequence = self._choice.stop_string
        reason = _STOP_REASONS[self._choice.finish_reason or "stop"]
        if sequence is not None:
            reason = "stop_sequence"
        elif reason == "end_turn" and self._called and not self._broken:
            reason = "tool_use"
        elif reason == "max_tokens" and self._choice.completion_tokens < self._body.max_tokens:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def read(self, deltas: Sequence[TextDelta]) -> list[MessagePiece]:
        """What the deltas of an output add to the message. Nothing where only the prompt was to be
        cached: the engine makes one token."""
        if not self._body.max_tokens:
            return []
        if self._text is None:
            return [Content(delta.text) for delta in deltas if delta.text]
        pieces: list[MessagePiece] = []
        for delta in deltas:
            before = self._text.thinking
            pieces += self._text.push(delta.text)
            if delta.token_id is not None and (before or self._text.thinking):
                self._thought += 1
            if delta.finish_reason is not None:
                pieces += self._text.finish()
        self._called |= any(isinstance(piece, CallEnd) for piece in pieces)
        return pieces

    async def _whole(self) -> dict[str, Any]:
        pieces: list[MessagePiece] = []
        await self._generation.run(lambda _, deltas: pieces.extend(self.read(deltas)))
        return {**self.frame(), "content": content_blocks(pieces), **self.ending()}

    async def _stream(self, outbox: Outbox) -> None:
        events = _Events(self)

        def put(choice: Choice, deltas: list[TextDelta]) -> None:
            if self.journal is not None:
                outbox.put(events.journaled(choice, deltas))
            elif news := events.of(self.read(deltas)):
                outbox.put(news)

        if rest := events.resumed(self._choice):
            outbox.put(rest)
        pings = asyncio.create_task(_ping(outbox, events))
        try:
            await self._generation.run(put)
            if rest := events.unsent(events.end()):
                outbox.put(rest)
        except SlowClientError:
            raise
        except Exception as error:
            if not events.started:
                raise
            outbox.put(_error_event(error))
        finally:
            pings.cancel()

    def call_broke(self) -> None:
        """What was sent was sent; that it was no call shows in the stop_reason."""
        self._broken = True


def content_blocks(pieces: Sequence[MessagePiece]) -> list[dict[str, Any]]:
    """The blocks of a whole message. A call that broke off is text."""
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    kind = ""

    def end() -> None:
        nonlocal kind
        text = "".join(texts)
        if kind == "text" and text:
            blocks.append({"type": "text", "text": text})
        elif kind == "thinking":
            signature = _signature(hashlib.sha256(text.encode()))
            blocks.append({"type": "thinking", "thinking": text, "signature": signature})
        texts.clear()
        kind = ""

    start = CallStart("", "")
    for piece in pieces:
        match piece:
            case CallBroken(text):
                texts.clear()  # its arguments so far are part of its text
                kind = "text"
                if blocks and blocks[-1]["type"] == "text":
                    texts.append(blocks.pop()["text"])
                texts.append(text)
            case Content(text) | Reasoning(text):
                kind_of_piece = "thinking" if isinstance(piece, Reasoning) else "text"
                if kind != kind_of_piece:
                    end()
                    kind = kind_of_piece
                texts.append(text)
            case CallStart():
                end()
                start, kind = piece, "tool_use"
            case Arguments(text):
                texts.append(text)
            case CallEnd():
                # As it was written: models write numbers and escapes that no decoder takes.
                arguments = msgspec.Raw("".join(texts).encode())
                block = {"type": "tool_use", "id": _tool_use_id(start), "name": start.name}
                blocks.append({**block, "input": arguments})
                end()
    end()
    return blocks


class _Events:
    """The events of one stream. A block's deltas differ in their text only: the JSON around it is
    made once."""

    def __init__(self, reply: MessageReply) -> None:
        self._reply = reply
        self.started = False
        self._index = -1
        self._kind = ""
        """Of the open block; empty between blocks."""
        self._before = b""
        self._thought = hashlib.sha256()
        self._cached_is_due = bool(reply.journal) and reply.cached_tokens is None
        self._told = reply.journal.events if reply.journal else 0
        """Events that another server has sent, and that are still to be passed over."""

    def journaled(self, choice: Choice, deltas: list[TextDelta]) -> bytes:
        """Each token is told with its first event, or on its own if it has none."""
        parts = [] if self.started else [self.start()]
        for delta in deltas:
            ending = choice.ending if delta.finish_reason else None
            told = self.of(self._reply.read([delta]))
            if self._cached_is_due:
                self._cached_is_due = False
                parts.append(first_line(delta.token_id, ending, self._reply.cached_tokens))
            else:
                parts.append(line(choice.index, delta.token_id, ending))
            parts.append(told or b"\n")
        return b"".join(parts)

    def resumed(self, choice: Choice) -> bytes:
        """Take up what another server has sent. What is left to send of it."""
        if not self._told:
            return b""
        assert self._reply.journal is not None
        sent = self._reply.journal.sent.get(choice.index)
        parts = [self.start()]
        if sent is not None:
            parts.append(self.of(self._reply.read(choice.resume(sent))))
        return self.unsent(b"".join(parts))

    def unsent(self, events: bytes) -> bytes:
        """Without those that another server has sent."""
        while self._told and events:
            events = events.partition(b"\n\n")[2]
            self._told -= 1
        return events

    @property
    def ping(self) -> bytes:
        """A comment for doors: they count events, and those must be the same anywhere."""
        return PING if self._reply.journal is None else b": ping\n\n"

    def of(self, pieces: Sequence[MessagePiece]) -> bytes:
        parts = [] if self.started else [self.start()]
        for piece in pieces:
            match piece:
                case Content(text):
                    parts.append(self._delta("text", text))
                case Reasoning(text):
                    self._thought.update(text.encode())
                    parts.append(self._delta("thinking", text))
                case CallStart(_, name):
                    more = {"id": _tool_use_id(piece), "name": name}
                    parts.append(self._open("tool_use", more))
                case Arguments(text):
                    parts.append(self._delta("tool_use", text))
                case CallEnd():
                    parts.append(self._close())
                case CallBroken():
                    self._reply.call_broke()
                    parts.append(self._close())
        return b"".join(parts)

    def start(self) -> bytes:
        self.started = True
        start = _event("message_start", message=self._reply.frame()) + PING
        journal = self._reply.journal
        return start if journal is None or journal.head else head_line(self._reply.head()) + start

    def end(self) -> bytes:
        last = _event("message_delta", delta=self._reply.ending(), usage=self._reply.usage())
        return self._close() + last + _event("message_stop")

    def _delta(self, kind: str, text: str) -> bytes:
        if not text:
            return b""
        opening = b"" if self._kind == kind else self._open(kind, {})
        return b"".join((opening, self._before, _encode(text), b"}}\n\n"))

    def _open(self, kind: str, more: dict[str, Any]) -> bytes:
        closing = self._close()
        block, delta, field = _BLOCKS[kind]
        self._index += 1
        self._kind = kind
        sample = _event("content_block_delta", index=self._index, delta={"type": delta, field: ""})
        self._before = sample.removesuffix(b'""}}\n\n')
        start = _event("content_block_start", index=self._index, content_block={**block, **more})
        return closing + start

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        signed = b""
        if self._kind == "thinking":
            delta = {"type": "signature_delta", "signature": _signature(self._thought)}
            signed = _event("content_block_delta", index=self._index, delta=delta)
            self._thought = hashlib.sha256()
        self._kind = ""
        return signed + _event("content_block_stop", index=self._index)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))


PING = _event("ping")


async def _ping(outbox: Outbox, events: _Events) -> None:
    """The first one begins a stream whose first token is slow to come: from then on errors are
    events."""
    while True:
        await asyncio.sleep(PING_SECONDS)
        outbox.put(events.ping if events.started else events.start())


def _error_event(error: Exception) -> bytes:
    if not isinstance(error, HeadraceError):
        logger.error("A stream failed", exc_info=error)
        error = EngineError("The server failed while it worked on this request.")
    body, _ = messages_error(error)
    return b"event: error\ndata: %b\n\n" % _encode(body)


def _tool_use_id(call: CallStart) -> str:
    return "toolu_" + call.id.removeprefix("call_")


def _signature(thought: Any) -> str:
    """Clients send thinking back with it, and drop thinking without. Nothing is proven by it, and
    it is not checked."""
    return base64.b64encode(thought.digest()).decode()
