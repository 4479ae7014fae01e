"""openai-python's helpers for answers of a given shape: `.parse()` and forced, strict calls.

On the real model: whatever it would like to say, what comes back fits.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from tests.clients.conftest import Target

pytestmark = pytest.mark.e2e


class Kind(Enum):
    CITY = "city"
    RIVER = "river"


class Place(BaseModel):
    name: str
    kind: Kind
    people: Annotated[int, Field(ge=0, le=99_999_999)] | None
    """Bounded: left alone, the small model adds zeros for ever."""


class Places(BaseModel):
    """Nested, with a definition that is referred to."""

    first: Place
    size: Literal["one", "two"]


class Weather(BaseModel):
    """The weather of a place."""

    unit: Literal["celsius", "fahrenheit"]
    days: Literal[1, 2, 3]


ASK: Any = [{"role": "user", "content": "Tell me of one city as JSON. Be brief."}]


@pytest.fixture
def arguments(target: Target) -> dict[str, Any]:
    return {"model": target.model, "messages": ASK, "temperature": 0, "max_tokens": 200}


def test_parse(target: Target, arguments: Any) -> None:
    completion = target.openai().chat.completions.parse(**arguments, response_format=Places)
    parsed = completion.choices[0].message.parsed
    assert isinstance(parsed, Places)
    assert completion.choices[0].finish_reason == "stop"


async def test_parse_async(target: Target, arguments: Any) -> None:
    async with target.async_openai() as client:
        completion = await client.chat.completions.parse(**arguments, response_format=Places)
    assert isinstance(completion.choices[0].message.parsed, Places)


def test_parse_in_a_stream(target: Target, arguments: Any) -> None:
    whole = target.openai().chat.completions.parse(**arguments, response_format=Places)
    with target.openai().chat.completions.stream(**arguments, response_format=Places) as stream:
        last = None
        for event in stream:
            if event.type == "content.done":
                last = event.parsed
        final = stream.get_final_completion()
    assert last == final.choices[0].message.parsed == whole.choices[0].message.parsed


def test_json_object(target: Target, arguments: Any) -> None:
    completion = target.openai().chat.completions.create(
        **arguments, response_format={"type": "json_object"}
    )
    choice = completion.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)
    else:  # the model went on
        assert (choice.message.content or "").lstrip().startswith("{")


def test_extensions_constrain_completions(target: Target) -> None:
    client = target.openai()
    ask: Any = {"model": target.model, "prompt": "Paris is", "max_tokens": 20}
    choice = client.completions.create(
        **ask, extra_body={"structured_outputs": {"choice": ["a city", "a river"]}}
    )
    assert choice.choices[0].text in ("a city", "a river")
    digits = client.completions.create(
        **ask, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}
    )
    assert len(digits.choices[0].text) == 3 and digits.choices[0].text.isdigit()


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_strict_tools_are_parsed(target: Target, arguments: Any, choice: Any) -> None:
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    completion = target.openai().chat.completions.parse(
        **arguments, tools=tools, tool_choice=choice, parallel_tool_calls=False
    )
    (call,) = completion.choices[0].message.tool_calls or []
    assert call.function.name == "weather"
    assert isinstance(call.function.parsed_arguments, Weather)
    with target.openai().chat.completions.stream(
        **arguments, tools=tools, tool_choice=choice, parallel_tool_calls=False
    ) as stream:
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or []
    assert streamed.function.parsed_arguments == call.function.parsed_arguments


def test_an_answer_cut_short_is_told(target: Target, arguments: Any) -> None:
    arguments["max_tokens"] = 3
    with pytest.raises(openai.LengthFinishReasonError):
        target.openai().chat.completions.parse(**arguments, response_format=Places)


def test_a_hopeless_schema_is_refused(target: Target, arguments: Any) -> None:
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        target.openai().chat.completions.create(**arguments, response_format=bad)
    assert (caught.value.param or "").startswith("response_format")
