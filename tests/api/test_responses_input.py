"""What goes into /v1/responses: items as the model sees them, and refusals by name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai.types.responses import response_create_params
from openai.types.responses.input_token_count_params import InputTokenCountParams
from tests.api.responses_checks import RESPONSES, TEMPLATE, TOOLS, events_of, prompt_of

from headrace.api.protocol import ChatCompletionRequest
from headrace.api.responses_protocol import (
    EXTENSIONS,
    ResponsesRequest,
    extensions,
    harmless,
    refused,
)

OPENAI = {
    *response_create_params.ResponseCreateParamsBase.__annotations__,
    *InputTokenCountParams.__annotations__,
    "stream",
}
CALL_ITEM = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
RESULT_ITEM = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}


@pytest.fixture
async def site(site_with: Any) -> Any:
    return site_with(template=TEMPLATE)


async def prompt(site: Any, http: httpx.AsyncClient, items: Any, **fields: Any) -> str:
    """The messages that the model saw, without the opening of its answer."""
    response = await http.post(RESPONSES, json={"input": items, **fields})
    assert response.status_code == 200, response.text
    return prompt_of(site).replace("<|im_start|>", "").removesuffix("assistant\n")


async def refusal(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The error, after checking that a stream is refused with the same."""
    body = {"input": "Hi", **fields}
    response = await http.post(RESPONSES, json=body)
    assert response.status_code == 400, response.text
    streamed = await http.post(RESPONSES, json={**body, "stream": True})
    assert (streamed.status_code, streamed.json()) == (400, response.json())
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


# --- items --------------------------------------------------------------------------------------


async def test_messages(site: Any, http: httpx.AsyncClient) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "Hello.", "annotations": []},
                {"type": "refusal", "refusal": "No."},
            ],
        },
        {"role": "assistant", "content": "More?"},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "A"}, {"type": "input_text", "text": "B"}],
        },
    ]
    seen = await prompt(site, http, items, instructions="First.")
    assert seen == (
        "system\nFirst.<|im_end|>\nsystem\nBe brief.<|im_end|>\nuser\nHi<|im_end|>\n"
        "assistant\nHello.\nNo.<|im_end|>\nassistant\nMore?<|im_end|>\nuser\nA\nB<|im_end|>\n"
    )


async def test_one_turn_of_the_assistant_is_one_message(site: Any, http: Any) -> None:
    items = [
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "summary": [], "content": [{"type": "x", "text": "Hm."}], "id": "r"},
        {"role": "assistant", "content": "A moment."},
        CALL_ITEM,
        {**CALL_ITEM, "call_id": "c2", "name": "g"},
        RESULT_ITEM,
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "dry"}],
        },
    ]
    seen = await prompt(site, http, items)
    assert seen == (
        "user\nWeather?<|im_end|>\nassistant\n<think>Hm.</think>A moment."
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call><|im_end|>\n'
        "tool\nsunny<|im_end|>\ntool\ndry<|im_end|>\n"
    )


async def test_a_summary_stands_for_reasoning(site: Any, http: httpx.AsyncClient) -> None:
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "In short."}]}
    items = [thought, {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
    assert "<think>In short.</think>A" in await prompt(site, http, items)
    nothing = {"type": "reasoning", "summary": [], "encrypted_content": None}
    assert "<think>" not in await prompt(site, http, [nothing, *items[1:]])


async def test_the_output_of_a_response_is_an_input(site: Any, http: httpx.AsyncClient) -> None:
    site.engine.answer = (
        '<think>Hm.</think>So:<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    )
    body = {"input": "Hi", "tools": TOOLS}
    output = (await http.post(RESPONSES, json=body)).json()["output"]
    call_id = output[-1]["call_id"]
    result = {"type": "function_call_output", "call_id": call_id, "output": "ok"}
    seen = await prompt(site, http, [{"role": "user", "content": "Hi"}, *output, result])
    assert seen.endswith(
        'assistant\n<think>Hm.</think>So:<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        "<|im_end|>\ntool\nok<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "tool", "content": "x"}, "input[0].role"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "user", "content": 5}, "input[0].content"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[0].content[0]"),
        ({"role": "user", "content": ["x"]}, "input[0].content[0]"),
        ({"type": "web_search_call", "id": "x"}, "input[0].type"),
        ({"type": ["message"], "role": "user", "content": "x"}, "input[0].type"),
        ({**CALL_ITEM, "name": None}, "input[0].name"),
        ({**CALL_ITEM, "arguments": {}}, "input[0].arguments"),
        ({**RESULT_ITEM, "call_id": None}, "input[0].call_id"),
        ({**RESULT_ITEM, "output": None}, "input[0].output"),
        ({**RESULT_ITEM, "output": [{"type": "input_file"}]}, "input[0].output[0]"),
        ({"type": "reasoning", "summary": "x"}, "input[0].summary"),
        ({"type": "reasoning", "content": ["x"]}, "input[0].content[0].text"),
        ({"type": "reasoning", "encrypted_content": "x"}, "input[0].encrypted_content"),
        ({"type": "item_reference", "id": "msg_1"}, "input[0]"),
        ({"id": "msg_1"}, "input[0]"),
    ],
)
async def test_bad_items(http: httpx.AsyncClient, item: Any, param: str) -> None:
    error = await refusal(http, input=[item])
    assert error["param"] == param and param in error["message"]


@pytest.mark.parametrize("value", [[], [5], {"role": "user"}, 5, ["Hi"]])
async def test_bad_input(http: httpx.AsyncClient, value: Any) -> None:
    assert (await refusal(http, input=value))["param"] == "input"


async def test_input_is_required(http: httpx.AsyncClient) -> None:
    response = await http.post(RESPONSES, json={"model": "tiny"})
    assert response.json()["error"]["code"] == "missing_required_parameter"


# --- fields -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 100_000}, "input"),
        ({"input": "x" * 600}, "input"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {}, "stream": False}, "stream_options"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"include": ["reasoning.secret"]}, "include[0]"),
        ({"include": ["everything"]}, "include[0]"),
        ({"truncation": "middle"}, "truncation"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"reasoning": {"effort": "utmost"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "poem"}}, "reasoning.summary"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].name"),
        (
            {"tools": [{**TOOLS[0], "parameters": {"type": "string"}}]},
            "tools[0].parameters.type",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "h"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.tools"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "tools": [TOOLS[1], {"type": "function", "name": "h"}],
                },
            },
            "tool_choice.tools[1].name",
        ),
        ({"top_k": "many"}, "top_k"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"n": 2}, "n"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
    ],
)
async def test_refusals_name_the_field(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    if fields.get("stream") is False:
        error = (await http.post(RESPONSES, json={"input": "Hi", **fields})).json()["error"]
    else:
        error = await refusal(http, **fields)
    assert error["param"] == param
    for name in ("messages[", "max_completion_tokens", "function.", "response_format"):
        assert name not in error["message"].replace("Call it max_output_tokens", "")


async def test_a_template_names_the_input(site_with: Any, http_to: Any) -> None:
    site = site_with(template="{{ raise_exception('I take no messages.') }}")
    async with http_to(site) as http:
        error = await refusal(http)
    assert error["param"] == "input"


@pytest.mark.parametrize("name", sorted(OPENAI))
def test_every_field_of_openai_s_has_a_policy(name: str) -> None:
    if name == "personality":  # of input_tokens only: told as unknown
        return
    assert (name in ResponsesRequest.model_fields) + (name in harmless()) + (name in refused()) == 1


def test_no_field_of_chat_is_ignored() -> None:
    """It works as in chat, or is refused by name."""
    ours = {*ResponsesRequest.model_fields, *EXTENSIONS, *harmless(), *refused()}
    assert set(ChatCompletionRequest.model_fields) <= ours
    assert not set(extensions()) & {*ResponsesRequest.model_fields, *harmless(), *refused()}


async def test_neutral_values_pass(http: httpx.AsyncClient) -> None:
    neutral = {name: policy.neutral[0] for name, policy in refused().items() if policy.neutral}
    nothing = dict.fromkeys([*refused(), *extensions(), "tools", "text", "store"])
    allowed = {"text": {"format": {"type": "text"}, "verbosity": "medium"}}
    for fields in (neutral, nothing, allowed, dict.fromkeys(harmless(), "x")):
        known = {name: value for name, value in fields.items() if "." not in name}
        response = await http.post(RESPONSES, json={"input": "Hi", **known})
        assert response.status_code == 200, response.text
        assert "headrace" not in response.json()


async def test_unknown_fields_are_named(http: httpx.AsyncClient) -> None:
    body = {"input": "Hi", "temprature": 1, "reasoning": {"depth": 3}}
    whole = (await http.post(RESPONSES, json=body)).json()
    assert whole["headrace"] == {"ignored_fields": ["temprature", "reasoning.depth"]}
    streamed = await http.post(RESPONSES, json={**body, "stream": True})
    for event in (events_of(streamed.text)[0], events_of(streamed.text)[-1]):
        assert event["response"]["headrace"] == whole["headrace"]
    error = await refusal(http, temprature=1, strict_fields=True)
    assert (error["code"], error["param"]) == ("unknown_parameter", "temprature")
    counted = await http.post(f"{RESPONSES}/input_tokens", json=body)
    assert counted.json()["headrace"] == whole["headrace"]


async def test_what_only_chat_has_is_refused(http: httpx.AsyncClient) -> None:
    error = await refusal(http, continue_final_message=True)
    assert error["param"] == "continue_final_message"


# --- truncation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [10, 60, 100, 150, 220, 290, 360])
async def test_the_oldest_turns_are_left_out(site: Any, http: httpx.AsyncClient, room: int) -> None:
    turns = [
        item
        for n in range(12)
        for item in (
            {"role": "user", "content": f"question {n} " + "x" * 30},
            {"role": "assistant", "content": f"answer {n}"},
        )
    ]
    items = [*turns, {"role": "user", "content": "last"}]
    error = await refusal(http, input=items, instructions="Be brief.")
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    fields = {"truncation": "auto", "max_output_tokens": room, "instructions": "Be brief."}
    seen = await prompt(site, http, items, **fields)
    assert seen.startswith("system\nBe brief.<|im_end|>\nuser\nquestion ")
    assert "question 0" not in seen and seen.endswith("answer 11<|im_end|>\nuser\nlast<|im_end|>\n")
    length = len(site.engine.requests[-1].prompt_token_ids)
    turn = len("user\nquestion 1 \nassistant\nanswer 1\n") + 30 + 4
    assert length + room <= 512 < length + room + turn + 2


async def test_the_last_turn_stays(http: httpx.AsyncClient) -> None:
    items = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "x" * 600}]
    error = await refusal(http, input=items, truncation="auto")
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


# --- reasoning ----------------------------------------------------------------------------------


async def test_effort_reaches_the_template(site_with: Any, http_to: Any) -> None:
    site = site_with(template="{{ reasoning_effort }}: {{ messages[0].content }}</think>")
    async with http_to(site) as http:
        body = {"input": "Hi", "reasoning": {"effort": "low"}}
        response = await http.post(RESPONSES, json=body)
        assert response.json()["reasoning"] == {"effort": "low", "summary": None}
    assert prompt_of(site).startswith("low: Hi")


async def test_a_template_that_knows_no_effort(http: httpx.AsyncClient) -> None:
    error = await refusal(http, reasoning={"effort": "low"})
    assert error["param"] == "reasoning.effort" and "reasoning.effort" in error["message"]


async def test_a_budget_of_thinking(site_with: Any, http_to: Any) -> None:
    site = site_with(template=TEMPLATE, specials=("<think>", "</think>"))
    async with http_to(site) as http:
        await http.post(RESPONSES, json={"input": "Hi", "thinking_token_budget": 7})
    assert site.engine.requests[0].thinking.max_tokens == 7
