"""The table behind expectations.jsonl: requests, and what OpenAI documents to answer them.

Each row is written from https://platform.openai.com/docs/api-reference and the types of
openai-python, not from what this server does. Where it knowingly differs, `differs` says why and
`ours` what it does instead. `python tests/clients/expectations.py` writes the file, and a test
compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".jsonl")
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
HI: Any = [{"role": "user", "content": "Hi"}]
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI, "max_tokens": 2},
    TEXT: {"prompt": "Once", "max_tokens": 2},
    RESPONSES: {"input": "Hi", "max_output_tokens": 16},
    EMBEDDINGS: {"input": "Hi"},
}
GOOD = {
    CHAT: "chat.ChatCompletion",
    TEXT: "Completion",
    RESPONSES: "responses.Response",
    EMBEDDINGS: "CreateEmbeddingResponse",
}
EVENTS = {
    CHAT: ["chat.ChatCompletionChunk+", "[DONE]"],
    TEXT: ["Completion+", "[DONE]"],
    RESPONSES: [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta+",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete|response.completed",
    ],
}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
FLAT_TOOL = {"type": "function", **FUNCTION, "strict": False}
STRICT_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
WIDER = "A wider range is taken than OpenAI's; every value of OpenAI's means the same."

# field: good values; bad values. The bad ones are refused with the field's name.
SAMPLING: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 0.7, 2, None], [-0.1, "hot", []]),
    "top_p": ([0.1, 1, None], [-0.5, 1.5, "all"]),
    "stream": ([False, None], ["yes", 1]),
    "user": (["me"], []),
}
OF_CHAT_AND_TEXT: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 2], [0, 129, 1.5, "two"]),
    "presence_penalty": ([-2, 0, 2], [-2.1, 2.1, "much"]),
    "frequency_penalty": ([-2, 0, 2], [-2.1, 2.1]),
    "seed": ([0, 7, None], ["x", 1.5]),
    "stop": (["x", ["a", "b", "c", "d"], None], [5, [1]]),
    "logit_bias": ([{}, {"5": -100}, {"5": 100}], [{"5": 101}, {"five": 1}, [5]]),
}
FIELDS: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    CHAT: {
        **SAMPLING,
        **OF_CHAT_AND_TEXT,
        "max_completion_tokens": ([1, None], [0, -1, "many"]),
        "logprobs": ([True, False, None], ["all", 3]),
        "response_format": (
            [{"type": "text"}, {"type": "json_object"}],
            [{"type": "xml"}, "json", {"type": "json_schema"}],
        ),
        "tools": ([[TOOL]], [[{"type": "function"}], "f", [{**TOOL, "type": "nothing"}]]),
        "metadata": ([{"a": "b"}], []),
        "service_tier": (["auto", "default"], []),
        "store": ([False, None], []),
        "modalities": ([["text"]], [["text", "audio"]]),
        "messages": (
            [
                [{"role": "system", "content": "Be brief."}, *HI],
                [{"role": "developer", "content": "Be brief."}, *HI],
                [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
                [*HI, {"role": "assistant", "content": "Yes?"}, *HI],
            ],
            [
                [],
                "Hi",
                None,
                [{"role": "nobody", "content": "Hi"}],
                [{"content": "Hi"}],
                [{"role": "user"}],
                [{"role": "user", "content": 5}],
                [*HI, {"role": "tool", "content": "rain"}],
            ],
        ),
    },
    TEXT: {
        **SAMPLING,
        **OF_CHAT_AND_TEXT,
        "max_tokens": ([1], [-1, "many"]),
        "logprobs": ([0, 5, None], [-1, "all", True]),
        "echo": ([True, False], ["yes"]),
        "best_of": ([1], [0, "two"]),
        "suffix": ([None], []),
        "prompt": (
            ["Once", ["Once", "Twice"], [1, 2, 3], [[1, 2], [3]]],
            [5, [], [1, "a"], [10**9], {"a": 1}],
        ),
    },
    RESPONSES: {
        **SAMPLING,
        "max_output_tokens": ([16, None], [-1, "many"]),
        "instructions": (["Be brief.", None], [5]),
        "metadata": ([{"a": "b"}, None], [{"a": 5}, {str(i): "x" for i in range(17)}]),
        "tools": ([[FLAT_TOOL], []], [[{"type": "function"}], "f"]),
        "parallel_tool_calls": ([True, False], ["yes"]),
        "truncation": (["auto", "disabled"], ["some"]),
        "store": ([True, False], ["yes"]),
        "include": ([["message.output_text.logprobs"]], [["everything"], "all"]),
        "text": (
            [{"format": {"type": "text"}}],
            [{"format": {"type": "xml"}}, "json"],
        ),
        "input": (
            [HI, [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]],
            [5, [{"type": "nothing"}], [{"role": "nobody", "content": "Hi"}]],
        ),
        "previous_response_id": ([None], [5]),
    },
    EMBEDDINGS: {
        "input": (["Hi", ["Hi", "Ho"], [1, 2], [[1, 2], [3]]], [5, [], "", [1, "a"], [10**9]]),
        "encoding_format": (["float", "base64"], ["hex"]),
        "user": (["me"], []),
    },
}

# path, body (instead of BASE), what OpenAI answers; beside it, where we differ, why and what we do.
Row = tuple[str, str, Any, dict[str, Any], tuple[str, dict[str, Any]] | None]


def ok(kind: str) -> dict[str, Any]:
    return {"status": 200, "type": kind}


def error(
    status: int, param: str | None = None, code: str | None = None, kind: str | None = None
) -> dict[str, Any]:
    """`param`, `code`: only compared where OpenAI documents them."""
    shape = {"type": kind or "invalid_request_error", "param": param, "code": code}
    given = {name: value for name, value in shape.items() if value is not None}
    return {"status": status, "error": given}


def _of_fields() -> Iterator[Row]:
    for path, fields in FIELDS.items():
        for field, (good, bad) in fields.items():
            for value in good:
                yield "POST", path, {**BASE[path], field: value}, ok(GOOD[path]), None
            for value in bad:
                yield "POST", path, {**BASE[path], field: value}, error(400, field), None


def _of_every_endpoint() -> Iterator[Row]:
    for path, base in BASE.items():
        missing = next(iter(base))
        yield "POST", path, {}, error(400, missing, "missing_required_parameter"), None
        unknown = {**base, "model": "gpt-17"}
        yield "POST", path, unknown, error(404, "model", "model_not_found"), None
        yield "POST", path, "not json", error(400), None
        yield "POST", path, [], error(400), None
        named = ("Accepted, and named in the answer; --strict-fields refuses it.", ok(GOOD[path]))
        extra = {**base, "surprise": 1}
        yield "POST", path, extra, error(400, "surprise", "unknown_parameter"), named
        if path in EVENTS:
            streamed = {"status": 200, "events": EVENTS[path]}
            yield "POST", path, {**base, "stream": True}, streamed, None
            refused = error(400, "temperature")
            yield "POST", path, {**base, "stream": True, "temperature": -1}, refused, None
    for path in (CHAT, TEXT):
        body = {**BASE[path], "stream": True, "stream_options": {"include_usage": True}}
        events = [EVENTS[path][0], "usage", "[DONE]"]
        yield "POST", path, body, {"status": 200, "events": events}, None
        without = {**BASE[path], "stream_options": {"include_usage": True}}
        yield "POST", path, without, error(400, "stream_options"), None
        hot = {**BASE[path], "temperature": 2.5}
        yield "POST", path, hot, error(400, "temperature"), (WIDER, ok(GOOD[path]))
        stops = {**BASE[path], "stop": ["a", "b", "c", "d", "e"]}
        yield "POST", path, stops, error(400, "stop"), (WIDER, ok(GOOD[path]))


def _more() -> Iterator[Row]:
    chat, text = BASE[CHAT], BASE[TEXT]
    long = "word " * 3000
    context = "context_length_exceeded"
    yield "POST", CHAT, {**chat, "top_logprobs": 2}, error(400, "top_logprobs"), None
    for top, expected in ((0, ok(GOOD[CHAT])), (20, ok(GOOD[CHAT])), (21, error(400))):
        yield "POST", CHAT, {**chat, "logprobs": True, "top_logprobs": top}, expected, None
    too_long = {**chat, "messages": [{"role": "user", "content": long}]}
    yield "POST", CHAT, too_long, error(400, "messages", context), None
    yield "POST", TEXT, {**text, "logprobs": 6}, error(400, "logprobs"), (WIDER, ok(GOOD[TEXT]))
    yield "POST", TEXT, {**text, "prompt": long}, error(400, None, context), None
    yield "POST", TEXT, {**text, "max_tokens": 10**9}, error(400), None
    yield "POST", TEXT, {**text, "max_tokens": 0, "echo": True}, ok(GOOD[TEXT]), None
    for tool_choice in (
        "none",
        "auto",
        "required",
        {"type": "function", "function": {"name": "f"}},
    ):
        body = {**chat, "max_tokens": 60, "tools": [TOOL], "tool_choice": tool_choice}
        yield "POST", CHAT, body, ok(GOOD[CHAT]), None
    for tool_choice in ("always", {"type": "function", "function": {"name": "g"}}):
        body = {**chat, "tools": [TOOL], "tool_choice": tool_choice}
        yield "POST", CHAT, body, error(400, "tool_choice"), None
    yield "POST", CHAT, {**chat, "tool_choice": "required"}, error(400, "tool_choice"), None
    schema = {"name": "x", "strict": True, "schema": STRICT_SCHEMA}
    shaped = {"type": "json_schema", "json_schema": schema}
    yield "POST", CHAT, {**chat, "max_tokens": 40, "response_format": shaped}, ok(GOOD[CHAT]), None
    flat = {"format": {"type": "json_schema", **schema}}
    yield "POST", RESPONSES, {**BASE[RESPONSES], "text": flat}, ok(GOOD[RESPONSES]), None
    body = {**BASE[RESPONSES], "previous_response_id": "resp_nothing"}
    missing = error(400, "previous_response_id", "previous_response_not_found")
    yield "POST", RESPONSES, body, missing, None
    counted = ok("responses.InputTokenCountResponse")
    yield "POST", f"{RESPONSES}/input_tokens", {"input": "Hi"}, counted, None
    for one in ("responses/resp_nothing", "files/file-nothing", "batches/batch_nothing"):
        yield "GET", f"/v1/{one}", None, error(404), None
    yield "GET", "/v1/models/gpt-17", None, error(404, "model", "model_not_found"), None
    yield "GET", "/v1/nothing", None, error(404), None
    yield "GET", CHAT, None, error(405), None
    yield "GET", "/v1/models", None, {"status": 200, "list": "Model"}, None
    yield "GET", "/v1/files", None, {"status": 200, "list": "FileObject"}, None
    yield "GET", "/v1/batches", None, {"status": 200, "list": "Batch"}, None
    yield "GET", "/v1/files?limit=0", None, error(400), None
    batch = {"input_file_id": "file-nothing", "endpoint": TEXT, "completion_window": "24h"}
    yield "POST", "/v1/batches", batch, error(404), None
    yield "POST", "/v1/batches", {**batch, "endpoint": "/v1/x"}, error(400, "endpoint"), None
    odd = {**batch, "completion_window": "1h"}
    yield "POST", "/v1/batches", odd, error(400, "completion_window"), None
    unneeded = ("Clients of one model need not name it.", ok(GOOD[CHAT]))
    yield "POST", CHAT, {**chat, "model": None}, error(400, "model"), unneeded


def lines() -> Iterator[str]:
    rows = [*_of_fields(), *_of_every_endpoint(), *_more()]
    for number, (method, path, body, expected, ours) in enumerate(rows):
        line = {"number": number, "method": method, "path": path, "body": body}
        line["openai"] = expected
        if ours is not None:
            line |= {"differs": ours[0], "ours": ours[1]}
        yield json.dumps(line, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text("".join(lines()))
