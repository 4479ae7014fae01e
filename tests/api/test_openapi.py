"""/openapi.json describes what is answered: every route, and what really comes."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema
import pytest

from headrace.api.openapi_answers import ANSWERS, OTHER_CONTENT

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def document(http: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await http.get("/openapi.json")).json())


def routes_of(document: dict[str, Any]) -> set[str]:
    return {
        f"{method.upper()} {path}"
        for path, operations in document["paths"].items()
        for method in operations
    }


async def test_every_answer_is_described(document: dict[str, Any]) -> None:
    assert routes_of(document) == ANSWERS.keys() | OTHER_CONTENT.keys()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/chat/completions", {"messages": MESSAGES, "logprobs": True}),
        ("POST", "/v1/completions", {"prompt": "Hi", "echo": True, "return_token_ids": True}),
        ("POST", "/v1/responses", {"input": "Hi", "store": False}),
        ("POST", "/v1/messages", {"messages": MESSAGES, "max_tokens": 3}),
        ("POST", "/v1/messages/count_tokens", {"messages": MESSAGES}),
        ("POST", "/tokenize", {"prompt": "Hi", "return_token_strs": True}),
        ("GET", "/v1/models", None),
        ("GET", "/server_info", None),
        ("GET", "/tokenizer_info", None),
        ("GET", "/livez", None),
        ("POST", "/v1/chat/completions", {"messages": []}),
        ("POST", "/v1/messages", {"messages": []}),
        ("GET", "/v1/files", None),
    ],
)
async def test_answers_are_as_described(
    http: httpx.AsyncClient, document: dict[str, Any], method: str, path: str, body: Any
) -> None:
    response = await http.request(method, path, json=body)
    described = document["paths"][path][method.lower()]["responses"][str(response.status_code)]
    schema = described["content"]["application/json"]["schema"]
    # What it refers to is found by the same pointers.
    jsonschema.validate(response.json(), {**schema, "components": document["components"]})
