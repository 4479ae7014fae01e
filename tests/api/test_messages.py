"""/v1/messages and its count_tokens through Anthropic's own client: every answer and every event
is also held against the client's types, strictly."""

from __future__ import annotations

import asyncio
import hashlib
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import TypeAdapter

from headrace.api import messages_output

URL = "/v1/messages"
HI: Any = [{"role": "user", "content": "Hi"}]
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": HI}
# Tools, calls, results and thinking show in the prompt.
TEMPLATE = (
    "{% if tools %}T {{ tools | tojson }} <tool_call>{}</tool_call>\n{% endif %}"
    "{% for m in messages %}{{ m.role }} {{ m.name or '' }}: "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }} {{ c.function | tojson }}]{% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "Tells it",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich {\\"}"}}\n</tool_call>'
CITY = {"city": 'Zürich {"}'}
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture
async def site(site_with: Any) -> Any:
    made = site_with(template=TEMPLATE, specials=("<think>", "</think>"))
    made.engine.max_model_len = 4096
    return made


@pytest.fixture
async def client(server: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as made:
        yield made


def prompt_of(site: Any, index: int = -1) -> str:
    prompt = site.engine.requests[index].prompt_token_ids
    text: str = site.engine.tokenizer.decode(prompt, skip_special_tokens=False)
    return text


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each checked against the client's types."""
    events = []
    for event in text.split("\n\n")[:-1]:
        name, _, data = event.partition("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        if content["type"] != "ping":
            EVENTS.validate_json(data.removeprefix("data: "), strict=True)
        events.append(content)
    return events


def added_up(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream makes, with the order of its events checked."""
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message = events[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    opened: dict[str, Any] | None = None
    text = ""
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert opened is None and event["index"] == len(message["content"])
            opened, text = event["content_block"], ""
            message["content"].append(opened)
        elif event["type"] == "content_block_stop":
            assert opened is not None and event["index"] == len(message["content"]) - 1
            if opened["type"] == "tool_use":
                opened["input"] = json.loads(text or "{}")
            opened = None
        elif event["type"] == "content_block_delta":
            assert opened is not None and event["index"] == len(message["content"]) - 1
            delta = event["delta"]
            match delta["type"]:
                case "input_json_delta":
                    text += delta["partial_json"]
                case "signature_delta":
                    opened["signature"] = delta["signature"]
                case kind:
                    opened[kind.removesuffix("_delta")] += delta[kind.removesuffix("_delta")]
    assert opened is None
    message |= events[-2]["delta"]
    message["usage"] |= events[-2]["usage"]
    return dict(message)


def without_names(message: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one request to the next."""
    content = [{**block, "id": ""} if "id" in block else block for block in message["content"]]
    usage = {name: value for name, value in message["usage"].items() if name != "headrace"}
    return {**message, "id": "", "content": content, "usage": usage}


async def ask(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The answer, after checking its types and that the stream adds up to the same."""
    response = await http.post(URL, json={**BODY, **fields})
    assert response.status_code == 200, response.text
    Message.model_validate_json(response.content, strict=True)
    answer: dict[str, Any] = response.json()
    streamed = await http.post(URL, json={**BODY, **fields, "stream": True})
    assert without_names(added_up(events_of(streamed.text))) == without_names(answer)
    return answer


# --- answers ------------------------------------------------------------------------------------


async def test_a_message(client: anthropic.AsyncAnthropic, site: Any) -> None:
    message = await client.messages.create(**BODY)
    assert message.id.startswith("msg_") and message.model == "tiny"
    assert [block.to_dict() for block in message.content] == [
        {"type": "text", "text": "Hello, world!"}
    ]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    prompt = len(site.engine.requests[0].prompt_token_ids)
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (prompt - 4, 4)
    assert (usage.output_tokens, usage.cache_creation_input_tokens) == (14, 0)
    assert prompt_of(site) == "user : Hi\nassistant: "
    await site.settle()
    assert site.finished("stop") == 1


def ask_synchronously(url: str) -> Any:
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        count = client.messages.count_tokens(model="tiny", messages=HI)
        with client.messages.stream(**BODY) as stream:
            text = "".join(stream.text_stream)
        return text, stream.get_final_message(), count


async def test_the_synchronous_client(server: Any) -> None:
    text, message, count = await asyncio.to_thread(ask_synchronously, server.url)
    assert text == message.content[0].text == "Hello, world!"
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 14
    assert count.input_tokens == message.usage.input_tokens + 4


@pytest.mark.parametrize("burst", [1, 5, 1000])
async def test_a_stream(client: anthropic.AsyncAnthropic, site: Any, burst: int) -> None:
    site.engine.burst = burst
    async with client.messages.stream(**BODY) as stream:
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert kinds.count("text") == kinds.count("content_block_delta") == len("Hello, world!")
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert message.to_dict()["content"] == [{"type": "text", "text": "Hello, world!"}]
    assert message.usage.output_tokens == 14


@pytest.mark.parametrize(
    ("fields", "text", "reason", "sequence"),
    [
        ({"max_tokens": 3}, "Hel", "max_tokens", None),
        ({"stop_sequences": ["x", "o, w"]}, "Hell", "stop_sequence", "o, w"),
        ({"stop_sequences": ["world!?"]}, "Hello, world!", "end_turn", None),
        ({"stop_sequences": []}, "Hello, world!", "end_turn", None),
        ({"max_tokens": 0}, None, "max_tokens", None),
    ],
)
async def test_how_it_ends(
    http: httpx.AsyncClient, fields: Any, text: str | None, reason: str, sequence: str | None
) -> None:
    answer = await ask(http, **fields)
    content = [] if text is None else [{"type": "text", "text": text}]
    assert answer["content"] == content
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    if text is None:
        assert answer["usage"]["output_tokens"] == 0


async def test_max_tokens_beyond_the_context(http: httpx.AsyncClient, site: Any) -> None:
    """As with Anthropic's newer models: clients ask for 32000 tokens of any model."""
    site.engine.answer, site.engine.max_model_len = "x" * 500, 128
    answer = await ask(http, max_tokens=32000)
    prompt = len(site.engine.requests[0].prompt_token_ids)
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert answer["usage"]["output_tokens"] == 128 - prompt


async def test_parameters_reach_the_engine(http: httpx.AsyncClient, site: Any) -> None:
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 5}
    response = await http.post(
        URL, json={**BODY, **values, "max_tokens": 9, "priority": -3, "cache_salt": "s"}
    )
    assert json.loads(response.headers["headrace-sampling"])["top_k"] == 7
    assert "decode" in response.headers["server-timing"]
    assert response.json()["usage"]["headrace"]["preemptions"] == 3
    [request] = site.engine.requests
    assert {name: getattr(request.sampling, name) for name in values} == values
    assert (request.sampling.max_tokens, request.priority, request.cache_salt) == (9, -3, "s")


# --- what becomes of a conversation -------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"system": "Be brief"}, "system : Be brief\nuser : Hi\nassistant: "),
        (
            {
                "system": [
                    {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1;"},
                    {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "b"},
                ]
            },
            "system : a\nb\nuser : Hi\nassistant: ",
        ),
        (
            {
                "messages": [
                    *HI,
                    {"role": "user", "content": [{"type": "text", "text": "again"}]},
                    {"role": "assistant", "content": "A"},
                    {"role": "assistant", "content": "B"},
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": []},
                ]
            },
            "user : Hi\nagain\nassistant : A\nB\nsystem : S\nuser : \nassistant: ",
        ),
        (
            {"messages": [*HI, {"role": "assistant", "content": "I say "}]},
            "user : Hi\nassistant : I say ",
        ),
        (
            {
                "messages": [
                    *HI,
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "Hm", "signature": "any"},
                            {"type": "redacted_thinking", "data": "x"},
                            {"type": "text", "text": "Yes"},
                        ],
                    },
                    *HI,
                ]
            },
            "user : Hi\nassistant : <think>Hm</think>Yes\nuser : Hi\nassistant: ",
        ),
    ],
)
async def test_prompts(http: httpx.AsyncClient, site: Any, fields: Any, prompt: str) -> None:
    response = await http.post(URL, json={**BODY, **fields})
    assert response.status_code == 200, response.text
    assert prompt_of(site) == prompt
    counted = await http.post(f"{URL}/count_tokens", json={"messages": HI, **fields})
    assert counted.json() == {"input_tokens": len(site.engine.requests[0].prompt_token_ids)}


# --- tools --------------------------------------------------------------------------------------


async def test_a_round_of_tools(client: anthropic.AsyncAnthropic, site: Any) -> None:
    site.engine.answer = f"One moment.\n{CALL}"
    async with client.messages.stream(**BODY, tools=[TOOL]) as stream:
        async for event in stream:
            if event.type == "input_json":
                last = event.snapshot
        message = await stream.get_final_message()
    assert message.stop_reason == "tool_use"
    text, call = message.content
    assert text.type == "text" and text.text == "One moment."
    assert call.type == "tool_use" and call.name == "weather" and call.id.startswith("toolu_")
    assert call.input == last == CITY
    site.engine.answer = "Rain."
    results: Any = [
        {"type": "tool_result", "tool_use_id": call.id, "content": "rain"},
        {
            "type": "tool_result",
            "tool_use_id": "other",
            "is_error": True,
            "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "city"}],
        },
        {"type": "text", "text": "Well?"},
    ]
    turns = [*HI, message.to_param(), {"role": "user", "content": results}]
    answer = await client.messages.create(**{**BODY, "messages": turns}, tools=[TOOL])
    assert answer.stop_reason == "end_turn"
    prompt = prompt_of(site)
    assert f"One moment.[{call.id} " in prompt and json.dumps(CITY, ensure_ascii=False) in prompt
    assert prompt.endswith("tool weather: rain\ntool : Error: no\ncity\nuser : Well?\nassistant: ")
    assert '"description": "Tells it"' in prompt


async def test_calls_and_text_in_turns(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.answer = f'{CALL}<tool_call>{{"name": "weather"}}</tool_call>Done.'
    answer = await ask(http, tools=[TOOL], max_tokens=1000)
    kinds = [(block["type"], block.get("input"), block.get("text")) for block in answer["content"]]
    assert kinds == [
        ("tool_use", CITY, None),
        ("tool_use", {}, None),
        ("text", None, "Done."),
    ]
    assert answer["stop_reason"] == "tool_use"
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    answer = await ask(http, tools=[TOOL], tool_choice=choice, max_tokens=1000)
    assert [block["type"] for block in answer["content"]] == ["tool_use", "text"]


async def test_arguments_that_decoders_refuse(http: httpx.AsyncClient, site: Any) -> None:
    written = '{"city": "\\ud800", "n": ' + "9" * 60 + ', "m": 1e999}'
    site.engine.answer = f'<tool_call>{{"name": "weather", "arguments": {written}}}</tool_call>'
    response = await http.post(URL, json={**BODY, "tools": [TOOL], "max_tokens": 1000})
    assert response.status_code == 200
    assert f'"input":{written}' in response.text


async def test_a_call_that_is_none(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.answer = 'Hm. <tool_call>{"name": "weather", "arguments": {"city": oops'
    answer = (await http.post(URL, json={**BODY, "tools": [TOOL]})).json()
    assert answer["stop_reason"] == "end_turn"
    assert answer["content"] == [{"type": "text", "text": site.engine.answer}]
    streamed = await http.post(URL, json={**BODY, "tools": [TOOL], "stream": True})
    events = events_of(streamed.text)
    assert events[-2]["delta"]["stop_reason"] == "end_turn"
    starts = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert starts == ["text", "tool_use"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_a_forced_call(http: httpx.AsyncClient, site: Any, choice: Any) -> None:
    site.engine.answer = CALL
    answer = await ask(http, tools=[TOOL], tool_choice=choice)
    assert [block["type"] for block in answer["content"]] == ["tool_use"]
    assert answer["stop_reason"] == "tool_use"
    assert "weather" in site.engine.requests[0].grammar


async def test_tools_may_be_there_and_not_called(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.answer = CALL
    answer = await ask(http, tools=[TOOL], tool_choice={"type": "none"})
    assert answer["content"] == [{"type": "text", "text": CALL}]


# --- thinking -----------------------------------------------------------------------------------


async def test_thinking(client: anthropic.AsyncAnthropic, http: Any, site: Any) -> None:
    site.engine.answer = "<think>\nIs 1 < 2? 🤔\n</think>\n\nYes."
    answer = await ask(http, thinking={"type": "adaptive"})
    thought = "Is 1 < 2? 🤔"
    signature = b64encode(hashlib.sha256(thought.encode()).digest()).decode()
    assert answer["content"] == [
        {"type": "thinking", "thinking": thought, "signature": signature},
        {"type": "text", "text": "Yes."},
    ]
    details = answer["usage"]["output_tokens_details"]
    assert 0 < details["thinking_tokens"] < answer["usage"]["output_tokens"]
    async with client.messages.stream(**BODY) as stream:
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert {"thinking", "signature", "text"} <= set(kinds)
    assert message.content[0].to_dict() == answer["content"][0]


@pytest.mark.parametrize(
    "thinking",
    [{"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}],
)
async def test_thinking_that_is_not_shown(site_with: Any, http_to: Any, thinking: Any) -> None:
    site = site_with(template=TEMPLATE, specials=("<think>", "</think>"))
    site.engine.answer = "<think>Hm</think>Yes."
    async with http_to(site) as http:
        answer = await ask(http, thinking=thinking, max_tokens=2000)
    assert answer["content"] == [{"type": "text", "text": "Yes."}]
    [request, _] = site.engine.requests
    disabled = thinking["type"] == "disabled"
    assert prompt_of(site).endswith("<think></think>") == disabled
    assert (request.thinking and request.thinking.max_tokens) == (None if disabled else 1024)


async def test_a_model_that_does_not_think(site_with: Any, http_to: Any) -> None:
    async with http_to(site_with()) as http:
        answer = await ask(http, thinking={"type": "enabled", "budget_tokens": 1024})
    assert answer["content"] == [{"type": "text", "text": "Hello, world!"}]


async def test_effort(site_with: Any, http_to: Any) -> None:
    site = site_with(template="{{ reasoning_effort }} {{ messages[0].content }}")
    async with http_to(site) as http:
        await ask(http, output_config={"effort": "low"})
    assert prompt_of(site) == "low Hi"


# --- fields -------------------------------------------------------------------------------------


async def test_what_claude_code_sends(client: anthropic.AsyncAnthropic, site: Any) -> None:
    cached = {"type": "ephemeral", "ttl": "1h"}
    message = await client.beta.messages.create(
        **{**BODY, "max_tokens": 16000},
        system=[{"type": "text", "text": "You help.", "cache_control": cached}],  # type: ignore[typeddict-item]
        tools=[{**TOOL, "cache_control": cached, "eager_input_streaming": True}],  # type: ignore[typeddict-item]
        metadata={"user_id": "user_1"},
        thinking={"type": "adaptive"},
        output_config={"effort": "high"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        service_tier="auto",
        betas=["claude-code-20250219", "interleaved-thinking-2025-05-14"],
    )
    assert message.content[0].type == "text"
    assert "headrace" not in message.to_dict()


async def test_unknown_fields_are_named(http: httpx.AsyncClient) -> None:
    answer = await ask(http, tempreature=0)
    assert answer["headrace"] == {"ignored_fields": ["tempreature"]}
    response = await http.post(URL, json={**BODY, "tempreature": 0, "strict_fields": True})
    assert response.status_code == 400
    assert "'tempreature'" in response.json()["error"]["message"]


# --- streams that are slow or cut off -------------------------------------------------------------


async def test_pings(http: httpx.AsyncClient, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream begins before its first token where that is slow to come."""
    monkeypatch.setattr(messages_output, "PING_SECONDS", 0.05)
    site.engine.step_seconds = 0.5
    site.engine.answer = "x"
    response = await http.post(URL, json={**BODY, "stream": True})
    kinds = [event["type"] for event in events_of(response.text)]
    assert kinds[0] == "message_start"
    assert kinds.index("content_block_start") > 2 and kinds.count("ping") >= 3
    usage = events_of(response.text)[0]["message"]["usage"]
    assert usage["cache_read_input_tokens"] == 0
    assert events_of(response.text)[-2]["usage"]["cache_read_input_tokens"] == 4


async def test_count_tokens(client: anthropic.AsyncAnthropic, http: Any, site: Any) -> None:
    counted = await client.messages.count_tokens(
        model="tiny", messages=HI, tools=[TOOL], system="Hm", thinking={"type": "disabled"}
    )
    await client.messages.create(**BODY, tools=[TOOL], system="Hm", thinking={"type": "disabled"})
    assert counted.input_tokens == len(site.engine.requests[0].prompt_token_ids)
    response = await http.post(f"{URL}/count_tokens", json={"messages": HI})
    MessageTokensCount.model_validate_json(response.content, strict=True)
    assert len(site.engine.requests) == 1
