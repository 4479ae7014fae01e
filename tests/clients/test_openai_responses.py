"""openai-python's Responses API: answers, typed events, what is kept, and its tool runner."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai.lib.responses_tool_runner import RegisteredFunction, ResponsesToolRunner
from pydantic import BaseModel

if TYPE_CHECKING:
    from tests.clients.conftest import Scripted, Target

pytestmark = pytest.mark.e2e

QUESTION = "What is the capital of France?"


class City(BaseModel):
    name: str
    population: int


class Weather(BaseModel):
    """The weather of a city."""

    city: str


def test_create_and_stream(target: Target) -> None:
    client = target.openai()
    whole = client.responses.create(model=target.model, input=QUESTION, temperature=0)
    assert "Paris" in whole.output_text and whole.status == "completed"
    assert whole.usage is not None and whole.usage.output_tokens > 3
    with client.responses.stream(model=target.model, input=QUESTION, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") > 3


async def test_async(target: Target) -> None:
    async with target.async_openai() as client:
        answer = await client.responses.create(model=target.model, input=QUESTION, temperature=0)
        assert "Paris" in answer.output_text
        stream = await client.responses.create(
            model=target.model, input=QUESTION, temperature=0, stream=True
        )
        text = [event.delta async for event in stream if event.type == "response.output_text.delta"]
    assert "".join(text) == answer.output_text


def test_parse(target: Target) -> None:
    arguments: Any = {"model": target.model, "input": "A city.", "temperature": 0}
    answer = target.openai().responses.parse(**arguments, text_format=City, max_output_tokens=200)
    assert isinstance(answer.output_parsed, City)


def test_what_is_kept(target: Target) -> None:
    client = target.openai()
    made = client.responses.create(model=target.model, input=QUESTION, max_output_tokens=5)
    assert client.responses.retrieve(made.id).output_text == made.output_text
    (item,) = client.responses.input_items.list(made.id)
    assert item.type == "message" and item.role == "user"
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    unkept = client.responses.create(
        model=target.model, input=QUESTION, max_output_tokens=5, store=False
    )
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_in_the_background(target: Target) -> None:
    client = target.openai()
    made = client.responses.create(
        model=target.model, input=QUESTION, max_output_tokens=5, background=True
    )
    assert made.status in ("queued", "in_progress", "completed", "incomplete")
    deadline = time.monotonic() + 60
    while made.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        made = client.responses.retrieve(made.id)
    assert made.status == "incomplete" and made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    long = client.responses.create(
        model=target.model,
        input=QUESTION,
        background=True,
        extra_body={"ignore_eos": True},
    )
    assert client.responses.cancel(long.id).status == "cancelled"


def test_a_conversation_goes_on(scripted: Scripted) -> None:
    client = scripted.openai()
    first = client.responses.create(model=scripted.model, input="say one")
    second = client.responses.create(
        model=scripted.model, input="say two", previous_response_id=first.id
    )
    assert (first.output_text, second.output_text) == ("one", "two")
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    counted = client.responses.input_tokens.count(
        model=scripted.model, input="say two", previous_response_id=first.id
    )
    assert counted.input_tokens == second.usage.input_tokens


def test_a_call_by_hand(scripted: Scripted) -> None:
    client = scripted.openai()
    tools: Any = [
        {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}
    ]
    items: Any = [{"role": "user", "content": 'call f {"a": "ü"}'}]
    answer = client.responses.create(model=scripted.model, input=items, tools=tools)
    (call,) = answer.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"a": "ü"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    again = client.responses.create(
        model=scripted.model, input=[*items, call.model_dump(), result], tools=tools
    )
    assert again.output_text == "The tool said: done"


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner(scripted: Scripted, stream: bool) -> None:
    asked: list[str] = []

    def weather(asked_for: Weather) -> str:
        asked.append(asked_for.city)
        return "rain"

    tool = openai.pydantic_responses_function_tool(Weather, name="weather")
    runner = ResponsesToolRunner(functions=[RegisteredFunction.from_tool(tool, execute=weather)])
    said = 'call weather {"city": "Zürich"}'
    final = runner.run(
        scripted.openai(),
        {"model": scripted.model, "input": [{"role": "user", "content": said}]},
        max_steps=4,
        stream=stream,
    )
    assert final.output_text == "The tool said: rain" and asked == ["Zürich"]


def test_refusals_are_typed(target: Target) -> None:
    client = target.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=target.model, input=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=target.model, input=QUESTION, tools=[{"type": "web_search"}])
    assert (caught.value.param or "").startswith("tools[0]")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt-17", input=QUESTION)
    with pytest.raises(openai.APIStatusError) as missing:
        client.responses.create(
            model=target.model, input=QUESTION, previous_response_id="resp_nothing"
        )
    assert missing.value.status_code in (400, 404)
