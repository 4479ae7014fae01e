"""anthropic-python against /v1/messages: answers, streams, tools, errors, retries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anthropic
import pytest
from pydantic import BaseModel

if TYPE_CHECKING:
    from tests.clients.conftest import Scripted, Target

pytestmark = pytest.mark.e2e

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0}
"""Anthropic's client has no such argument any more; its API still takes it."""
TOOL: Any = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def client_of(target: Target, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=target.url, api_key="any", **{"max_retries": 0, "timeout": 100, **options}
    )


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_create_and_stream(target: Target) -> None:
    client = client_of(target)
    arguments: Any = {"model": target.model, "max_tokens": 40, "messages": QUESTION}
    whole = client.messages.create(**arguments, extra_body=GREEDY)
    assert "Paris" in text_of(whole) and whole.stop_reason == "end_turn"
    with client.messages.stream(**arguments, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(final) == text_of(whole)
    assert final.usage.output_tokens == whole.usage.output_tokens > 3
    assert final.usage.input_tokens > 0 and final.stop_reason == "end_turn"


async def test_async_events(target: Target) -> None:
    async with anthropic.AsyncAnthropic(base_url=target.url, api_key="any") as client:
        stream = await client.messages.create(
            model=target.model, max_tokens=8, messages=QUESTION, stream=True
        )
        kinds = [event.type async for event in stream]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) <= {"content_block_delta", "ping"}


def test_system_stop_and_limit(target: Target) -> None:
    client = client_of(target)
    cut = client.messages.create(
        model=target.model,
        max_tokens=3,
        system="You are brief.",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}],
    )
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 3
    stopped = client.messages.create(
        model=target.model,
        max_tokens=40,
        extra_body=GREEDY,
        messages=QUESTION,
        stop_sequences=["Paris"],
    )
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "Paris"
    assert "Paris" not in text_of(stopped)


def test_count_tokens(target: Target) -> None:
    client = client_of(target)
    counted = client.messages.count_tokens(model=target.model, messages=QUESTION).input_tokens
    answer = client.messages.create(model=target.model, max_tokens=1, messages=QUESTION)
    usage = answer.usage
    cached = usage.cache_read_input_tokens or 0
    assert counted == usage.input_tokens + cached > 10


def test_a_prefilled_answer_goes_on(target: Target) -> None:
    answer = client_of(target).messages.create(
        model=target.model,
        max_tokens=12,
        extra_body=GREEDY,
        messages=[*QUESTION, {"role": "assistant", "content": "The capital of France is"}],
    )
    assert text_of(answer).lstrip().startswith("Paris")


@pytest.mark.parametrize("stream", [False, True])
def test_tools(scripted: Scripted, stream: bool) -> None:
    client = client_of(scripted)
    said: Any = [{"role": "user", "content": 'call weather {"city": "Zürich"}'}]
    arguments: Any = {"model": scripted.model, "max_tokens": 200, "tools": [TOOL]}
    if stream:
        with client.messages.stream(**arguments, messages=said) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**arguments, messages=said)
    (call,) = answer.content
    assert answer.stop_reason == "tool_use" and call.type == "tool_use"
    assert (call.name, call.input) == ("weather", {"city": "Zürich"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    said += [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    assert text_of(client.messages.create(**arguments, messages=said)) == "The tool said: rain"


def test_the_tool_runner(scripted: Scripted) -> None:
    asked: list[str] = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "rain"

    tool_runner: Any = client_of(scripted).beta.messages.tool_runner
    arguments: Any = {
        "model": scripted.model,
        "max_tokens": 200,
        "tools": [weather],
        "messages": [{"role": "user", "content": 'call weather {"city": "Zürich"}'}],
    }
    final = tool_runner(**arguments, thread=False).until_done()
    assert text_of(final) == "The tool said: rain" and asked == ["Zürich"]
    # Its default keeps the conversation at the server: refused in a way that it understands.
    final = tool_runner(**arguments).until_done()
    assert text_of(final) == "The tool said: rain" and asked == ["Zürich"] * 2


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_call_of_the_real_model(target: Target, choice: Any) -> None:
    schema = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
    answer = client_of(target).messages.create(
        model=target.model,
        max_tokens=100,
        extra_body=GREEDY,
        messages=QUESTION,
        tools=[{"name": "weather", "input_schema": {**schema, "additionalProperties": False}}],
        tool_choice={**choice, "disable_parallel_tool_use": True},
    )
    (call,) = answer.content
    assert call.type == "tool_use" and answer.stop_reason == "tool_use"
    assert isinstance(call.input, dict) and call.input["unit"] in ("C", "F")


class Sides(BaseModel):
    sides: bool


def test_parse(target: Target) -> None:
    answer = client_of(target).messages.parse(
        model=target.model, max_tokens=50, messages=QUESTION, output_format=Sides
    )
    assert isinstance(answer.parsed_output, Sides)


def test_errors_are_typed(target: Target) -> None:
    client = client_of(target)
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(
            model=target.model, max_tokens=4, messages=QUESTION, extra_body={"temperature": -1}
        )
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert "temperature" in body["error"]["message"]
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude-17", max_tokens=4, messages=QUESTION)
    lacking: Any = missing.value.body
    assert lacking["error"]["type"] == "not_found_error"


def test_busy_servers_are_asked_again(scripted: Scripted) -> None:
    arguments: Any = {"model": scripted.model, "max_tokens": 40}
    busy: Any = [{"role": "user", "content": "busy anthropic-1 say at last"}]
    with pytest.raises(anthropic.OverloadedError):
        client_of(scripted).messages.create(**arguments, messages=busy)
    busy = [{"role": "user", "content": "busy anthropic-2 say at last"}]
    answer = client_of(scripted, max_retries=1).messages.create(**arguments, messages=busy)
    assert text_of(answer) == "at last"


def test_models(target: Target) -> None:
    """Anthropic's list has other fields than OpenAI's, at the same path: ids are common to both."""
    assert target.model in [model.id for model in client_of(target).models.list()]
