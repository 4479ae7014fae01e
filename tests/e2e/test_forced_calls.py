"""Forced and strict tool calls over HTTP, on the default model: whatever it draws, they match."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

pytestmark = pytest.mark.e2e

MODEL = "SmolLM2-135M-Instruct"
QUESTION: Any = [{"role": "user", "content": "What is the weather in Bern, and what is 2 + 2?"}]
SCHEMAS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "unit": {"enum": ["C", "F"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "add": {
        "type": "object",
        "properties": {
            "numbers": {
                "type": "array",
                "items": {"type": "integer", "minimum": -99, "maximum": 99},
                "maxItems": 3,
            }
        },
        "required": ["numbers"],
        "additionalProperties": False,
    },
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": s}}
    for name, s in SCHEMAS.items()
]
NAMED: Any = {"type": "function", "function": {"name": "add"}}


def check(choice: Any) -> list[str]:
    """The names of a choice's calls, all of which match."""
    for call in choice.message.tool_calls or []:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [call.function.name for call in choice.message.tool_calls or []]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls(client: openai.OpenAI, tool_choice: Any, seed: int) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=TOOLS,
        tool_choice=tool_choice,
        parallel_tool_calls=False,
        temperature=1,
        seed=seed,
        n=4,
        max_tokens=120,
    )
    for choice in answer.choices:
        named = tool_choice is NAMED
        assert choice.finish_reason == ("stop" if named else "tool_calls")
        [name] = check(choice)
        assert name == "add" or not named
        assert choice.message.content is None


def test_a_forced_call_streamed(client: openai.OpenAI) -> None:
    arguments: Any = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 5,
        "max_tokens": 120,
    }
    whole = client.chat.completions.create(**arguments)
    with client.chat.completions.stream(**arguments) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    assert check(streamed.choices[0]) == check(whole.choices[0])
    assert len(check(whole.choices[0])) == 1
    calls = [answer.choices[0].message.tool_calls or [] for answer in (whole, streamed)]
    assert calls[0][0].function.arguments == calls[1][0].function.arguments


def test_strict_calls_in_text(client: openai.OpenAI) -> None:
    """From the marker on, which the model is led to here, nothing but such a call can come."""
    tools: Any = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    lead = "Answer with <tool_call> and nothing else: <tool_call> <tool_call> <tool_call>"
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[*QUESTION, {"role": "user", "content": lead}],
        tools=tools,
        n=8,
        max_tokens=120,
        seed=3,
    )
    assert any([check(choice) for choice in answer.choices])


def test_a_format_beside_tools(client: openai.OpenAI) -> None:
    """Each answer is a call, or fits the format."""
    schema = SCHEMAS["add"]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=TOOLS,
        response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
        n=4,
        max_tokens=120,
        seed=4,
    )
    for choice in answer.choices:
        if not check(choice):
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content or ""), schema)


def test_a_schema_that_cannot_be_kept_to_is_named(client: openai.OpenAI) -> None:
    function = {"name": "f", "strict": True, "parameters": {"not": {"required": ["a"]}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=[{"type": "function", "function": function}]
        )
    assert caught.value.param == "tools"
    assert '"not"' in caught.value.message
