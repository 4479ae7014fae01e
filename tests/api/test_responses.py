"""/v1/responses through the official client: answers and events in OpenAI's shapes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from pydantic import BaseModel
from tests.api.responses_checks import (
    PARAMETERS,
    RESPONSES,
    TEMPLATE,
    TOOLS,
    events_of,
    kinds,
    prompt_of,
    strictly,
)

CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Zürich {\\"}"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'


@pytest.fixture
async def site(site_with: Any) -> Any:
    made = site_with(template=TEMPLATE)
    made.engine.max_model_len = 2048
    return made


@pytest.fixture
async def client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="any", http_client=http, max_retries=0
    )


async def answer(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The response, after checking that the stream of the same tells the same."""
    body = {"input": "Hi", **fields}
    whole = await http.post(RESPONSES, json=body)
    assert whole.status_code == 200, whole.text
    strictly(Response, whole.content)
    streamed = await http.post(RESPONSES, json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = events_of(streamed.text)
    assert shape(events[-1]["response"]) == shape(whole.json())
    assert put_together(events) == shape(events[-1]["response"])["output"]
    return dict(whole.json())


def shape(response: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one time to the next."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not isinstance(value, dict):
            return value
        dropped = {"id", "call_id", "created_at", "completed_at", "headrace", "cached_tokens"}
        return {name: plain(item) for name, item in value.items() if name not in dropped}

    return dict(plain(response))


def put_together(events: list[dict[str, Any]]) -> Any:
    """The output that the deltas add up to, after checking each "done" against them."""
    items: list[dict[str, Any]] = []
    texts: dict[int, str] = {}
    for event in events:
        index = event.get("output_index")
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert index == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
            texts[index] = ""
            continue
        if index is None:
            continue
        assert index == len(items) - 1
        assert event.get("item_id", items[index]["id"]) == items[index]["id"]
        if kind.endswith(".delta"):
            assert event["delta"]
            texts[index] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == texts[index]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == texts[index]
        elif kind == "content_part.done":
            assert event["part"]["text"] == texts[index]
        elif kind == "output_item.done":
            assert event["item"]["id"] == items[index]["id"]
            items[index] = event["item"]
    return shape({"output": items})["output"]


# --- what comes out -----------------------------------------------------------------------------


async def test_an_answer(http: httpx.AsyncClient) -> None:
    response = await answer(http)
    assert response["object"] == "response" and response["id"].startswith("resp_")
    assert response["status"] == "completed" and response["model"] == "org/tiny"
    assert response["completed_at"] >= response["created_at"]
    [message] = response["output"]
    assert message["content"] == [
        {"type": "output_text", "text": "Hello, world!", "annotations": [], "logprobs": []}
    ]
    usage = response["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == 4
    assert usage["output_tokens"] == len("Hello, world!") + 1
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["headrace"]["preemptions"] == 3
    assert response["error"] is None and response["incomplete_details"] is None


async def test_the_events_of_a_text(http: httpx.AsyncClient) -> None:
    response = await http.post(RESPONSES, json={"input": "Hi", "stream": True})
    events = events_of(response.text)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert sum(event["type"].endswith("delta") for event in events) == len("Hello, world!")
    assert "[DONE]" not in response.text
    assert json.loads(response.headers["headrace-sampling"])["temperature"] == 1.0


async def test_the_official_client(client: openai.AsyncOpenAI, site: Any) -> None:
    response = await client.responses.create(model="tiny", input="Hi", instructions="Be brief.")
    assert response.output_text == "Hello, world!" and response.instructions == "Be brief."
    async with client.responses.stream(model="tiny", input="Hi") as stream:
        seen = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert seen[0] == "response.created" and seen[-1] == "response.completed"
    assert final.output_text == "Hello, world!"
    assert prompt_of(site, 0) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def test_it_may_be_cut_off(http: httpx.AsyncClient) -> None:
    response = await answer(http, max_output_tokens=5)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    [message] = response["output"]
    assert (message["status"], message["content"][0]["text"]) == ("incomplete", "Hello")
    streamed = await http.post(
        RESPONSES, json={"input": "Hi", "max_output_tokens": 5, "stream": True}
    )
    assert kinds(events_of(streamed.text))[-1] == "incomplete"


async def test_an_empty_answer_has_a_message(site: Any, http: httpx.AsyncClient) -> None:
    site.engine.answer = ""
    response = await answer(http)
    assert response["output"][0]["content"][0]["text"] == ""


async def test_reasoning_comes_first(site: Any, http: httpx.AsyncClient) -> None:
    site.engine.answer = "<think>\nIs 1 < 2? 🤔\n</think>\n\nYes."
    response = await answer(http, reasoning={"summary": "auto"})
    thought, message = response["output"]
    assert thought["type"] == "reasoning" and thought["summary"] == []
    assert thought["content"] == [{"type": "reasoning_text", "text": "Is 1 < 2? 🤔"}]
    assert message["content"][0]["text"] == "Yes."
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 10
    assert response["reasoning"] == {"effort": None, "summary": "auto"}
    hidden = await answer(http, include_reasoning=False)
    assert [item["type"] for item in hidden["output"]] == ["message"]
    streamed = await http.post(RESPONSES, json={"input": "Hi", "stream": True})
    assert kinds(events_of(streamed.text))[2:8] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]


@pytest.mark.parametrize("burst", [1, 7, 1000])
async def test_calls(site: Any, http: httpx.AsyncClient, burst: int) -> None:
    site.engine.answer = f"One moment.\n{CALL}\n{OTHER}\nDone."
    site.engine.burst = burst
    response = await answer(http, tools=TOOLS)
    first, call, other, last = response["output"]
    assert [item["content"][0]["text"] for item in (first, last)] == ["One moment.", "Done."]
    assert (call["type"], call["name"], other["name"]) == ("function_call", "f", "g")
    assert call["call_id"].startswith("call_") and call["id"] != call["call_id"]
    assert json.loads(call["arguments"]) == {"city": 'Zürich {"}'}
    assert response["tools"][0]["parameters"] == PARAMETERS
    assert response["status"] == "completed"


async def test_the_events_of_a_call(site: Any, client: openai.AsyncOpenAI) -> None:
    site.engine.answer = CALL
    async with client.responses.stream(model="tiny", input="Hi", tools=TOOLS) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    names = [event.type for event in events]
    assert "response.function_call_arguments.delta" in names
    done = next(e for e in events if e.type == "response.function_call_arguments.done")
    [call] = final.output
    assert call.type == "function_call" and call.arguments == done.arguments


async def test_a_call_that_breaks_off(site: Any, http: httpx.AsyncClient) -> None:
    """In a stream it was told already; else its text is content."""
    site.engine.answer = CALL
    body = {"input": "Hi", "tools": TOOLS, "max_output_tokens": 50}
    whole = (await http.post(RESPONSES, json=body)).json()
    [message] = whole["output"]
    assert message["type"] == "message" and message["content"][0]["text"].startswith("<tool_call>")
    assert whole["status"] == "incomplete"
    streamed = await http.post(RESPONSES, json={**body, "stream": True})
    last = events_of(streamed.text)[-1]
    [call] = last["response"]["output"]
    assert (last["type"], call["type"], call["status"]) == (
        "response.incomplete",
        "function_call",
        "incomplete",
    )


async def test_parallel_calls_may_be_switched_off(site: Any, http: httpx.AsyncClient) -> None:
    site.engine.answer = CALL + OTHER
    response = await answer(http, tools=TOOLS, parallel_tool_calls=False)
    assert [item["name"] for item in response["output"]] == ["f"]
    assert response["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    "fields",
    [
        {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"]},
        {"top_logprobs": 2},
    ],
)
async def test_logprobs(site: Any, http: httpx.AsyncClient, fields: Any) -> None:
    site.engine.answer = "<think>a</think>Zürich"
    response = await answer(http, **fields)
    part = response["output"][1]["content"][0]
    assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]) == "Zürich".encode()
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {
        fields.get("top_logprobs", 0)
    }
    streamed = await http.post(RESPONSES, json={"input": "Hi", "stream": True, **fields})
    deltas = [
        event for event in events_of(streamed.text) if event["type"].endswith("output_text.delta")
    ]
    entries = [[entry["token"] for entry in delta["logprobs"]] for delta in deltas]
    assert entries == [["Z"], ["\ufffd", "\ufffd"], ["r"], ["i"], ["c"], ["h"]]


async def test_fields_are_given_back(http: httpx.AsyncClient) -> None:
    asked = {
        "metadata": {"a": "b"},
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "p",
        "max_tool_calls": 3,
        "max_output_tokens": 20,
        "temperature": 0.5,
        "top_p": 0.9,
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOLS[0]]},
        "tools": TOOLS,
        "truncation": "auto",
        "instructions": "Be brief.",
    }
    response = await answer(http, **asked)
    told = {name: response[name] for name in asked}
    assert told == {**asked, "tools": [{**tool, "strict": None} for tool in TOOLS]}
    assert response["service_tier"] == "default" and response["background"] is False
    assert "headrace" not in response


async def test_extensions_reach_the_engine(site: Any, http: httpx.AsyncClient) -> None:
    fields = {"top_k": 3, "seed": 7, "stop": ["wor"], "priority": 2, "cache_salt": "salt"}
    response = await answer(http, **fields)
    assert response["output"][0]["content"][0]["text"] == "Hello, "
    request = site.engine.requests[0]
    assert (request.sampling.top_k, request.sampling.seed) == (3, 7)
    assert (request.priority, request.cache_salt) == (2, "salt")


async def test_tokens_are_counted(site: Any, client: openai.AsyncOpenAI, http: Any) -> None:
    count = await client.responses.input_tokens.count(model="tiny", input="Hi", tools=TOOLS)
    response = await client.responses.create(model="tiny", input="Hi", tools=TOOLS)
    assert response.usage is not None
    assert count.input_tokens == response.usage.input_tokens > 100
    assert len(site.engine.requests) == 1
    raw = await http.post(f"{RESPONSES}/input_tokens", json={"input": "Hi"})
    strictly(InputTokenCountResponse, raw.content)


# --- structured output --------------------------------------------------------------------------


class Point(BaseModel):
    x: int
    y: int


async def test_parse(site: Any, client: openai.AsyncOpenAI) -> None:
    site.engine.answer = '{"x": 1, "y": 2}'
    response = await client.responses.parse(model="tiny", input="Hi", text_format=Point)
    assert response.output_parsed == Point(x=1, y=2)
    async with client.responses.stream(model="tiny", input="Hi", text_format=Point) as stream:
        await stream.until_done()
        assert (await stream.get_final_response()).output_parsed == Point(x=1, y=2)
    for request in site.engine.requests:
        assert "%json" in request.grammar and "additionalProperties" in request.grammar


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object"},
        {"type": "json_schema", "name": "p", "strict": True, "schema": Point.model_json_schema()},
    ],
)
async def test_formats(site: Any, http: httpx.AsyncClient, form: Any) -> None:
    site.engine.answer = '{"x": 1, "y": 2}'
    response = await answer(http, text={"format": form})
    assert response["text"]["format"] == form
    assert "%json" in site.engine.requests[0].grammar


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
async def test_a_schema_that_the_engine_refuses(
    site: Any, http: httpx.AsyncClient, fields: Any
) -> None:
    """Before the first event, by the name of its field."""
    site.engine.refuse_grammars = "It is too large."
    form = {"type": "json_schema", "name": "p", "schema": {"type": "object"}}
    response = await http.post(RESPONSES, json={"input": "Hi", "text": {"format": form}, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "text.format.schema")
    assert error["message"] == "text.format.schema cannot be honoured: It is too large."
