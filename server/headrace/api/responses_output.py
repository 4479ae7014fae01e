"""The output items of a response, built from the pieces of a message, and the events that tell of
each step.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from headrace.api.responses_items import Item, ItemIds
from headrace.text.message_text import MessagePiece, Reasoning
from headrace.text.tool_calls import Arguments, CallBroken, CallEnd, CallStart, Content

_encode = msgspec.json.Encoder().encode
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_TEXT_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}


class Emit(Protocol):
    def __call__(self, kind: str, **fields: Any) -> None:
        """Take an event of this type."""
        ...


def no_events(kind: str, **fields: Any) -> None:
    """For answers that are not streamed."""


def event_bytes(kind: str, number: int, fields: dict[str, Any]) -> bytes:
    """A server-sent event; its data has the type, too."""
    data = _encode({"type": kind, "sequence_number": number, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


class ResponseOutput:
    """`live`: what was told is told, so that a call that turns out to be none ends as incomplete.
    Otherwise calls are held back until they are complete, and the text of others is content."""

    def __init__(self, ids: ItemIds, emit: Emit = no_events, *, live: bool = False) -> None:
        self.items: list[Item] = []
        self._ids = ids
        self._emit = emit
        self._live = live
        self._held: list[MessagePiece] | None = None
        self._open: Item | None = None
        self._texts: list[str] = []
        self._logprobs: list[Any] = []

    def add(self, piece: MessagePiece, logprobs: Sequence[Any] = ()) -> None:
        """`logprobs`: of the tokens that a Content consists of."""
        if not self._live and not isinstance(piece, Reasoning | Content):
            if isinstance(piece, CallStart):
                self._held = []
            if isinstance(piece, CallBroken):
                self._held = None
                piece = Content(piece.text)
            elif self._held is not None:
                self._held.append(piece)
                if not isinstance(piece, CallEnd):
                    return
                for held in self._held:
                    self._tell(held, ())
                self._held = None
                return
        self._tell(piece, logprobs)

    def end(self, *, incomplete: bool) -> None:
        """No piece follows. `incomplete`: the last item has been cut off."""
        if not self.items:  # clients look for the message of an answer that is empty, too
            self._begin("message", content=[])
        self._close("incomplete" if incomplete else "completed")

    def _tell(self, piece: MessagePiece, logprobs: Sequence[Any]) -> None:
        match piece:
            case Content(text):
                self._add_text("message", text, {"logprobs": list(logprobs)})
            case Reasoning(text):
                self._add_text("reasoning", text, {})
            case CallStart(call_id, name):
                self._begin("function_call", call_id=call_id, name=name, arguments="")
            case Arguments(text):
                self._texts.append(text)
                self._emit("response.function_call_arguments.delta", delta=text, **self._place())
            case CallEnd():
                self._close("completed")
            case CallBroken():
                self._close("incomplete")

    def _add_text(self, kind: str, text: str, more: dict[str, Any]) -> None:
        if self._open is None or self._open["type"] != kind:
            self._begin(kind, content=[])
        self._texts.append(text)
        self._logprobs += more.get("logprobs", ())
        self._emit(
            f"{_TEXT_EVENTS[kind]}.delta", delta=text, content_index=0, **more, **self._place()
        )

    def _begin(self, kind: str, **fields: Any) -> None:
        self._close("completed")
        self._open = {"id": self._ids.new(_PREFIXES[kind]), "type": kind, **fields}
        if kind == "message":
            self._open["role"] = "assistant"
        elif kind == "reasoning":
            self._open["summary"] = []
        self._open["status"] = "in_progress"
        self.items.append(self._open)
        index = len(self.items) - 1
        self._emit("response.output_item.added", output_index=index, item=self._open)
        if kind in _TEXT_EVENTS:
            part = self._part("", [])
            self._emit("response.content_part.added", part=part, content_index=0, **self._place())

    def _close(self, status: str) -> None:
        """The open item is over, if there is one."""
        item = self._open
        if item is None:
            return
        text, place = "".join(self._texts), self._place()
        if item["type"] == "function_call":
            item["arguments"] = text
            done = {"name": item["name"], "arguments": text}
            self._emit("response.function_call_arguments.done", **done, **place)
        else:
            part = self._part(text, self._logprobs)
            item["content"] = [part]
            more = {"logprobs": self._logprobs} if item["type"] == "message" else {}
            place["content_index"] = 0
            self._emit(f"{_TEXT_EVENTS[item['type']]}.done", text=text, **more, **place)
            self._emit("response.content_part.done", part=part, **place)
        item["status"] = status
        index = len(self.items) - 1
        self._emit("response.output_item.done", output_index=index, item=item)
        self._open, self._texts, self._logprobs = None, [], []

    def _part(self, text: str, logprobs: list[Any]) -> Item:
        assert self._open is not None
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.items) - 1}
