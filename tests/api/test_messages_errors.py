"""What /v1/messages refuses, errors as Anthropic's client knows them, and structured output."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types.shared import ErrorResponse

from headrace.errors import OverloadedError, UnavailableError

URL = "/v1/messages"
HI: Any = [{"role": "user", "content": "Hi"}]
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": HI}
TOOL: dict[str, Any] = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (user(IMAGE), "messages[0].content[0] of type 'image' is not supported"),
        (user({"type": "document", "source": {}}), "'document' is not supported"),
        (user({"type": "text"}), "messages[0].content[0].text must be a string"),
        (
            user({"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}),
            "messages[0].content[0].content[0] of type 'image'",
        ),
        (user({"type": "tool_result", "tool_use_id": "x", "content": 5}), "content must be"),
        (user({"type": "tool_result"}), "messages[0].content[0].tool_use_id must be a string"),
        (user({"type": "tool_use", "id": "x"}), "a tool_use is not for user messages"),
        (
            {"messages": [*HI, {"role": "assistant", "content": [{"type": "server_tool_use"}]}]},
            "messages[1].content[0] of type 'server_tool_use'",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "x", "name": "f", "input": []}],
                    }
                ]
            },
            "messages[0].content[0].input must be an object",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}],
                    }
                ]
            },
            "messages[0], the last message, calls tools",
        ),
        ({"messages": [{"role": "assistant", "content": " "}]}, "has no text"),
        ({"system": [IMAGE]}, "system[0] of type 'image'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type 'bash_20250124'"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema is required"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name 'weather' is there twice"),
        ({"tools": [{**TOOL, "input_schema": {"type": "string"}}]}, "tools[0].input_schema.type"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading is not supported"),
        ({"tool_choice": {"type": "any"}}, "tool_choice asks for a call"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name is required"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}},
            "tool_choice.name 'g' is none of the tools",
        ),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"effort": "low"}}, "output_config.effort 'low' is not supported"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers is not supported"),
        ({"speed": "fast"}, "speed is not supported"),
        ({"stop_sequences": [""]}, "stop_sequences must not contain an empty string"),
        ({"temperature": -1}, "temperature must be in"),
    ],
)
async def test_bad_requests_name_the_field(
    http: httpx.AsyncClient, fields: Any, words: str
) -> None:
    body = {name: value for name, value in {**BODY, **fields}.items() if value is not None}
    response = await http.post(URL, json=body)
    assert response.status_code == 400
    ErrorResponse.model_validate_json(response.content, strict=True)
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and words in error["message"]
    if "max_tokens" not in words and not {"stop_sequences", "temperature"} & set(fields):
        counted = await http.post(f"{URL}/count_tokens", json=body)
        if not fields.keys() & {"mcp_servers", "speed"}:
            assert (counted.status_code, counted.json()["error"]) == (400, error)


@pytest.fixture
async def client(server: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as made:
        yield made


async def test_errors_are_the_client_s_own(site: Any, client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as no_model:
        await client.messages.create(**{**BODY, "model": "claude"})
    assert (no_model.value.type, no_model.value.status_code) == ("not_found_error", 404)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long") as too_long:
        await client.messages.create(
            **{**BODY, "messages": [{"role": "user", "content": "x" * 5000}]}
        )
    assert too_long.value.type == "invalid_request_error"
    site.engine.refuse = OverloadedError("The queue is full.", retry_after=3.2)
    with pytest.raises(anthropic.InternalServerError) as overloaded:
        await client.messages.create(**BODY)
    assert (overloaded.value.type, overloaded.value.status_code) == ("overloaded_error", 529)
    assert overloaded.value.response.headers["retry-after"] == "4"
    assert overloaded.value.request_id == overloaded.value.response.headers["x-request-id"]
    site.engine.refuse = UnavailableError("It is gone.")
    with pytest.raises(anthropic.InternalServerError) as gone:
        await client.messages.create(**BODY)
    assert (gone.value.type, gone.value.status_code) == ("api_error", 503)
    site.engine.refuse = ZeroDivisionError("a bug")  # type: ignore[assignment]
    with pytest.raises(anthropic.InternalServerError) as bug:
        await client.messages.create(**BODY)
    assert (bug.value.type, bug.value.status_code) == ("api_error", 500)


async def test_the_body_of_an_error(http: httpx.AsyncClient) -> None:
    response = await http.post(URL, json={**BODY, "model": "x"}, headers={"x-request-id": "mine"})
    error = ErrorResponse.model_validate_json(response.content, strict=True)
    assert error.request_id == response.headers["request-id"] == "mine"
    for path, method, status, kind in (
        (f"{URL}/batches", "POST", 404, "not_found_error"),
        (URL, "GET", 405, "invalid_request_error"),
    ):
        response = await http.request(method, path)
        assert response.status_code == status
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] == kind


async def test_large_bodies(site_with: Any, http_to: Any) -> None:
    async with http_to(site_with(max_body_bytes=100)) as http:
        response = await http.post(URL, json={**BODY, "system": "x" * 100})
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "request_too_large"


async def test_keys(site_with: Any, http_to: Any) -> None:
    async with http_to(site_with(api_keys=("secret", "other"))) as http:
        for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}):
            response = await http.post(URL, json=BODY, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        for headers in (
            {"x-api-key": "secret"},
            {"authorization": "Bearer other"},
            {"x-api-key": "other", "authorization": "Bearer wrong"},
        ):
            assert (await http.post(URL, json=BODY, headers=headers)).status_code == 200
        assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 401


async def test_a_stream_that_fails(client: anthropic.AsyncAnthropic, site: Any) -> None:
    site.engine.fail_after = 3
    texts = []
    with pytest.raises(anthropic.APIStatusError) as failure:
        async with client.messages.stream(**BODY) as stream:
            async for text in stream.text_stream:
                texts.append(text)
    assert "".join(texts) == "Hel"
    assert failure.value.type == "api_error"
    assert failure.value.api_message == "The engine failed on this request."
    site.engine.fail_after = 0
    with pytest.raises(anthropic.InternalServerError) as early:
        await client.messages.create(**BODY, stream=True)
    assert early.value.status_code == 500


async def test_a_client_that_leaves(server: Any, site: Any) -> None:
    site.engine.step_seconds = 0.01
    site.engine.answer = "x" * 1000
    async with (
        httpx.AsyncClient(base_url=server.url) as http,
        http.stream("POST", URL, json={**BODY, "stream": True}) as response,
    ):
        async for line in response.aiter_lines():
            if "text_delta" in line:
                break
    await site.settle()
    assert site.finished("abort") == 1


async def test_structured_output(client: anthropic.AsyncAnthropic, site: Any) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    site.engine.answer = '{"city": "Paris"}'
    message = await client.messages.create(
        **BODY, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    assert message.to_dict()["content"] == [{"type": "text", "text": '{"city": "Paris"}'}]
    assert "city" in site.engine.requests[0].grammar


async def test_a_tool_runner_that_wants_a_thread(
    site: Any, client: anthropic.AsyncAnthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told that there are none, and goes on without."""
    answers = ['<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>', "Rain."]
    submit = site.engine.submit

    def next_answer(request: Any) -> Any:
        site.engine.answer = answers.pop(0)
        return submit(request)

    monkeypatch.setattr(site.engine, "submit", next_answer)

    @anthropic.beta_async_tool
    async def weather(city: str) -> str:
        """Tells it."""
        return f"rain in {city}"

    site.engine.max_model_len = 4096
    runner = client.beta.messages.tool_runner(**BODY, tools=[weather])
    reasons = [message.stop_reason async for message in runner]
    assert reasons == ["tool_use", "end_turn"] and not answers
    prompt = site.engine.requests[-1].prompt_token_ids
    assert "rain in Rome" in site.engine.tokenizer.decode(prompt)
