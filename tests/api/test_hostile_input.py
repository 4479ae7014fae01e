"""Requests that are made to cost the server something: bounded, and refused by the field's name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from headrace.api.batches import BatchRequest
from headrace.api.messages_protocol import CountTokensRequest, MessagesRequest
from headrace.api.pooling_protocol import (
    EmbeddingRequest,
    ModerationRequest,
    RerankRequest,
    ScoreRequest,
)
from headrace.api.protocol import (
    ApplyTemplateRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from headrace.api.responses_protocol import ResponsesRequest
from headrace.errors import InvalidRequestError
from headrace.text.chat_template import ChatTemplate

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
HI: Any = [{"role": "user", "content": "Hi"}]
MANY = 100_000
BODIES: list[type[BaseModel]] = [
    ApplyTemplateRequest,
    BatchRequest,
    ChatCompletionRequest,
    CompletionRequest,
    CountTokensRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    MessagesRequest,
    ModerationRequest,
    RerankRequest,
    ResponsesRequest,
    ScoreRequest,
    TokenizeRequest,
]


async def refused(http: httpx.AsyncClient, url: str, body: Any, status: int = 400) -> Any:
    response = await http.post(url, json=body)
    assert response.status_code == status, response.text[:500]
    return response.json()["error"]


@pytest.mark.parametrize("kind", BODIES)
def test_no_field_can_gather_many_errors(kind: type[BaseModel]) -> None:
    """Each takes 10 us. An array of typed values ends with its first error, or is short; an object
    of typed values is counted before."""
    unbounded = list(unbounded_collections(kind.__pydantic_core_schema__, kind.__name__))
    assert not unbounded


def unbounded_collections(schema: Any, where: str) -> Iterator[str]:
    if isinstance(schema, list | tuple):
        for item in schema:
            yield from unbounded_collections(item, where)
    if not isinstance(schema, dict):
        return
    kind = schema.get("type")
    if kind in ("function-before", "function-plain"):  # counts by itself
        return
    if kind == "list":
        of_any = schema.get("items_schema", {}).get("type", "any") == "any"
        if not (of_any or schema.get("fail_fast") or schema.get("max_length", MANY) <= 1024):
            yield where
    if kind == "dict" and schema.get("values_schema", {}).get("type", "any") != "any":
        yield where
    for name, inner in schema.items():
        if name not in ("metadata", "serialization"):
            yield from unbounded_collections(inner, f"{where}.{name}")


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        (CHAT, {"messages": [1] * MANY}, "messages[0]"),
        (CHAT, {"messages": [{"role": 1}] * 65_536}, "messages[0].role"),
        (CHAT, {"messages": HI, "tools": [1] * MANY}, "tools[0]"),
        (CHAT, {"messages": HI, "functions": [1] * MANY}, "functions[0]"),
        (CHAT, {"messages": HI, "allowed_token_ids": ["a"] * MANY}, "allowed_token_ids[0]"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [1] * MANY}]},
            "messages[0].tool_calls[0]",
        ),
        (
            COMPLETIONS,
            {"prompt": "a", "logit_bias": {str(i): "x" for i in range(MANY)}},
            "logit_bias",
        ),
        (RESPONSES, {"input": "a", "tools": [1] * MANY}, "tools[0]"),
        (RESPONSES, {"input": "a", "include": [1] * MANY}, "include[0]"),
        (RESPONSES, {"input": "a", "metadata": {str(i): 1 for i in range(MANY)}}, "metadata"),
        ("/detokenize", {"tokens": ["a"] * MANY}, "tokens[0]"),
    ],
)
async def test_arrays_of_wrong_values(
    http: httpx.AsyncClient, url: str, body: dict[str, Any], param: str
) -> None:
    assert (await refused(http, url, body))["param"] == param


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (CHAT, {"messages": HI}),
        ("/tokenize", {"messages": HI}),
        ("/apply-template", {"messages": HI}),
        (RESPONSES, {"input": "Hi"}),
        (MESSAGES, {"messages": HI, "max_tokens": 1}),
    ],
)
async def test_ten_thousand_tools(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    def tool(name: str) -> dict[str, Any]:
        if url == RESPONSES:
            return {"type": "function", "name": name}
        if url == MESSAGES:
            return {"name": name, "input_schema": {"type": "object"}}
        return {"type": "function", "function": {"name": name}}

    error = await refused(http, url, {**body, "tools": [tool(f"f{i}") for i in range(10_000)]})
    assert "tools must have at most 512 item(s)" in error["message"]


SCHEMA_TEXTS = {
    "half of a pair": r'{"const": "\ud800"}',
    "nested objects": '{"not":' * 900 + "{}" + "}" * 900,
    "nested arrays": '{"allOf":' + "[" * 900 + "]" * 900 + "}",
    "no number": '{"minimum": NaN}',
    "infinite": '{"minimum": -Infinity}',
    "many digits": '{"minimum": ' + "9" * 5000 + "}",
    "not ended": '{"const": "',
}


@pytest.mark.parametrize("text", SCHEMA_TEXTS.values(), ids=SCHEMA_TEXTS.keys())
async def test_texts_of_schemas(http: httpx.AsyncClient, site: Any, text: str) -> None:
    """They are JSON within JSON: what is refused of a body is refused of them."""
    for body, param in (
        ({"guided_json": text}, "guided_json"),
        ({"structured_outputs": {"json": text}}, "structured_outputs.json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": text}}},
            "response_format.json_schema.schema",
        ),
    ):
        error = await refused(http, CHAT, {"messages": HI, **body})
        assert error["param"] == param
        assert "the text of a JSON schema" in error["message"] or "finite" in error["message"]
    assert not site.engine.requests


async def test_schemas_with_numbers_that_are_not_finite(http: httpx.AsyncClient) -> None:
    for number in (b"NaN", b"1e400"):
        body = b'{"prompt": "a", "guided_json": {"minimum": %s}}' % number
        headers = {"content-type": "application/json"}
        response = await http.post(COMPLETIONS, content=body, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "guided_json"


def test_half_characters_in_a_call_s_arguments() -> None:
    """The text of the arguments is JSON within JSON, too, which some templates look into."""
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.a }}")
    for text, fits in ((r'{"a": "\ud83d\ude00"}', True), (r'{"a": "\ud83d"}', False)):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        if fits:
            assert template.render([message]) == "\U0001f600"
            continue
        with pytest.raises(InvalidRequestError, match="surrogate") as caught:
            template.render([message])
        assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        r"{{ '\ud800' }}",
        r"{{ raise_exception('\udc00') }}",
        "{{ raise_exception('a' * 199999) }}",
        r"{{ {}['\ud800'].x.y }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'a'.__class__.__mro__ }}{{ x.y.z }}",
        "{{ 'a' * 10**9 }}",
        "{{ (10**999) ** 999 }}",
        "{{ 1 / 0 }}",
    ],
)
async def test_templates_of_requests(site_with: Any, http_to: Any, template: str) -> None:
    async with http_to(site_with(trust_request_chat_template=True)) as http:
        for url in (CHAT, "/apply-template"):
            error = await refused(http, url, {"messages": HI, "chat_template": template})
            assert error["param"] == "messages" and len(error["message"]) < 700


async def test_many_empty_messages_are_rendered_off_the_event_loop(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    to_thread = asyncio.to_thread

    async def counted(work: Any, *args: Any) -> Any:
        threads.append(1)
        return await to_thread(work, *args)

    monkeypatch.setattr("headrace.api.prompts.asyncio.to_thread", counted)
    messages = [{"role": "user", "content": ""}] * 2000
    error = await refused(http, CHAT, {"messages": messages})
    assert error["code"] == "context_length_exceeded" and threads == [1]
    threads.clear()
    assert (await http.post(CHAT, json={"messages": HI})).status_code == 200
    assert not threads


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "temperature": 1e400}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "top_p": -0.0}',
        b'{"prompt": "a", "logit_bias": {"1": 1e400}}',
        b'{"prompt": "a", "n": 1e9}',
        b'{"prompt": "a", "seed": -1e400}',
        b'{"prompt": "a", "max_tokens": -0}',
    ],
)
async def test_numbers_at_the_edges(http: httpx.AsyncClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = await http.post(COMPLETIONS, content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in json.loads(body)


async def test_of_duplicate_keys_the_last_one_counts(http: httpx.AsyncClient, site: Any) -> None:
    body = b'{"prompt": "a", "max_tokens": 1, "max_tokens": 2, "prompt": "bc"}'
    headers = {"content-type": "application/json"}
    response = await http.post(COMPLETIONS, content=body, headers=headers)
    assert response.json()["usage"]["prompt_tokens"] == 2
    assert response.json()["usage"]["completion_tokens"] == 2


async def test_nul_is_a_character(http: httpx.AsyncClient) -> None:
    response = await http.post("/tokenize", json={"prompt": "a\0b"})
    assert response.json()["count"] == 3
    back = await http.post("/detokenize", json={"tokens": response.json()["tokens"]})
    assert back.json()["prompt"] == "a\0b"
