"""Every field of OpenAI's: honoured, harmless or refused by name; unknown ones are named."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from headrace.api.field_policy import HARMLESS, HONOURED, REFUSED
from headrace.api.protocol import ChatCompletionRequest, CompletionRequest

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("params", "body"),
    [
        (chat_create_params.CompletionCreateParamsBase, ChatCompletionRequest),
        (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
    ],
)
def test_the_official_client_has_no_field_that_we_do_not_know(params: Any, body: Any) -> None:
    known = {*body.model_fields, *HARMLESS, *REFUSED}
    assert set(params.__annotations__) <= known


def test_a_field_has_one_policy() -> None:
    """A field that one of the endpoints honours may be refused by the other one."""
    chat, completions = set(ChatCompletionRequest.model_fields), set(CompletionRequest.model_fields)
    assert not HARMLESS.keys() & REFUSED.keys()
    assert not (chat | completions) & HARMLESS.keys()
    assert not chat & completions & REFUSED.keys()


def test_every_honoured_field_has_a_note() -> None:
    fields = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
    assert HONOURED.keys() == fields


HARMLESS_VALUES = {
    "metadata": {"a": "b"},
    "user": "someone",
    "prediction": {"type": "content", "content": "x"},
}


@pytest.mark.parametrize("name", sorted(HARMLESS))
async def test_harmless_fields_are_accepted_in_silence(http: httpx.AsyncClient, name: str) -> None:
    value = HARMLESS_VALUES.get(name, "x")
    response = await http.post(CHAT, json={"messages": MESSAGES, name: value})
    assert response.status_code == 200
    assert "headrace" not in response.json()


@pytest.mark.parametrize("name", sorted(REFUSED))
async def test_refused_fields_are_named_with_a_remedy(http: httpx.AsyncClient, name: str) -> None:
    path, body = CHAT, {"messages": MESSAGES}
    if name in ChatCompletionRequest.model_fields:
        path, body = "/v1/completions", {"prompt": "Hi"}
    response = await http.post(path, json={**body, name: {"any": "value"}})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)
    assert error["message"].startswith(name) and REFUSED[name].remedy in error["message"]
    for neutral in (None, *REFUSED[name].neutral):
        response = await http.post(path, json={**body, name: neutral})
        assert response.status_code == 200, (name, neutral)


@pytest.mark.parametrize(
    ("name", "value"),
    [("store", True), ("store", 0), ("n_best", None), ("suffix", "end")],
)
async def test_values_are_compared_with_their_type(
    http: httpx.AsyncClient, name: str, value: Any
) -> None:
    response = await http.post(CHAT, json={"messages": MESSAGES, name: value})
    assert response.status_code == (200 if value is None else 400)


async def test_unknown_fields_are_named_in_the_answer(http: httpx.AsyncClient) -> None:
    body = {"messages": MESSAGES, "tempreature": 0, "x" * 100: 1}
    response = await http.post(CHAT, json=body)
    assert response.json()["headrace"] == {"ignored_fields": ["tempreature", "x" * 64]}
    many = {f"field{i}": 1 for i in range(100)}
    response = await http.post(CHAT, json={"messages": MESSAGES, **many})
    assert len(response.json()["headrace"]["ignored_fields"]) == 32


async def test_unknown_fields_are_named_once_in_a_stream(http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, json={"messages": MESSAGES, "tempreature": 0, "stream": True})
    events = response.text.split("\n\n")
    assert '"headrace":{"ignored_fields":["tempreature"]}' in events[0]
    assert response.text.count("ignored_fields") == 1


async def test_unknown_fields_are_refused_when_strict(
    http: httpx.AsyncClient, site_with: Any, http_to: Any
) -> None:
    body = {"messages": MESSAGES, "tempreature": 0}
    asked = await http.post(CHAT, json={**body, "strict_fields": True})
    async with http_to(site_with(strict_fields=True)) as strict:
        configured = await strict.post(CHAT, json=body)
        assert (await strict.post(CHAT, json={"messages": MESSAGES})).status_code == 200
    for response in (asked, configured):
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("unknown_parameter", "tempreature")
        assert "temperature" in error["message"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0]",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]},
            "messages[0].content[1]",
        ),
    ],
)
async def test_what_is_not_text_is_refused_by_name(
    http: httpx.AsyncClient, message: Any, param: str
) -> None:
    response = await http.post(CHAT, json={"messages": [message]})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == param


async def test_logit_bias_takes_token_ids_only(http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, json={"messages": MESSAGES, "logit_bias": {"yes": 1}})
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "logit_bias")
    assert "'yes'" in error["message"] and "/tokenize" in error["message"]


async def test_the_schema_tells_of_the_bodies(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/openapi.json")).json()
    body = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    properties = schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "temperature", "min_p"} <= set(properties)
    assert {"400", "429"} <= set(schema["paths"][CHAT]["post"]["responses"])
    kinds = {kind.get("type") for kind in properties["stop"]["anyOf"]}
    assert kinds == {"string", "array", "null"}
