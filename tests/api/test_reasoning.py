"""Reasoning on /v1/chat/completions: told apart from the answer, streamed or not."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from headrace.sampling_params import ThinkingBudget

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


# --- how much is thought --------------------------------------------------------------------------

SPECIALS = ("<think>", "</think>")


@pytest.mark.parametrize("opens", [False, True])
async def test_a_budget_reaches_the_engine(site_with: Any, http_to: Any, opens: bool) -> None:
    site = site_with(template=TEMPLATE, specials=SPECIALS)
    body = {"messages": MESSAGES, "chat_template_kwargs": {"opens": opens}}
    begin, end = (site.engine.tokenizer.encode(marker)[0] for marker in SPECIALS)
    async with http_to(site) as http:
        for budget in (7, 0, -1, None):
            response = await http.post(CHAT, json={**body, "thinking_token_budget": budget, "n": 2})
            assert response.status_code == 200
            expected = ThinkingBudget(budget or 0, None if opens else begin, end)
            for request in site.engine.requests[-2:]:
                assert request.thinking == (None if budget in (-1, None) else expected)


@pytest.mark.parametrize(
    ("template", "specials", "opens", "message"),
    [
        ("{{ messages[0].content }}", (), False, "not known to think"),
        (TEMPLATE, (), False, "</think> is not a token"),
        (TEMPLATE, ("<think>",), True, "</think> is not a token"),
        (TEMPLATE, ("</think>",), False, "</think> is not a token"),
        (TEMPLATE, ("</think>",), True, ""),
    ],
)
async def test_a_budget_that_cannot_be_kept_is_refused(
    site_with: Any, http_to: Any, template: str, specials: Any, opens: bool, message: str
) -> None:
    site = site_with(template=template, specials=specials)
    body = {
        "messages": MESSAGES,
        "thinking_token_budget": 5,
        "chat_template_kwargs": {"opens": opens},
    }
    async with http_to(site) as http:
        response = await http.post(CHAT, json=body)
    assert response.status_code == (400 if message else 200)
    if message:
        assert response.json()["error"]["param"] == "thinking_token_budget"
        assert message in response.json()["error"]["message"]


EFFORTS = [
    # what the template looks up, effort, what it gets (None: it is refused)
    ("reasoning_effort", "high", "high"),
    ("reasoning_effort", "none", "none"),
    ("enable_thinking", "none", "False"),
    ("thinking", "none", "False"),
    ("enable_thinking", "low", None),
    ("nothing", "none", None),
    ("nothing", "low", None),
]


@pytest.mark.parametrize(("variable", "effort", "told"), EFFORTS)
async def test_effort(
    site_with: Any, http_to: Any, variable: str, effort: str, told: str | None
) -> None:
    site = site_with(template=f"{{{{ {variable} }}}}<think></think>")
    async with http_to(site) as http:
        response = await http.post(CHAT, json={"messages": MESSAGES, "reasoning_effort": effort})
        assert response.status_code == (400 if told is None else 200)
        if told is None:
            assert response.json()["error"]["param"] == "reasoning_effort"
            return
        given = {"reasoning_effort": effort, "chat_template_kwargs": {variable: "mine"}}
        assert (await http.post(CHAT, json={"messages": MESSAGES, **given})).status_code == 200
    prompts = [site.engine.tokenizer.decode(r.prompt_token_ids) for r in site.engine.requests]
    assert [prompt.split("<think>")[0] for prompt in prompts] == [told, "mine"]


async def test_a_model_that_does_not_think_makes_no_effort(
    http: httpx.AsyncClient, site: Any
) -> None:
    site.model.text.choose_parsers(reasoning="none")
    for effort, status in (("none", 200), ("low", 400), ("much", 400)):
        response = await http.post(CHAT, json={"messages": MESSAGES, "reasoning_effort": effort})
        assert response.status_code == status
