"""Tools on /v1/chat/completions: what reaches the model, and what comes back, streamed or not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
HERMES = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call>{}</tool_call><|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.name or '' }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Zürich {\\"}"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
ARGUMENTS = {"city": 'Zürich {"}'}


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": name, "description": f"Does {name}", "parameters": parameters, **more}
    return {"type": "function", "function": function}


TOOLS: Any = [tool("f"), tool("g")]


@pytest.fixture
async def site(site_with: Any) -> Any:
    made = site_with(template=HERMES)
    made.engine.max_model_len = 2048
    return made


@pytest.fixture
async def client(server: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as made:
        yield made


async def streamed(client: openai.AsyncOpenAI, **arguments: Any) -> tuple[Any, list[Any]]:
    """The message and finish_reason that the official client puts together, and all chunks."""
    chunks: list[Any] = []
    async with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, **arguments
    ) as stream:
        async for event in stream:
            if event.type == "chunk":
                chunks.append(event.chunk)
        answer = await stream.get_final_completion()
    return answer.choices[0], chunks


async def both(client: openai.AsyncOpenAI, **arguments: Any) -> Any:
    """The choice of an answer, after checking that the stream adds up to the same."""
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, **arguments)
    [whole] = answer.choices
    choice, _ = await streamed(client, **arguments)
    assert (choice.message.content or None) == (whole.message.content or None)
    assert choice.finish_reason == whole.finish_reason
    pairs = [
        [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        for message in (choice.message, whole.message)
    ]
    assert pairs[0] == pairs[1]
    return whole


async def test_a_call(site: Any, client: openai.AsyncOpenAI) -> None:
    site.engine.answer = CALL
    choice = await both(client, tools=TOOLS)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "f")
    assert call.id.startswith("call_")
    assert json.loads(call.function.arguments) == ARGUMENTS


async def test_several_calls_and_text_around_them(site: Any, client: openai.AsyncOpenAI) -> None:
    site.engine.answer = f"One moment.\n{CALL}\n{OTHER}\nDone."
    choice = await both(client, tools=TOOLS)
    assert choice.message.content == "One moment.Done."
    assert [call.function.name for call in choice.message.tool_calls] == ["f", "g"]
    assert len({call.id for call in choice.message.tool_calls}) == 2


@pytest.mark.parametrize("burst", [1, 7, 1000])
async def test_the_deltas_of_a_call(site: Any, client: openai.AsyncOpenAI, burst: int) -> None:
    """index, id and name first; then pieces of arguments that add up to JSON."""
    site.engine.answer = f"Hm.{CALL}{OTHER}"
    site.engine.burst = burst
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert len(chunks) == len(f"Hm.{CALL}{OTHER}".encode()) + 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "tool_calls"]
    arguments, ids, names = ["", ""], ["", ""], ["", ""]
    for chunk in chunks:
        for part in chunk.choices[0].delta.tool_calls or []:
            if part.id is not None:
                assert (ids[part.index], part.type) == ("", "function")
                ids[part.index], names[part.index] = part.id, part.function.name
            else:
                assert part.function.name is None and ids[part.index]
            arguments[part.index] += part.function.arguments
    assert names == ["f", "g"]
    assert [json.loads(text) for text in arguments] == [ARGUMENTS, {}]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hm."
    pieces = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert len(pieces) > 10


async def test_only_one_call_at_a_time(site: Any, client: openai.AsyncOpenAI) -> None:
    site.engine.answer = f"{CALL}{OTHER}"
    choice = await both(client, tools=TOOLS, parallel_tool_calls=False)
    assert [call.function.name for call in choice.message.tool_calls] == ["f"]


@pytest.mark.parametrize(
    "answer",
    [
        "No need.",
        "<tool_call>\n{'name': 'f'}\n</tool_call>",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
    ],
)
async def test_what_is_no_call_is_content(
    site: Any, client: openai.AsyncOpenAI, answer: str
) -> None:
    site.engine.answer = answer
    choice = await both(client, tools=TOOLS)
    assert (choice.message.content, choice.finish_reason) == (answer, "stop")
    assert choice.message.tool_calls is None


@pytest.mark.parametrize(
    ("answer", "options", "reason"),
    [
        (CALL.replace('{"city', '[{"city'), {}, "stop"),
        (CALL, {"max_tokens": 60}, "length"),
    ],
)
async def test_a_call_that_breaks_off(
    site: Any, client: openai.AsyncOpenAI, answer: str, options: Any, reason: str
) -> None:
    site.engine.answer = answer
    whole = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, **options
    )
    [choice] = whole.choices
    text = answer.encode()[: options.get("max_tokens")].decode()
    assert choice.message.content == text
    assert (choice.message.tool_calls, choice.finish_reason) == (None, reason)
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, stream=True, **options
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason == reason


async def test_a_call_that_was_streamed_and_is_none_does_not_end_with_tool_calls(
    site: Any, client: openai.AsyncOpenAI
) -> None:
    site.engine.answer = CALL.replace('"}}', '"; !')
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert any(chunk.choices[0].delta.tool_calls for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_choices_are_told_apart(site: Any, client: openai.AsyncOpenAI) -> None:
    site.engine.answer = CALL
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, stream=True, n=3
    )
    arguments, ids = dict.fromkeys(range(3), ""), set()
    async for chunk in stream:
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or []:
                arguments[choice.index] += part.function.arguments
                ids |= {part.id} - {None}
    assert [json.loads(text) for text in arguments.values()] == [ARGUMENTS] * 3
    assert len(ids) == 3


async def test_log_probabilities_and_ids_come_with_calls(
    http: httpx.AsyncClient, site: Any
) -> None:
    site.engine.answer = CALL
    body = {"messages": MESSAGES, "tools": TOOLS, "logprobs": True, "return_token_ids": True}
    [whole] = (await http.post(CHAT, json=body)).json()["choices"]
    response = await http.post(CHAT, json={**body, "stream": True})
    events = [json.loads(e[6:]) for e in response.text.split("\n\n") if e.startswith("data: {")]
    ids = [token for event in events for token in event["choices"][0]["token_ids"]]
    entries = [e for event in events for e in event["choices"][0]["logprobs"]["content"]]
    assert ids == whole["token_ids"] and len(ids) == len(CALL.encode()) + 1
    assert entries == whole["logprobs"]["content"]


# --- the prompt ---------------------------------------------------------------------------------

CALLED = {"name": "f", "arguments": '{"city":"Bern"}'}
HISTORY: Any = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": CALLED}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]  # fmt: skip


def prompt_of(site: Any) -> str:
    prompt: str = site.engine.tokenizer.decode(
        site.engine.requests[-1].prompt_token_ids, skip_special_tokens=False
    )
    return prompt


async def test_the_template_gets_tools_calls_and_results(
    http: httpx.AsyncClient, site: Any
) -> None:
    body = {"messages": HISTORY, "tools": [tool("f", strict=None)]}
    assert (await http.post(CHAT, json=body)).status_code == 200
    listed = json.dumps([tool("f")], ensure_ascii=False)
    assert prompt_of(site) == (
        f"<|im_start|>system\n{listed} <tool_call>{{}}</tool_call><|im_end|>\n"
        "<|im_start|>user \nWeather?<|im_end|>\n"
        '<|im_start|>assistant \n<tool_call>{"name": "f", "arguments": {"city": "Bern"}}'
        "</tool_call><|im_end|>\n<|im_start|>tool f\nsunny<|im_end|>\n<|im_start|>assistant\n"
    )
    counted = (await http.post("/tokenize", json=body)).json()
    assert counted["tokens"] == site.engine.requests[-1].prompt_token_ids


async def test_a_template_without_tools_gets_them_as_text(site_with: Any, http_to: Any) -> None:
    site = site_with()
    site.engine.answer = CALL
    site.engine.max_model_len = 4096
    messages = [{"role": "system", "content": "Be brief."}, *HISTORY, HISTORY[-1]]
    async with http_to(site) as http:
        answer = await http.post(CHAT, json={"messages": messages, "tools": TOOLS})
        prompt = prompt_of(site)
        assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
        assert (await http.post(CHAT, json={"messages": HISTORY})).status_code == 200
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou may call the functions below")
    assert all(json.dumps(one["function"]) in prompt for one in TOOLS)
    assert prompt.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"city":"Bern"}}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n"
        "<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert "You may call" not in prompt_of(site)


async def test_no_tools_when_none_may_be_called(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.answer = CALL
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none"}
    [choice] = (await http.post(CHAT, json=body)).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
    assert "Does f" not in prompt_of(site)


async def test_only_allowed_tools_are_called(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.answer = f"{CALL}{OTHER}"
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": allowed("auto", "g")}
    [answer] = (await http.post(CHAT, json=body)).json()["choices"]
    assert answer["message"]["content"] == CALL
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["g"]
    assert "Does f" in prompt_of(site)


async def test_markers_that_are_special_tokens_are_read(site_with: Any, http_to: Any) -> None:
    template = HERMES.replace("<tool_call>{}</tool_call>", "[TOOL_CALLS]")
    site = site_with(template=template, specials=("[TOOL_CALLS]", "[ARGS]"))
    site.engine.answer = '[TOOL_CALLS]f[ARGS]{"city": "Bern"}'
    async with http_to(site) as http:
        answer = await http.post(CHAT, json={"messages": MESSAGES, "tools": TOOLS})
        without = await http.post(CHAT, json={"messages": MESSAGES})
    [call] = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"city": "Bern"}'}
    assert len(call["id"]) == 9
    assert without.json()["choices"][0]["message"]["content"] == 'f{"city": "Bern"}'


# --- what is refused ----------------------------------------------------------------------------


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


NAMED = {"type": "function", "function": {"name": "f"}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name", "twice"),
    ({"tools": [tool("a b")]}, "tools[0].function.name", "should match pattern"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "'function'"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    ({"tools": "f"}, "tools", "array"),
    ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "an object"),
    (
        {"tools": [tool(parameters={"type": "string"})]},
        "tools[0].function.parameters.type",
        "object",
    ),
    (
        {"tools": [tool(parameters={"properties": ["a"]})]},
        "tools[0].function.parameters.properties",
        "JSON schemas",
    ),
    (
        {"tools": [tool(parameters={"required": "a"})]},
        "tools[0].function.parameters.required",
        "array of strings",
    ),
    ({"tools": [tool(f"f{i}") for i in range(513)]}, "tools", "at most 512"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "must be"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function.name", "one"),
    (
        {"tools": [tool("g")], "tool_choice": NAMED},
        "tool_choice.function.name",
        "'f' is none of the tools; there are g",
    ),
    ({"tool_choice": NAMED}, "tool_choice", "there are no tools"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", "must"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "give the id"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {}}]}]},
        "messages[0].tool_calls[0].function.name",
        "required",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        "messages[0].tool_calls[0].id",
        "required",
    ),
    (
        {"messages": [{**HISTORY[1], "role": "user", "content": "x"}]},
        "messages[0].tool_calls",
        "assistant messages only",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
async def test_what_is_wrong_is_named(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str, message: str
) -> None:
    response = await http.post(CHAT, json={"messages": MESSAGES, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


async def test_a_server_that_reads_no_calls_says_so(site_with: Any, http_to: Any) -> None:
    site = site_with(template=HERMES)
    site.model.text.choose_parsers(tool_calls="none")
    async with http_to(site) as http:
        response = await http.post(CHAT, json={"messages": MESSAGES, "tools": TOOLS})
        unused = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none"}
        assert (await http.post(CHAT, json=unused)).status_code == 200
    assert response.status_code == 400
    assert "--tool-call-parser none" in response.json()["error"]["message"]


@pytest.mark.parametrize("arguments", ["", None, "no json", '{"a": ', "[" * 5000, {"a": 1}])
async def test_broken_arguments_in_the_history_do_not_end_the_conversation(
    http: httpx.AsyncClient, site: Any, arguments: Any
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, HISTORY[2]]
    site.engine.max_model_len = 10_000
    assert (await http.post(CHAT, json={"messages": messages})).status_code == 200
