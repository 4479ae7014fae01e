"""Conversations with tools for chat templates that do not take them as clients send them.

Where a template has no place for tools they are described in a system message, calls and results
become text, and what is asked for is the "generic" format of tool_calls.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_INSTRUCTIONS = """\
You may call the functions below to help with the user's request. Each line is the JSON \
description of one function:
{tools}

To call a function, write nothing but this, once for each call:
<tool_call>
{{"name": "function name", "arguments": {{"argument name": "value"}}}}
</tool_call>
You then get the results between <tool_response> and </tool_response>. If no function is needed, \
answer as usual."""


def with_tools_as_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation with system, user and assistant messages only. Messages are as in
    ChatTemplate.render; `tools` in OpenAI's shape."""
    written: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:  # templates want turns to alternate
                written[-1]["content"] += f"\n{result}"
            else:
                written.append({"role": "user", "content": result})
        elif calls := message.get("tool_calls"):
            parts = [message["content"], *map(_call_text, calls)]
            text = "\n".join(part for part in parts if part)
            written.append({"role": message["role"], "content": text})
        else:
            written.append(dict(message))
        after_result = is_result
    if not tools:
        return written
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=listed)
    if written and written[0]["role"] in ("system", "developer"):
        written[0]["content"] = f"{written[0]['content']}\n\n{text}"
        return written
    return [{"role": "system", "content": text}, *written]


def with_ids(
    messages: Sequence[Mapping[str, Any]], new_id: Callable[[str], str]
) -> list[dict[str, Any]]:
    """The conversation with every call's id, and that of its result, as `new_id` makes it."""
    written = [dict(message) for message in messages]
    for message in written:
        if call_id := message.get("tool_call_id"):
            message["tool_call_id"] = new_id(call_id)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [{**call, "id": new_id(call["id"])} for call in calls]
    return written


def is_about_tools(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def _call_text(call: Mapping[str, Any]) -> str:
    name, arguments = json.dumps(call["function"]["name"]), call["function"]["arguments"]
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
