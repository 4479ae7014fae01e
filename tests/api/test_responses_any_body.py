"""Any JSON whatever is either understood or refused by a RequestError, as in test_any_body.py."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseItemList

from headrace.api.protocol import plain_messages
from headrace.api.responses_answer import request_told_again
from headrace.api.responses_items import Conversation, ItemIds, input_items
from headrace.api.responses_protocol import ResponsesRequest, extensions, own_terms, parse, refused
from headrace.api.responses_store import is_reference
from headrace.api.structured_output import output_grammar
from headrace.api.tools import tool_use
from headrace.errors import RequestError, error_body
from headrace.text.tool_calls import FORMATS

SCALARS: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def of_type(kinds: list[str], *fields: str) -> st.SearchStrategy[dict[str, Any]]:
    """An object with one of these types, and some of the fields it might have."""
    values = st.from_regex(r"[a-z]{1,8}", fullmatch=True) | VALUES
    return st.builds(
        lambda kind, given: {"type": kind, **given},
        st.sampled_from(kinds),
        st.fixed_dictionaries({field: values for field in fields})
        | st.dictionaries(st.sampled_from(fields), values),
    )


PARTS = st.lists(
    of_type(["input_text", "output_text", "refusal", "summary_text"], "text", "refusal") | VALUES,
    max_size=3,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "developer"]) | VALUES},
    optional={"content": st.text(max_size=8) | PARTS, "type": st.just("message")},
)
ITEMS = (
    MESSAGES
    | of_type(["function_call"], "call_id", "name", "arguments", "id")
    | of_type(["function_call_output"], "call_id", "output", "id")
    | st.builds(
        lambda item, content: {**item, "content": content},
        of_type(["reasoning"], "encrypted_content"),
        PARTS | VALUES,
    )
)
TOOL = of_type(["function"], "name") | of_type(["function", "mcp"], "name", "parameters", "strict")
TOOLS = st.lists(TOOL, max_size=3)
CHOICES = of_type(["function", "allowed_tools", "mcp"], "name", "mode", "tools") | VALUES
FORMATS_ASKED = of_type(["text", "json_object", "json_schema"], "name", "schema", "strict")
NAMES = st.sampled_from([*ResponsesRequest.model_fields, *extensions(), *refused(), "unknown"])
BODIES = st.builds(
    lambda more, given: {**more, **given},
    st.just({}) | st.dictionaries(NAMES, VALUES, max_size=2),
    st.fixed_dictionaries(
        {"input": st.lists(ITEMS, min_size=1, max_size=4) | st.text() | VALUES},
        optional={
            "tools": TOOLS,
            "tool_choice": CHOICES,
            "text": st.fixed_dictionaries({"format": FORMATS_ASKED}),
        },
    ),
)


@given(body=BODIES)
@settings(deadline=None, max_examples=300)
def test_any_body(body: dict[str, Any]) -> None:
    try:
        understood(json.dumps(body).encode())
    except RequestError as error:
        answer = error_body(error)["error"]
        assert answer["message"] and len(answer["message"]) < 1000
        assert answer["param"] is None or len(answer["param"]) <= 200


def understood(raw: bytes) -> None:
    request, _ = parse(raw, strict_fields=False)
    if isinstance(request.input, list) and any(map(is_reference, request.input)):
        return
    items = input_items(request.input, ItemIds(f"resp_{0:024x}"))
    listed = {"object": "list", "data": items, "first_id": "", "last_id": "", "has_more": False}
    ResponseItemList.model_validate_json(json.dumps(listed), strict=True)
    conversation = Conversation()
    conversation.add(items, "input[{}]")
    with own_terms(conversation.origins):
        chat = request.chat(conversation.messages)
        assert len(conversation.origins) == len(plain_messages(chat.messages))
        output_grammar(chat, chat.sampling())
        tool_use(chat, FORMATS["hermes"])
        sampling = dataclasses.asdict(chat.sampling())
    told = request_told_again(request, sampling)
    fields = {"id": "r", "object": "response", "created_at": 0, "model": "m", "output": []}
    Response.model_validate_json(msgspec.json.encode({**told, **fields}), strict=True)
