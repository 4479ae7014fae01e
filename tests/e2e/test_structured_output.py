"""Structured output over HTTP, on the default model."""

from __future__ import annotations

import asyncio
import json
import random
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


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of kinds that end soon, so that most outputs do."""
    kinds = ["string", "integer", "number", "boolean", "enum", "const", "pattern", "format"]
    if depth < 3:
        kinds += ["object", "object", "array", "anyOf", "nullable"]
    match draw.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": draw.randint(0, 12)}
        case "integer":
            low = draw.randint(-2000, 2000)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 5000)}
        case "number":
            return {"type": "number", "exclusiveMinimum": 0, "maximum": draw.choice([0.5, 10, 99])}
        case "boolean":
            return {"type": "boolean"}
        case "enum":
            return {"enum": draw.sample(["red", 3, None, 'a"b', "é", 1.5, True, "x y"], 3)}
        case "const":
            return {"const": draw.choice(["one", {"a": [1, "b"]}, None])}
        case "pattern":
            patterns = ["^[a-c]{2,4}$", "^\\d{3}-x$", "^(yes|no)$"]
            return {"type": "string", "pattern": draw.choice(patterns)}
        case "format":
            return {"type": "string", "format": draw.choice(["date", "uuid", "ipv4"])}
        case "array":
            low = draw.randint(0, 2)
            items = random_schema(draw, depth + 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + 1}
        case "anyOf":
            return {"anyOf": [random_schema(draw, depth + 1) for _ in range(2)]}
        case "nullable":
            return {"type": ["null", "integer"], "minimum": 0, "maximum": 9}
    names = draw.sample(["name", "age", "id", "übung", "a b", 'q"'], draw.randint(0, 3))
    return {
        "type": "object",
        "properties": {name: random_schema(draw, depth + 1) for name in names},
        "required": draw.sample(names, draw.randint(0, len(names))),
        "additionalProperties": False,
    }


async def test_whatever_ends_fits_its_schema_and_disturbs_nobody(server: Server) -> None:
    draw = random.Random(5)
    schemas = [random_schema(draw) for _ in range(40)]
    free: Any = {"prompt": "Once upon a time", "max_tokens": 24, "seed": 7}
    client = server.async_client()
    alone = await client.completions.create(model=MODEL, **free)

    async def ask(schema: dict[str, Any], seed: int) -> int:
        answer = await client.completions.create(
            model=MODEL,
            prompt="Here is some JSON:\n",
            max_tokens=100,
            seed=seed,
            temperature=1.3 if seed % 2 else 0.7,
            presence_penalty=0.5 if seed % 3 else 0.0,
            logprobs=1 if seed % 5 == 0 else None,
            extra_body={"guided_json": schema},
        )
        (choice,) = answer.choices
        if choice.finish_reason != "stop":
            return 0
        jsonschema.validate(json.loads(choice.text), schema)
        return 1

    tasks = [asyncio.create_task(ask(schema, seed)) for seed, schema in enumerate(schemas)]
    among = await client.completions.create(model=MODEL, **free)
    assert among.choices[0].text == alone.choices[0].text
    assert sum(await asyncio.gather(*tasks)) > 20, "most of them end"
