"""Which grammar a request asks for, and what is refused before the engine sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.one_of import without_one_of
from headrace.engine.client import FinishReason

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def schema_in(grammar: str) -> Any:
    schema = json.loads(grammar.removeprefix("start: %json "))
    del schema["x-guidance"]
    return schema


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
    ],
)
@pytest.mark.parametrize(
    "body", [{"messages": MESSAGES}, {"prompt": "Hi"}], ids=["chat", "completions"]
)
async def test_all_spellings_of_a_schema_are_one(
    site: Any, http: httpx.AsyncClient, fields: Any, body: Any
) -> None:
    path = CHAT if "messages" in body else "/v1/completions"
    response = await http.post(path, json={**body, **fields})
    assert response.status_code == 200 and "headrace" not in response.json()
    (request,) = site.engine.requests
    assert schema_in(request.grammar) == SCHEMA


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"structured_outputs": {"choice": ["a b", 'c"']}}, r'start: "a b" | "c\""'),
        ({"guided_choice": ["yes", "no"]}, 'start: "yes" | "no"'),
        ({"guided_regex": r"\d/x"}, r"start: /[0-9]\/x/"),
        ({"regex": "a"}, "start: /a/"),
        ({"guided_grammar": "start: A\nA: /x/"}, "start: A\nA: /x/"),
        ({"grammar": 'start: "a"'}, 'start: "a"'),
        ({"response_format": {"type": "text"}}, ""),
        ({"response_format": None, "guided_json": None}, ""),
        ({"structured_outputs": {}}, ""),
    ],
)
async def test_other_kinds(site: Any, http: httpx.AsyncClient, fields: Any, grammar: str) -> None:
    response = await http.post(CHAT, json={"messages": MESSAGES, **fields})
    assert response.status_code == 200
    assert site.engine.requests[0].grammar == grammar


async def test_gbnf_is_translated(site: Any, http: httpx.AsyncClient) -> None:
    await http.post(CHAT, json={"messages": MESSAGES, "ebnf": 'root ::= "a" | "b"'})
    assert "start:" in site.engine.requests[0].grammar
    assert "::=" not in site.engine.requests[0].grammar


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": 3}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": "json_object"}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["x" * 300_000]}, "guided_choice"),
        ({"guided_choice": ["a"] * 5000}, "guided_choice"),
        ({"guided_regex": "x" * 300_000}, "guided_regex"),
        ({"guided_json": {"enum": ["x" * 300_000]}}, "guided_json"),
        ({"ebnf": "root ::= ("}, "ebnf"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a", "allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"guided_regex": "a", "bad_words": ["b"]}, "bad_words"),
    ],
)
async def test_what_cannot_be_is_named(
    site: Any, http: httpx.AsyncClient, fields: Any, param: str
) -> None:
    response = await http.post(CHAT, json={"messages": MESSAGES, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and param.rpartition(".")[2] in error["message"]
    assert not site.engine.requests


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_is_a_400(
    site_with: Callable[..., Any], http_to: Callable[..., Any], stream: bool
) -> None:
    site = site_with()
    site.engine.fail_after, site.engine.fail_reason = 0, FinishReason.REFUSED
    async with http_to(site) as http:
        body = {"messages": MESSAGES, "guided_regex": "a", "stream": stream}
        response = await http.post(CHAT, json=body)
        await site.settle()
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == "guided_regex"
    assert "failed on this request" in error["message"]
    assert site.finished("refused") == 1


TAGGED = [
    {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]},
    {"type": "object", "properties": {"k": {"enum": ["b", "c"]}}, "required": ["k"]},
]


@pytest.mark.parametrize(
    ("branches", "same"),
    [
        (TAGGED, True),
        ([{"type": "string"}, {"type": "integer"}], True),
        ([{"type": "number"}, {"type": "integer"}], False),
        ([TAGGED[0], TAGGED[0]], False),
        ([TAGGED[0], {**TAGGED[1], "required": []}], False),
        ([TAGGED[0], {"type": "object"}], False),
        ([{"type": ["string", "null"]}, {"type": "boolean"}], True),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], True),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/missing"}], False),
        ([{"$ref": "#/$defs/loop"}, {"type": "string"}], False),
        ([], False),
        ([True, 3], False),
        ([{"required": 5, "type": 7}, {"required": [{}], "type": [{}]}], False),
    ],
)
def test_one_of_is_any_of_where_that_is_the_same(branches: list[Any], same: bool) -> None:
    definitions = {"a": TAGGED[0], "b": TAGGED[1], "loop": {"$ref": "#/$defs/loop"}}
    schema = {"items": [{"oneOf": branches}], "$defs": definitions, "const": {"oneOf": TAGGED}}
    new = without_one_of(schema)
    assert ("anyOf" in new["items"][0]) is same
    assert new["const"] == schema["const"]


@given(
    st.recursive(
        st.integers(0, 3) | st.sampled_from("abc"),
        lambda v: st.fixed_dictionaries({"k": v | st.sampled_from("abc")}),
        max_leaves=3,
    )
)
def test_tagged_branches_keep_their_meaning(value: Any) -> None:
    schema = {"oneOf": [*TAGGED, {"type": "integer"}]}
    validator = jsonschema.Draft202012Validator
    assert validator(without_one_of(schema)).is_valid(value) == validator(schema).is_valid(value)
