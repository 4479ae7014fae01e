"""Forced and strict tool calls on /v1/chat/completions: the grammar that the engine gets, and that
what it allows is what is answered."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
HERMES = "{{ tools }}<tool_call>{% for m in messages %}{{ m.content }}{% endfor %}"
THINKING = (
    HERMES + "<think></think>{% if opens %}<think>\n{% endif %}"
    "{% if add_generation_prompt %}{% endif %}"
)
LLAMA = HERMES.replace("<tool_call>", "<|python_tag|>")
CITY = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rome"]}}, "required": ["city"]}
BERN = '{"city": "Bern"}'


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": CITY, **more}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(*names: str) -> dict[str, Any]:
    listed = {"mode": "required", "tools": [named(name) for name in names]}
    return {"type": "allowed_tools", "allowed_tools": listed}


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    )


@pytest.fixture
async def site(site_with: Any) -> Any:
    made = site_with(template=HERMES)
    made.engine.max_model_len = 4096
    return made


def takes(site: Any, text: str) -> bool:
    """Whether the last request's grammar allows this output; any, if there is no grammar."""
    grammar = site.engine.requests[-1].grammar
    if not grammar:
        return True
    tokenizer = site.engine.tokenizer
    tokens = LLTokenizer(tokenizer.to_json(), eos_token=tokenizer.eos_id)
    matcher = LLMatcher(tokens, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


F, G = ("f", BERN), ("g", BERN)
TOOLS = [tool("f"), tool("g")]
CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    # what is asked for, outputs that are allowed, outputs that are not
    (
        {"tool_choice": "required"},
        [hermes(F), hermes(G), hermes(F, G)],
        ["", "Hi", "Hi" + hermes(F), hermes(("h", BERN)), hermes(("f", '{"city": "Oslo"}'))],
    ),
    ({"tool_choice": "required", "parallel_tool_calls": False}, [hermes(F)], [hermes(F, G)]),
    ({"tool_choice": named("g")}, [hermes(G)], [hermes(F), hermes(G, G), "Hi"]),
    ({"tool_choice": allowed("g")}, [hermes(G), hermes(G, G)], [hermes(F), "Hi"]),
    ({"tool_choice": "auto"}, ["Hi", hermes(("f", "{}"))], []),
    (
        {"tools": [tool("f", strict=True), tool("g")]},
        ["Hi", "Hi " + hermes(F, G) + "Bye", "<tool_"],
        [hermes(("f", '{"city": "Oslo"}')), "Hi <tool_call>", hermes(("h", BERN))],
    ),
    (
        {"response_format": {"type": "json_object"}},
        [BERN, hermes(F), hermes(F, G)],
        ["Hi", hermes(F) + BERN, hermes(("f", "{}")), BERN + hermes(F)],
    ),
    (
        {"response_format": {"type": "json_object"}, "tool_choice": "required"},
        [hermes(F)],
        [BERN],
    ),
    ({"response_format": {"type": "json_object"}, "tool_choice": "none"}, [BERN], [hermes(F)]),
]


@pytest.mark.parametrize(("fields", "good", "bad"), CASES)
async def test_what_an_answer_may_be(
    http: httpx.AsyncClient, site: Any, fields: Any, good: list[str], bad: list[str]
) -> None:
    response = await http.post(CHAT, json={"messages": MESSAGES, "tools": TOOLS, **fields})
    assert response.status_code == 200
    assert [text for text in good if not takes(site, text)] == []
    assert [text for text in bad if takes(site, text)] == []


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), (allowed("f"), "tool_calls"), (named("f"), "stop")],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_how_forced_calls_end(
    http: httpx.AsyncClient, site: Any, choice: Any, reason: str, stream: bool
) -> None:
    site.engine.answer = hermes(F)
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "stream": stream}
    response = await http.post(CHAT, json=body)
    assert takes(site, site.engine.answer)
    if not stream:
        [answered] = response.json()["choices"]
        [call] = answered["message"]["tool_calls"]
        assert (answered["message"]["content"], answered["finish_reason"]) == (None, reason)
        assert call["function"] == {"name": "f", "arguments": BERN}
        return
    events = [json.loads(e[6:]) for e in response.text.split("\n\n") if e.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert choices[-1]["finish_reason"] == reason
    parts = [part for one in choices for part in one["delta"].get("tool_calls", ())]
    assert parts[0]["function"]["name"] == "f"
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == json.loads(BERN)


async def test_a_format_beside_tools_that_look_alike(site_with: Any, http_to: Any) -> None:
    """Where nothing need announce a call, content could be taken for one: then it must be."""
    site = site_with(template=LLAMA, specials=("<|python_tag|>",))
    site.engine.max_model_len = 4096
    call = '{"name": "f", "parameters": {"city": "Bern"}}'
    body = {"messages": MESSAGES, "tools": TOOLS, "response_format": {"type": "json_object"}}
    async with http_to(site) as http:
        for text, calls in ((call, False), (f"<|python_tag|>{call}", True)):
            site.engine.answer = text
            [choice] = (await http.post(CHAT, json=body)).json()["choices"]
            assert takes(site, text)
            assert bool(choice["message"].get("tool_calls")) is calls
            assert choice["message"]["content"] == (None if calls else text)
        assert not takes(site, f"{call}; {call}")
        assert not takes(site, '<|python_tag|>{"name": "f", "parameters": {}}')


async def test_strict_functions_of_a_model_that_was_told_the_marker(
    site_with: Any, http_to: Any
) -> None:
    """In the generic format JSON that nothing announces is content then."""
    site = site_with()
    site.engine.max_model_len = 4096
    site.engine.answer = '```json\n{"name": "f", "arguments": {}}\n```'
    body = {"messages": MESSAGES, "tools": [tool(strict=True)]}
    async with http_to(site) as http:
        [choice] = (await http.post(CHAT, json=body)).json()["choices"]
    assert takes(site, site.engine.answer)
    assert choice["message"]["content"] == site.engine.answer
    assert takes(site, hermes(F)) and not takes(site, hermes(("f", "{}")))


@pytest.mark.parametrize("specials", [(), ("<think>", "</think>", "<tool_call>", "</tool_call>")])
@pytest.mark.parametrize("opens", [False, True])
async def test_reasoning_stays_free(
    site_with: Any, http_to: Any, opens: bool, specials: tuple[str, ...]
) -> None:
    site = site_with(template=THINKING, specials=specials)
    site.engine.max_model_len = 4096
    body = {"messages": MESSAGES, "chat_template_kwargs": {"opens": opens}}
    begin = "" if opens else "<think>"
    thought = 'I could: {"name": "g", "arguments": {}}.' if specials else f"I could: {hermes(G)}."
    json_object = {"response_format": {"type": "json_object"}}
    async with http_to(site) as http:
        site.engine.answer = f"{begin}{thought}</think>\n\n{hermes(F)}"
        forced = {**body, "tools": TOOLS, "tool_choice": "required"}
        [choice] = (await http.post(CHAT, json=forced)).json()["choices"]
        assert takes(site, site.engine.answer)
        assert choice["message"]["reasoning_content"] == thought
        [call] = choice["message"]["tool_calls"]
        assert (call["function"]["name"], choice["finish_reason"]) == ("f", "tool_calls")
        assert takes(site, hermes(F)) is not opens
        assert not takes(site, f"{begin}Hm.</think>Yes")
        assert (await http.post(CHAT, json={**body, **json_object})).status_code == 200
        assert takes(site, f"{begin}Hm {{</think>\n\n{BERN}")
        assert not takes(site, f"{begin}Hm.</think>Yes")
        assert takes(site, BERN) is not opens


async def test_arguments_are_those_of_the_schema(http: httpx.AsyncClient, site: Any) -> None:
    """Every function's, strict or not; none, where there are no parameters."""
    loose = {"type": "object", "properties": {"city": {"type": "string"}}, "not": {"const": 1}}
    tools = [tool("f", parameters=loose), {"type": "function", "function": {"name": "none"}}]
    body = {"messages": MESSAGES, "tools": tools, "tool_choice": "required"}
    assert (await http.post(CHAT, json=body)).status_code == 200
    assert takes(site, hermes(("f", '{"city": "x", "more": [1]}'), ("none", "{}")))
    assert not takes(site, hermes(("f", '{"city": 1}')))
    assert not takes(site, hermes(("none", '{"a": 1}')))
    jsonschema.validate({"city": "x", "more": [1]}, loose)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"bad_words": ["x"]}, "bad_words", "cannot be combined"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids", "cannot be combined"),
    ({"tools": [tool(parameters={"properties": {"a" * 1_200_000: {}}})]}, "tools", "characters"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
async def test_what_cannot_be_kept_to_is_named(
    http: httpx.AsyncClient, site: Any, fields: Any, param: str, message: str
) -> None:
    body = {"messages": MESSAGES, "tools": [tool("f")], "tool_choice": "required", **fields}
    site.engine.max_model_len = 10**7
    response = await http.post(CHAT, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert not site.engine.requests


@pytest.mark.parametrize("depth", [100, 800, 3000, 100_000])
async def test_schemas_without_bottom(http: httpx.AsyncClient, site: Any, depth: int) -> None:
    """They are refused or handed on, and take no time."""
    site.engine.max_model_len = 10**7
    body = json.dumps(
        {"messages": MESSAGES, "tools": [tool(parameters={"x": "DEEP"})], "tool_choice": "required"}
    )
    response = await http.post(
        CHAT, content=body.replace('"DEEP"', '{"a":' * depth + "1" + "}" * depth)
    )
    assert response.status_code in (200, 400)
    assert (response.status_code == 200) is (depth == 100)
