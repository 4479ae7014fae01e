"""An assistant message from the text of an answer: reasoning, content and tool calls.

The chain behind output_text.py: first what is thought is split off, then calls are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from headrace.text.reasoning import ReasoningReader
from headrace.text.tool_calls import Arguments, CallBroken, CallEnd, CallStart, Content, Piece
from headrace.text.tool_calls_reader import ToolCallReader


class Reasoning(NamedTuple):
    """What the model thinks before it answers."""

    text: str


MessagePiece = Reasoning | Piece


class ToolCall(NamedTuple):
    id: str
    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class Message:
    reasoning: str
    content: str
    calls: list[ToolCall]


class MessageText:
    """Feed it the text of one answer, get the pieces of the message in their order."""

    def __init__(
        self,
        reasoning: ReasoningReader | None = None,
        calls: ToolCallReader | None = None,
        *,
        include_reasoning: bool = True,
        max_calls: int | None = None,
    ) -> None:
        """`include_reasoning`: otherwise it is dropped. `max_calls`: those after are dropped."""
        self._reasoning = reasoning
        self._calls = calls
        self._include_reasoning = include_reasoning
        self._calls_left = max_calls

    @property
    def thinking(self) -> bool:
        """Whether the text that comes is reasoning, as far as it is known."""
        return self._reasoning is not None and self._reasoning.thinking

    def push(self, text: str) -> list[MessagePiece]:
        pieces: list[MessagePiece] = []
        if self._reasoning is not None:
            thought, text = self._reasoning.push(text)
            if thought and self._include_reasoning:
                pieces.append(Reasoning(thought))
        if text:
            pieces += [Content(text)] if self._calls is None else self._read(self._calls.push(text))
        return pieces

    def finish(self) -> list[MessagePiece]:
        """What was held back, when no text follows."""
        pieces: list[MessagePiece] = []
        text = ""
        if self._reasoning is not None:
            thought, text = self._reasoning.finish()
            if thought and self._include_reasoning:
                pieces.append(Reasoning(thought))
        if self._calls is None:
            return [*pieces, Content(text)] if text else pieces
        return pieces + self._read(self._calls.push(text)) + self._read(self._calls.finish())

    def _read(self, pieces: list[Piece]) -> list[MessagePiece]:
        if self._calls_left is None:
            return list(pieces)
        wanted: list[MessagePiece] = []
        for piece in pieces:
            if self._calls_left > 0 or isinstance(piece, Content):
                wanted.append(piece)
            if isinstance(piece, CallEnd):
                self._calls_left = max(0, self._calls_left - 1)
        return wanted


def whole_message(pieces: Iterable[MessagePiece]) -> Message:
    """All pieces of an answer together. A call that broke off is content."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ToolCall] = []
    start = CallStart("", "")
    arguments: list[str] = []
    for piece in pieces:
        match piece:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text) | CallBroken(text):
                content.append(text)
            case CallStart():
                start, arguments = piece, []
            case Arguments(text):
                arguments.append(text)
            case CallEnd():
                calls.append(ToolCall(start.id, start.name, "".join(arguments)))
    return Message("".join(reasoning), "".join(content), calls)
