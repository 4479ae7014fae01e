"""The items of /v1/responses: what came in, as it is kept and listed, and as chat messages.

https://platform.openai.com/docs/api-reference/responses/object. Items are JSON objects in OpenAI's
shapes, each with an id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from headrace.errors import InvalidRequestError, UnsupportedParameterError

Item = dict[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
_PART_TYPES = ("input_text", "output_text", "text")
_ID = re.compile(r"[a-z]+_([0-9a-f]{24})_\d{1,9}")
_GIVEN_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class ItemIds:
    """Ids for the items of one response, input and output. They tell which response it is."""

    def __init__(self, response_id: str) -> None:
        self._stem = response_id.removeprefix("resp_")
        self._number = 0
        self._used: set[str] = set()

    def new(self, prefix: str) -> str:
        self._number += 1
        return f"{prefix}_{self._stem}_{self._number}"

    def given_or_new(self, given: Any, prefix: str) -> str:
        """An item keeps its id, unless another one has it."""
        usable = isinstance(given, str) and _GIVEN_ID.fullmatch(given) and given not in self._used
        item_id = given if usable else self.new(prefix)
        self._used.add(item_id)
        return str(item_id)


def response_of(item_id: str) -> str | None:
    """The id of the response that gave an item its id."""
    found = _ID.fullmatch(item_id)
    return f"resp_{found[1]}" if found else None


# --- input --------------------------------------------------------------------------------------


def input_items(given: str | list[Item], ids: ItemIds) -> list[Item]:
    """`input` as items in full. References to items have been replaced.

    Raises InvalidRequestError, or UnsupportedParameterError for what is not text, by path.
    """
    if isinstance(given, str):
        content = [{"type": "input_text", "text": given}]
        return [_message("user", content, ids.new("msg"))]
    return [_item(item, f"input[{index}]", ids) for index, item in enumerate(given)]


def _item(item: Item, where: str, ids: ItemIds) -> Item:
    kind = item.get("type") or "message"
    match kind:
        case "message":
            return _input_message(item, where, ids)
        case "function_call":
            return {
                "id": ids.given_or_new(item.get("id"), "fc"),
                "type": "function_call",
                "call_id": _text(item, "call_id", where),
                "name": _text(item, "name", where),
                "arguments": _text(item, "arguments", where),
                "status": "completed",
            }
        case "function_call_output":
            output = item.get("output")
            if not isinstance(output, str):
                output = _parts(output, f"{where}.output", "input_text")
            return {
                "id": ids.given_or_new(item.get("id"), "fco"),
                "type": "function_call_output",
                "call_id": _text(item, "call_id", where),
                "output": output,
                "status": "completed",
            }
        case "reasoning":
            return _reasoning(item, where, ids)
    raise UnsupportedParameterError(
        f"{where}.type {str(kind)[:64]!r} is not supported: items are messages, function_call, "
        "function_call_output, reasoning and item_reference.",
        param=f"{where}.type",
    )


def _input_message(item: Item, where: str, ids: ItemIds) -> Item:
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidRequestError(
            f"{where}.role must be one of {', '.join(_ROLES)}, got {str(role)[:64]!r}.",
            param=f"{where}.role",
        )
    kind = "output_text" if role == "assistant" else "input_text"
    content = item.get("content")
    if isinstance(content, str):
        parts = [_part(content, kind)]
    else:
        parts = _parts(content, f"{where}.content", kind)
    return _message(str(role), parts, ids.given_or_new(item.get("id"), "msg"))


def _message(role: str, content: list[Item], item_id: str) -> Item:
    return {
        "id": item_id,
        "type": "message",
        "role": role,
        "content": content,
        "status": "completed",
    }


def _reasoning(item: Item, where: str, ids: ItemIds) -> Item:
    parts: dict[str, list[Item]] = {"summary": [], "content": []}
    for field, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        listed = item.get(field) or []
        if not isinstance(listed, list):
            raise InvalidRequestError(
                f"{where}.{field} must be an array.", param=f"{where}.{field}"
            )
        for index, part in enumerate(listed):
            path = f"{where}.{field}[{index}]"
            text = _text(part if isinstance(part, dict) else {}, "text", path)
            parts[field].append({"type": kind, "text": text})
    if item.get("encrypted_content") and not any(parts.values()):
        path = f"{where}.encrypted_content"
        raise UnsupportedParameterError(
            f"{path} cannot be read here; leave the item out, or send its text.", param=path
        )
    item_id = ids.given_or_new(item.get("id"), "rs")
    return {"id": item_id, "type": "reasoning", **parts, "status": "completed"}


def _parts(content: Any, where: str, kind: str) -> list[Item]:
    if not isinstance(content, list):
        raise InvalidRequestError(
            f"{where} must be a string or an array of parts.", param=where, code="invalid_type"
        )
    shaped = []
    for index, part in enumerate(content):
        path = f"{where}[{index}]"
        given = part.get("type") if isinstance(part, dict) else None
        if given == "refusal" and kind == "output_text":
            shaped.append({"type": "refusal", "refusal": _text(part, "refusal", path)})
        elif given in _PART_TYPES:
            shaped.append(_part(_text(part, "text", path), kind))
        else:
            raise UnsupportedParameterError(
                f'{path} must be {{"type": "{kind}", "text": "..."}}: this server takes only '
                f"text, got type {str(given)[:64]!r}.",
                param=path,
            )
    return shaped


def _part(text: str, kind: str) -> Item:
    part: Item = {"type": kind, "text": text}
    return {**part, "annotations": []} if kind == "output_text" else part


def _text(item: Item, field: str, where: str) -> str:
    value = item.get(field)
    if isinstance(value, str):
        return value
    path = f"{where}.{field}"
    if value is None:
        raise InvalidRequestError(
            f"{path} is required; give it a string.",
            param=path,
            code="missing_required_parameter",
        )
    raise InvalidRequestError(f"{path} must be a string.", param=path, code="invalid_type")


# --- messages -----------------------------------------------------------------------------------


class Conversation:
    """Chat messages from items; what one assistant turn consists of becomes one message."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.origins: list[str] = []
        """For each message the field that it was made from."""
        self._turn: dict[str, Any] | None = None
        """The assistant's message, while items may still add to it."""

    def instruct(self, instructions: str) -> None:
        self._add({"role": "system", "content": instructions}, "instructions")

    def add(self, items: Iterable[Item], origin: str) -> None:
        """`origin`: the field they came from; "input[{}]" takes the item's index."""
        for index, item in enumerate(items):
            self._add_item(item, origin.format(index))

    def _add_item(self, item: Item, origin: str) -> None:
        match item["type"]:
            case "reasoning":
                texts = [part["text"] for part in item["content"] or item["summary"]]
                if texts:
                    self._open_turn(origin, "reasoning_content")["reasoning_content"] = "\n".join(
                        texts
                    )
            case "function_call" if item["status"] == "incomplete":
                pass  # its arguments are no JSON
            case "function_call":
                turn = self._turn or self._open_turn(origin, "tool_calls")
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                turn.setdefault("tool_calls", []).append(call)
            case "function_call_output":
                self._turn = None
                content = item["output"]
                content = content if isinstance(content, str) else _chat_content(content)
                result = {"role": "tool", "tool_call_id": item["call_id"], "content": content}
                self._add(result, origin)
            case _ if item["role"] == "assistant":
                content = _chat_content(item["content"])
                if self._turn is not None and "tool_calls" in self._turn:
                    self._turn["content"] = (self._turn.get("content") or "") + content
                else:
                    self._open_turn(origin, "content")["content"] = content
            case _:
                self._turn = None
                self._add({"role": item["role"], "content": _chat_content(item["content"])}, origin)

    def _open_turn(self, origin: str, field: str) -> dict[str, Any]:
        """The assistant's message that `field` is to be set in: a new one if it is in there, or
        what comes after it in a turn."""
        order = ("reasoning_content", "content", "tool_calls")
        later = order[order.index(field) :]
        if self._turn is None or any(name in self._turn for name in later):
            self._turn = {"role": "assistant"}
            self._add(self._turn, origin)
        return self._turn

    def _add(self, message: dict[str, Any], origin: str) -> None:
        self.messages.append(message)
        self.origins.append(origin)


def _chat_content(parts: list[Item]) -> str:
    return "\n".join(part.get("text") or part.get("refusal") or "" for part in parts)
