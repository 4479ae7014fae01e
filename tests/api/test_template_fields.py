"""documents, chat_template and echo of chat requests."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from headrace.text import chat_template

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
RAG = (
    "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
)
DOCUMENTS = [{"title": "A", "text": "1"}, {"title": "B", "text": "2"}]
OWN = "{{ bos_token }}|{{ messages[0].content }}|{{ x }}"


def prompt_of(site: Any) -> str:
    prompt = site.engine.requests[-1].prompt_token_ids
    text: str = site.engine.tokenizer.decode(prompt, skip_special_tokens=False)
    return text


async def test_documents_reach_a_template_that_knows_them(site_with: Any, http_to: Any) -> None:
    site = site_with(template=RAG)
    body = {"messages": MESSAGES, "documents": DOCUMENTS}
    async with http_to(site) as http:
        assert (await http.post(CHAT, json=body)).status_code == 200
        applied = await http.post("/apply-template", json=body)
        counted = await http.post("/tokenize", json=body)
    assert prompt_of(site) == "[A: 1][B: 2]user: Hi;" == applied.json()["prompt"]
    assert counted.json()["tokens"] == site.engine.requests[-1].prompt_token_ids


@pytest.mark.parametrize("path", [CHAT, "/apply-template", "/tokenize"])
async def test_documents_are_not_lost_in_silence(http: httpx.AsyncClient, path: str) -> None:
    response = await http.post(path, json={"messages": MESSAGES, "documents": DOCUMENTS})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "unsupported_parameter",
        "documents",
    )
    response = await http.post(path, json={"messages": MESSAGES, "documents": []})
    assert response.status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/apply-template", "/tokenize"])
async def test_a_template_needs_trust(http: httpx.AsyncClient, path: str) -> None:
    response = await http.post(path, json={"messages": MESSAGES, "chat_template": OWN})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "chat_template")
    assert "--trust-request-chat-template" in error["message"]


async def test_a_trusted_template(site_with: Any, http_to: Any) -> None:
    site = site_with(trust_request_chat_template=True)
    body = {"messages": MESSAGES, "chat_template": OWN, "chat_template_kwargs": {"x": "y"}}
    async with http_to(site) as http:
        for _ in range(2):
            assert (await http.post(CHAT, json=body)).status_code == 200
            assert prompt_of(site) == "<|im_start|>|Hi|y"
        applied = await http.post("/apply-template", json=body)
        assert applied.json()["prompt"] == "<|im_start|>|Hi|y"
        assert (await http.post(CHAT, json={"messages": MESSAGES})).status_code == 200
        assert prompt_of(site).endswith("<|im_start|>assistant\n"), "the model's own is back"


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
SLOW = "{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOP, "loops more than 200000 times"),
        (MACRO, "loops more than 200000 times"),
        (SLOW, "takes more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{% for", "does not compile"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "does not compile"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile"),
        ("x" * 200_000, "chat_template"),
    ],
)
async def test_hostile_templates(
    site_with: Any,
    http_to: Any,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    words: str,
) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5 if template == SLOW else 60.0)
    async with http_to(site_with(trust_request_chat_template=True)) as http:
        body = {"messages": MESSAGES, "chat_template": template}
        response = await http.post(CHAT, json=body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(http: httpx.AsyncClient, stream: bool) -> None:
    """As in vLLM: a last message of the assistant comes first."""
    messages = [*MESSAGES, {"role": "assistant", "content": "I say: "}]
    body = {
        "messages": messages,
        "continue_final_message": True,
        "echo": True,
        "n": 2,
        "stream": stream,
    }
    response = await http.post(CHAT, json=body)
    if not stream:
        texts = [choice["message"]["content"] for choice in response.json()["choices"]]
        assert texts == ["I say: Hello, world!"] * 2
    else:
        assert response.text.count("I say: H") == 2
    response = await http.post(CHAT, json={"messages": MESSAGES, "echo": True})
    assert response.json()["choices"][0]["message"]["content"] == "Hello, world!"
