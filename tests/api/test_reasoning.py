"""Reasoning on /v1/chat/completions: told apart from the answer, streamed or not."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if opens %}<think>\n{% elif enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
ANSWER = "<think>\nIs 1 < 2? 🤔\n</think>\n\nYes."


@pytest.fixture
async def site(site_with: Any) -> Any:
    made = site_with(template=TEMPLATE)
    made.engine.answer = ANSWER
    return made


async def ask(http: httpx.AsyncClient, **fields: Any) -> tuple[dict[str, Any], str, Any]:
    """Message, finish_reason and usage, after checking that the stream adds up to the same."""
    body = {"messages": MESSAGES, **fields}
    answer = (await http.post(CHAT, json=body)).json()
    [choice] = answer["choices"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await http.post(CHAT, json={**body, **options})
    *events, last = [
        msgspec.json.decode(event.removeprefix("data: "))
        for event in response.text.split("\n\n")
        if event.startswith("data: {")
    ]
    added: dict[str, str] = {}
    for event in events:
        for name, text in event["choices"][0]["delta"].items():
            added[name] = added.get(name, "") + text
    kept = {name: value for name, value in choice["message"].items() if value is not None}
    assert added == kept
    assert events[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    counts = {"completion_tokens", "completion_tokens_details"}
    assert [(name, last["usage"].get(name)) for name in counts] == [
        (name, answer["usage"].get(name)) for name in counts
    ]
    return choice["message"], choice["finish_reason"], answer["usage"]


async def test_reasoning_is_told_apart(site: Any, http: httpx.AsyncClient) -> None:
    message, reason, usage = await ask(http)
    thought = "Is 1 < 2? 🤔"
    assert (message["reasoning_content"], message["reasoning"]) == (thought, thought)
    assert (message["content"], reason) == ("Yes.", "stop")
    thinking = len("<think>\nIs 1 < 2? 🤔\n</think>".encode()) - len("<think")
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thinking}


async def test_an_event_per_token(site: Any, http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, json={"messages": MESSAGES, "stream": True})
    assert response.text.count("data: {") == len(ANSWER.encode()) + 1


async def test_a_template_may_open_the_reasoning(site: Any, http: httpx.AsyncClient) -> None:
    site.engine.answer = "Hm.</think>Yes."
    kwargs = {"opens": True}
    message, _, _ = await ask(http, chat_template_kwargs=kwargs)
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")


async def test_thinking_may_be_switched_off(site: Any, http: httpx.AsyncClient) -> None:
    site.engine.answer = "Yes."
    message, _, usage = await ask(http, chat_template_kwargs={"enable_thinking": False})
    assert message["content"] == "Yes." and "reasoning_content" not in message
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}
    prompt = site.engine.tokenizer.decode(site.engine.requests[0].prompt_token_ids)
    assert prompt.endswith("<think>\n\n</think>\n\n")


async def test_reasoning_may_be_left_out(site: Any, http: httpx.AsyncClient) -> None:
    message, _, usage = await ask(http, include_reasoning=False)
    assert message["content"] == "Yes."
    assert not {"reasoning", "reasoning_content"} & set(message)
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0


async def test_what_is_cut_off_while_thinking_has_no_content(
    site: Any, http: httpx.AsyncClient
) -> None:
    message, reason, _ = await ask(http, max_tokens=12)
    assert (message["reasoning_content"], message["content"], reason) == ("Is 1", None, "length")


async def test_a_message_is_continued_inside_its_reasoning(
    site: Any, http: httpx.AsyncClient
) -> None:
    site.engine.answer = " and on.</think>Yes."
    messages = [*MESSAGES, {"role": "assistant", "content": "<think>I was"}]
    message, _, _ = await ask(http, messages=messages, continue_final_message=True)
    assert (message["reasoning_content"], message["content"]) == ("and on.", "Yes.")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_earlier_reasoning_reaches_the_template(
    site: Any, http: httpx.AsyncClient, name: str
) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Yes", name: "Hm"}, *MESSAGES]
    assert (await http.post(CHAT, json={"messages": messages})).status_code == 200
    prompt = site.engine.tokenizer.decode(site.engine.requests[0].prompt_token_ids)
    assert "<think>Hm</think>assistant: Yes" in prompt


async def test_reasoning_then_a_call(site: Any, http: httpx.AsyncClient) -> None:
    site.engine.max_model_len = 4096
    site.engine.answer = '<think>f?</think>\n<tool_call>{"name": "f"}</tool_call>'
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = await http.post(CHAT, json={"messages": MESSAGES, "tools": tools})
    [choice] = answer.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "f?"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


async def test_without_a_parser_the_text_stays_as_it_is(site: Any, http: httpx.AsyncClient) -> None:
    site.model.text.choose_parsers(reasoning="none")
    message, _, usage = await ask(http)
    assert message["content"] == ANSWER
    assert "completion_tokens_details" not in usage
