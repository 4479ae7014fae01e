"""functions and function_call of OpenAI's first function calling, as the tools that replaced them.

https://platform.openai.com/docs/api-reference/chat/create#chat-create-functions. A request of that
kind becomes one with tools; its answer has the old shape. Its messages are protocol.py's matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from headrace.api.chat_message import ChoiceMessage
from headrace.api.generation import TextDelta
from headrace.api.protocol import ChatCompletionRequest, Tool
from headrace.errors import InvalidRequestError, RequestError
from headrace.text.message_text import MessagePiece

_RENAMED = (
    (r"tools\[(\d+)\]\.function", r"functions[\1]"),
    (r"tools", "functions"),
    (r"tool_choice\.function\.name", "function_call.name"),
    (r"tool_choice", "function_call"),
)


def uses_functions(body: ChatCompletionRequest) -> bool:
    return bool(body.functions) or body.function_call not in (None, "none", "auto")


def with_tools(body: ChatCompletionRequest) -> ChatCompletionRequest:
    """A body that uses functions as the same with tools. Raises InvalidRequestError."""
    for theirs in ("tools", "tool_choice"):
        if getattr(body, theirs):
            raise InvalidRequestError(
                f"functions and {theirs} exclude each other; send tools and tool_choice.",
                param="functions",
            )
    choice: Any = body.function_call
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    elif choice not in (None, "none", "auto"):
        raise InvalidRequestError(
            'function_call must be "none", "auto" or {"name": "..."}.', param="function_call"
        )
    tools = [Tool(type="function", function=function) for function in body.functions or ()]
    return body.model_copy(
        update={"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    )


@contextmanager
def own_names() -> Iterator[None]:
    """Around what raises errors in terms of tools."""
    try:
        yield
    except RequestError as error:
        theirs = error.param or ""
        for pattern, ours in _RENAMED:
            if re.match(pattern, theirs):
                param = re.sub(pattern, ours, theirs, count=1)
                message = error.message.replace(theirs, param)
                raise type(error)(message, param=param, code=error.code) from error
        raise


class FunctionMessage(ChoiceMessage):
    """A message with at most one call, as its function_call."""

    call_reason = "function_call"

    def whole(self, deltas: Sequence[TextDelta]) -> tuple[dict[str, Any], str | None]:
        fields, finish_reason = super().whole(deltas)
        if calls := fields.pop("tool_calls", None):
            fields["function_call"] = calls[0]["function"]
        return fields, finish_reason

    def fields(self, pieces: Sequence[MessagePiece]) -> dict[str, Any]:
        fields = super().fields(pieces)
        if calls := fields.pop("tool_calls", None):
            fields["function_call"] = calls[0]["function"]
        return fields
