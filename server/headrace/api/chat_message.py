"""The assistant's message in the shapes of /v1/chat/completions: whole, and as deltas of a stream.

Where models think, `reasoning_content` (DeepSeek's name) and `reasoning` (vLLM's) are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from headrace.api.generation import TextDelta
from headrace.api.protocol import ChatCompletionRequest
from headrace.api.tools import ToolUse
from headrace.text.message_text import MessagePiece, MessageText, Reasoning, whole_message
from headrace.text.processor import TextProcessor
from headrace.text.reasoning import ReasoningFormat, ReasoningReader
from headrace.text.tool_calls import Arguments, CallBroken, CallStart, Content
from headrace.text.tool_calls_reader import ToolCallReader

_PROMPT_END = 32  # tokens, for an opening marker and the white space after it


@dataclass(frozen=True, slots=True)
class MessageReader:
    """What is read out of the text of each choice of one request."""

    reasoning: ReasoningFormat | None
    begun: bool
    """The prompt has opened the reasoning."""
    tools: ToolUse | None
    include_reasoning: bool

    @property
    def tells_reasoning(self) -> bool:
        return self.reasoning is not None

    @property
    def names_function(self) -> bool:
        """The request says which function to call."""
        return self.tools is not None and self.tools.named

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that must not be skipped where they are special tokens."""
        return (
            *(self.reasoning.markers if self.reasoning else ()),
            *(self.tools.form.markers if self.tools else ()),
        )

    def message_text(self) -> MessageText:
        reasoning, tools = self.reasoning, self.tools
        return MessageText(
            None if reasoning is None else ReasoningReader(reasoning, begun=self.begun),
            None if tools is None else ToolCallReader(tools.form, tools.callable),
            include_reasoning=self.include_reasoning,
            max_calls=None if tools is None else tools.max_calls,
        )


def message_reader(
    body: ChatCompletionRequest, text: TextProcessor, prompt: list[int], tools: ToolUse | None
) -> MessageReader | None:
    """None where neither reasoning nor calls are to be expected."""
    form = text.reasoning
    if form is None and tools is None:
        return None
    begun = False
    if form is not None:
        end = text.tokenizer.decode(prompt[-_PROMPT_END:], skip_special_tokens=False)
        last = body.messages[-1].content
        continued = body.continue_final_message and isinstance(last, str)
        begun = form.is_open_in(str(last)) if continued else form.is_open_at_end(end)
    return MessageReader(form, begun, tools, body.include_reasoning is not False)


class ChoiceMessage:
    """The message of one choice, whole or piece by piece."""

    call_reason: ClassVar[str] = "tool_calls"
    """The finish_reason of an answer with calls. OpenAI has "stop" where the request named the
    function."""

    def __init__(self, text: MessageText, *, named: bool = False) -> None:
        self._text = text
        self._call_reason = "stop" if named else self.call_reason
        self._calls = 0
        self._broken = False
        self.thought = 0
        """Tokens of reasoning, markers included."""

    def whole(self, deltas: Sequence[TextDelta]) -> tuple[dict[str, Any], str | None]:
        """The message's fields, and the finish_reason."""
        pieces: list[MessagePiece] = []
        for delta in deltas:
            pieces += self._push(delta)
        pieces += self._text.finish()
        message = whole_message(pieces)
        fields: dict[str, Any] = {"content": message.content}
        if not message.content and (message.reasoning or message.calls):
            fields["content"] = None
        if message.reasoning:
            fields |= text_fields("reasoning", message.reasoning)
        if message.calls:
            fields["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in message.calls
            ]
        finish_reason = deltas[-1].finish_reason
        called = message.calls and finish_reason == "stop"
        return fields, self._call_reason if called else finish_reason

    def read(self, delta: TextDelta) -> TextDelta:
        """The same delta, with what its text adds to the message."""
        pieces = self._push(delta)
        reason = delta.finish_reason
        if reason is None:
            if len(pieces) == 1 and isinstance(pieces[0], Content | Reasoning):
                kind: Any = "content" if isinstance(pieces[0], Content) else "reasoning"
                return delta._replace(text=pieces[0].text, kind=kind)
            return delta._replace(text="", kind=None, pieces=pieces)
        pieces += self._text.finish()
        self._broken |= any(isinstance(piece, CallBroken) for piece in pieces)
        calls = self._calls + sum(isinstance(piece, CallStart) for piece in pieces)
        if reason == "stop" and calls and not self._broken:
            reason = self._call_reason
        return delta._replace(text="", kind=None, pieces=pieces, finish_reason=reason)

    def fields(self, pieces: Sequence[MessagePiece]) -> dict[str, Any]:
        """The fields of a delta. A call broken off stays as it is: what was sent was sent; that it
        was none shows in the finish_reason."""
        fields: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            match piece:
                case Content(text):
                    fields["content"] = fields.get("content", "") + text
                case Reasoning(text):
                    fields |= text_fields("reasoning", fields.get("reasoning", "") + text)
                case CallStart(call_id, name):
                    calls[self._calls] = {
                        "index": self._calls,
                        "id": call_id,
                        "type": "function",
                        "function": {"name": name, "arguments": ""},
                    }
                    self._calls += 1
                case Arguments(text):
                    index = self._calls - 1
                    empty = {"index": index, "function": {"arguments": ""}}
                    calls.setdefault(index, empty)["function"]["arguments"] += text
                case CallBroken():
                    self._broken = True
        if calls:
            fields["tool_calls"] = list(calls.values())
        return fields

    def _push(self, delta: TextDelta) -> list[MessagePiece]:
        before = self._text.thinking
        pieces = self._text.push(delta.text)
        if delta.token_id is not None and (before or self._text.thinking):
            self.thought += 1
        return pieces


def text_fields(kind: Literal["content", "reasoning"], text: str) -> dict[str, str]:
    return (
        {"content": text} if kind == "content" else {"reasoning_content": text, "reasoning": text}
    )
