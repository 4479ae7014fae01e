"""A body of the Messages API as a chat request, which is what models and templates know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from headrace.api.field_policy import check_extra_fields
from headrace.api.messages_protocol import (
    REFUSED_IN_TOOLS,
    Blocks,
    CountTokensRequest,
    CustomTool,
    InputMessage,
    MessagesRequest,
)
from headrace.api.protocol import MAX_MESSAGES, ChatCompletionRequest
from headrace.errors import InvalidRequestError, UnsupportedParameterError
from headrace.text.processor import TextProcessor

# Of Claude Code, in its system prompt: it differs from one request to the next, so that with it no
# two requests would share a prefix, and says nothing to the model.
_BILLING_HEADER = "x-anthropic-billing-header:"

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "priority", "cache_salt")
_OF_ROLE = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}
_TAKEN = tuple(dict.fromkeys(kind for kinds in _OF_ROLE.values() for kind in kinds))
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(body: CountTokensRequest, text: TextProcessor) -> ChatCompletionRequest:
    """The same request of /v1/chat/completions.

    Raises UnsupportedParameterError or InvalidRequestError with the name of the field at fault.
    """
    messages = _messages(body)
    continues = messages[-1]["role"] == "assistant"
    if continues:
        _check_prefill(messages[-1], f"messages[{len(body.messages) - 1}]")
    values: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "continue_final_message": continues,
        **_tools(body),
        **_thinking(body, text),
        **_output_config(body),
    }
    if isinstance(body, MessagesRequest):
        values |= {name: getattr(body, name) for name in _SAMPLING}
        values["max_tokens"] = max(body.max_tokens, 1)
        values["stop"] = list(body.stop_sequences)
    return ChatCompletionRequest(**values)


# --- messages -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Turn:
    """A chat message in the making."""

    role: str
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    tool_call_id: str | None = None

    def add(self, other: _Turn) -> None:
        self.texts += other.texts
        self.thoughts += other.thoughts
        self.calls += other.calls

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": "\n".join(self.texts)}
        if self.thoughts:
            message["reasoning_content"] = "\n".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def _messages(body: CountTokensRequest) -> list[dict[str, Any]]:
    turns: list[_Turn] = []
    if body.system:
        texts = list(_system_texts(body.system))
        turns += [_Turn("system", texts)] if texts else []
    for index, message in enumerate(body.messages):
        for turn in _turns(message, f"messages[{index}]"):
            merges = turns and turns[-1].role == turn.role and turn.role in ("user", "assistant")
            if merges:
                turns[-1].add(turn)
            else:
                turns.append(turn)
    if len(turns) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages must hold at most {MAX_MESSAGES} messages and tool results together.",
            param="messages",
        )
    return [turn.message() for turn in turns]


def _system_texts(system: str | Blocks) -> Iterator[str]:
    for where, block in _blocks(system, "system"):
        if block.get("type") != "text":
            raise _refused_block(where, block)
        text = _string(block, "text", where)
        if not text.startswith(_BILLING_HEADER):
            yield text


def _turns(message: InputMessage, where: str) -> Iterator[_Turn]:
    """One turn, or several where there are results of calls: each of them is a message."""
    turn = _Turn(message.role)
    found = False
    for place, block in _blocks(message.content, f"{where}.content"):
        kind = block.get("type")
        if kind not in _OF_ROLE[message.role]:
            raise _refused_block(place, block, message.role)
        if kind == "tool_result":
            if turn.texts:
                yield turn
                turn = _Turn(message.role)
            yield _Turn(
                "tool",
                [_result_text(block, place)],
                tool_call_id=_string(block, "tool_use_id", place),
            )
            found = True
        elif kind == "text":
            turn.texts.append(_string(block, "text", place))
        elif kind == "tool_use":
            turn.calls.append(_call(block, place))
        elif kind == "thinking":
            turn.thoughts.append(_string(block, "thinking", place))
    if turn.texts or not found:
        yield turn


def _blocks(content: str | Blocks, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(content, str):
        yield where, {"type": "text", "text": content}
        return
    for index, block in enumerate(content):
        yield f"{where}[{index}]", block


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"{where}.input must be an object.", param=f"{where}.input")
    function = {
        "name": _string(block, "name", where),
        "arguments": json.dumps(arguments, ensure_ascii=False),
    }
    return {"id": _string(block, "id", where), "type": "function", "function": function}


def _result_text(block: dict[str, Any], where: str) -> str:
    """Chat has no field for `is_error`: the model reads it."""
    content = block.get("content") or ""
    if not isinstance(content, str | list):
        raise InvalidRequestError(
            f"{where}.content must be a string or an array of text blocks.",
            param=f"{where}.content",
        )
    texts = []
    for place, part in _blocks(content, f"{where}.content"):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise _refused_block(place, part)
        texts.append(_string(part, "text", place))
    text = "\n".join(texts)
    if block.get("is_error") and not text.lower().startswith("error"):
        return f"Error: {text}" if text else "Error"
    return text


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if isinstance(value, str):
        return value
    raise InvalidRequestError(f"{where}.{name} must be a string.", param=f"{where}.{name}")


def _refused_block(where: str, block: Any, role: str | None = None) -> Exception:
    kind = block.get("type") if isinstance(block, dict) else None
    if role is not None and kind in _TAKEN:
        return InvalidRequestError(f"{where}: a {kind} is not for {role} messages.", param=where)
    taken = "text" if role is None else ", ".join(_TAKEN)
    return UnsupportedParameterError(
        f"{where} of type {str(kind)[:64]!r} is not supported: what is taken here is {taken}.",
        param=where,
    )


def _check_prefill(message: dict[str, Any], where: str) -> None:
    if message.get("tool_calls"):
        problem = "calls tools; send their results, as tool_result blocks of a user message"
    elif not message["content"].strip():
        problem = "has no text that the answer could continue; leave it out"
    else:
        return
    raise InvalidRequestError(f"{where}, the last message, {problem}.", param=where)


# --- what else there is -------------------------------------------------------------------------


def _tools(body: CountTokensRequest) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if body.tools:
        values["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    choice = body.tool_choice
    if choice is None:
        return values
    if choice.type == "tool":
        if not choice.name:
            raise InvalidRequestError("tool_choice.name is required.", param="tool_choice.name")
        values["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        values["tool_choice"] = _TOOL_CHOICES[choice.type]
    if choice.disable_parallel_tool_use:
        values["parallel_tool_calls"] = False
    return values


def _tool(tool: CustomTool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise UnsupportedParameterError(
            f"{where}.type {tool.type!r} is not supported: give a custom tool, with an "
            "input_schema, and run it in the client.",
            param=f"{where}.type",
        )
    if tool.input_schema is None:
        raise InvalidRequestError(
            f"{where}.input_schema is required.", param=f"{where}.input_schema"
        )
    extra = tool.model_extra or {}
    check_extra_fields(
        {f"{where}.{name}": value for name, value in extra.items() if name in REFUSED_IN_TOOLS},
        strict=False,
        known=(),
        refused={f"{where}.{name}": policy for name, policy in REFUSED_IN_TOOLS.items()},
    )
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _thinking(body: CountTokensRequest, text: TextProcessor) -> dict[str, Any]:
    """What the chat template is told, by the names that templates know."""
    kwargs = dict(body.chat_template_kwargs or {})
    values: dict[str, Any] = {}
    thinking = body.thinking
    if thinking is not None:
        kwargs.setdefault("enable_thinking", thinking.type != "disabled")
        values["include_reasoning"] = thinking.type != "disabled" and thinking.display != "omitted"
        if thinking.budget_tokens and text.reasoning is not None:  # others think no token
            values["thinking_token_budget"] = thinking.budget_tokens
    effort = body.output_config.effort if body.output_config else None
    if effort is not None:
        known = text.chat_template.variables if text.chat_template else frozenset[str]()
        if "reasoning_effort" in known:
            values["reasoning_effort"] = effort
        elif effort != "high":  # as if left out
            raise UnsupportedParameterError(
                f"output_config.effort {effort!r} is not supported: this model's chat template "
                'knows no efforts. Leave it out or set it to "high".',
                param="output_config.effort",
            )
    return {**values, "chat_template_kwargs": kwargs or None}


def _output_config(body: CountTokensRequest) -> dict[str, Any]:
    form = body.output_config.format if body.output_config else None
    if form is None:
        return {}
    schema = {"name": "output", "schema": form.schema_, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}
