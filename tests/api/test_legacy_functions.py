"""functions and function_call on /v1/chat/completions: tools in an older shape."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
TEMPLATE = (
    "{{ tools | tojson }}<tool_call>{% for m in messages %}{{ m.role }} {{ m.name or '' }}: "
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}\n"
    "{% endfor %}"
)
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Bern"}}\n</tool_call>'
FUNCTIONS: Any = [
    {"name": "f", "description": "Does f", "parameters": {"type": "object"}},
    {"name": "g", "parameters": {"type": "object"}},
]


@pytest.fixture
async def site(site_with: Any) -> Any:
    made = site_with(template=TEMPLATE)
    made.engine.max_model_len = 2048
    return made


@pytest.fixture
async def client(server: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as made:
        yield made


@pytest.mark.parametrize(
    ("function_call", "reason"), [(None, "function_call"), ("auto", "function_call"),
                                  ({"name": "f"}, "stop")],
)  # fmt: skip
async def test_a_call(
    site: Any, client: openai.AsyncOpenAI, function_call: Any, reason: str
) -> None:
    site.engine.answer = CALL
    arguments: Any = {"model": "tiny", "messages": MESSAGES, "functions": FUNCTIONS}
    if function_call is not None:
        arguments["function_call"] = function_call
    answer = await client.chat.completions.create(**arguments)
    [choice] = answer.choices
    assert choice.finish_reason == reason
    assert (choice.message.content, choice.message.tool_calls) == (None, None)
    assert choice.message.function_call.name == "f"
    assert json.loads(choice.message.function_call.arguments) == {"city": "Bern"}
    assert bool(site.engine.requests[-1].grammar) is (reason == "stop")

    stream = await client.chat.completions.create(**arguments, stream=True)
    name, text = "", ""
    async for chunk in stream:
        delta = chunk.choices[0].delta
        assert delta.tool_calls is None
        if delta.function_call is not None:
            name += delta.function_call.name or ""
            text += delta.function_call.arguments or ""
    assert (name, text) == ("f", choice.message.function_call.arguments)
    assert chunk.choices[0].finish_reason == reason


async def test_only_one_call(site: Any, http: httpx.AsyncClient) -> None:
    site.engine.answer = f"{CALL}\n{CALL}"
    for stream in (False, True):
        body = {"messages": MESSAGES, "functions": FUNCTIONS, "stream": stream}
        response = await http.post(CHAT, json=body)
        assert response.text.count('"name"') == 1


async def test_the_prompt_is_that_of_tools(site: Any, http: httpx.AsyncClient) -> None:
    call = {"name": "f", "arguments": '{"city":"Bern"}'}
    old = [
        *MESSAGES,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "f", "content": "sunny"},
    ]
    made = {"id": "1", "type": "function", "function": call}
    new = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    tools = [{"type": "function", "function": function} for function in FUNCTIONS]
    for body in ({"messages": old, "functions": FUNCTIONS}, {"messages": new, "tools": tools}):
        assert (await http.post(CHAT, json=body)).status_code == 200
    first, second = (request.prompt_token_ids for request in site.engine.requests)
    assert first == second
    assert "function f: sunny" not in site.engine.tokenizer.decode(first)


async def test_none_may_be_called(site: Any, http: httpx.AsyncClient) -> None:
    site.engine.answer = CALL
    body = {"messages": MESSAGES, "functions": FUNCTIONS, "function_call": "none"}
    [choice] = (await http.post(CHAT, json=body)).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"functions": FUNCTIONS, "tools": [{"type": "function", "function": FUNCTIONS[0]}]},
         "functions", "exclude"),
        ({"functions": FUNCTIONS, "function_call": "required"}, "function_call", "must be"),
        ({"functions": FUNCTIONS, "function_call": {"name": "h"}}, "function_call.name", "'h'"),
        ({"functions": FUNCTIONS, "function_call": {}}, "function_call.name", "is required"),
        ({"function_call": {"name": "f"}}, "function_call", "there are no"),
        ({"functions": [FUNCTIONS[0], FUNCTIONS[0]]}, "functions[1].name", "twice"),
        ({"functions": [{"name": "a b"}]}, "functions[0].name", "pattern"),
        ({"functions": FUNCTIONS * 300}, "functions", "at most 512"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].name", "required"),
        ({"messages": [{"role": "assistant", "function_call": {"a": 1}}]},
         "messages[0].function_call", "name"),
        ({"messages": [{"role": "user", "content": "x", "function_call": {"name": "f"}}]},
         "messages[0].tool_calls", "assistant messages only"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named(
    http: httpx.AsyncClient, fields: Any, param: str, message: str
) -> None:
    response = await http.post(CHAT, json={"messages": MESSAGES, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], message in error["message"]) == (param, True), error
