"""Structured output over HTTP, on the default model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jsonschema
import openai
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

MODEL = "SmolLM2-135M-Instruct"
QUESTION: Any = [{"role": "user", "content": "Tell me about Bob, who is 42 and likes red."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


def test_the_answer_fits_the_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, response_format=FORMAT, max_tokens=80, n=2, seed=3
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PERSON)


def test_a_stream_has_the_same_text(client: openai.OpenAI) -> None:
    arguments: Any = {
        "model": MODEL,
        "messages": QUESTION,
        "response_format": FORMAT,
        "max_tokens": 80,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**arguments)
    stream = client.chat.completions.create(**arguments, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_schema_is_a_400_before_the_first_event(client: openai.OpenAI, stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, response_format=wanted, stream=stream
        )
    assert caught.value.param == "response_format.json_schema.schema"
    assert "uniqueItems" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ("yes", "no")),
        ({"guided_regex": "[ab]{2}"}, ("aa", "ab", "ba", "bb")),
        ({"ebnf": 'root ::= "x" ("1" | "2")'}, ("x1", "x2")),
    ],
)
def test_completions_take_other_kinds(
    server: Server, fields: dict[str, Any], texts: tuple[str, ...]
) -> None:
    answer = server.post("/v1/completions", {"prompt": "Is it? ", **fields}).json()
    assert answer["choices"][0]["text"] in texts
    assert answer["choices"][0]["finish_reason"] == "stop"
