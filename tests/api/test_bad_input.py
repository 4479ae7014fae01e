"""Whatever is wrong with a request: a clear OpenAI error, and the server goes on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from headrace.api.protocol import CompletionRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


async def refused(
    http: httpx.AsyncClient, url: str, body: Any, *, status: int = 400
) -> dict[str, Any]:
    """The error that `body` (bytes as they are, else as JSON) is answered with."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await http.post(url, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert set(answer) == {"error"}
    error: dict[str, Any] = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    return error


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"", "invalid_json", "not valid JSON"),
        (b"{", "invalid_json", "not valid JSON"),
        (b'{"prompt": "a",}', "invalid_json", "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "invalid_json", "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "invalid_json", "not valid JSON"),
        (b"[" * 100_000, "invalid_json", "not valid JSON"),
        (b'{"metadata": ' + b'{"a":' * 300 + b"1" + b"}" * 301, "invalid_json", "recursion"),
        (b'{"metadata": "\\udc00\\ud800"}', "invalid_json", "not valid JSON"),
        (b'{"\\ud800": 1}', "invalid_json", "not valid JSON"),
        (b'{"seed": ' + b"9" * 100_000 + b"}", "invalid_json", "out of range"),
        (b'{"metadata": ' + b'{"a":' * 5000, "invalid_json", "not valid JSON"),
        (b"[]", "invalid_type", "must be a JSON object"),
        (b'"text"', "invalid_type", "must be a JSON object"),
        (b"null", "invalid_type", "must be a JSON object"),
    ],
)
@pytest.mark.parametrize("url", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
async def test_bodies_that_are_no_json_object(
    http: httpx.AsyncClient, url: str, body: bytes, code: str, words: str
) -> None:
    error = await refused(http, url, body)
    assert error["code"] == code
    assert words in error["message"]


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "valid array"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": MESSAGES * (2**16 + 1)}, "messages", "at most 65536 item(s)"),
    ({"messages": "Hi"}, "messages", "valid array"),
    ({"messages": ["Hi"]}, "messages[0]", "object"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role", "is required"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
    ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "must be one of"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "a string"),
    ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content", "array of objects"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": -1}, "temperature", "must be in [0.0, 100.0]"),
    ({"temperature": 1e999}, "temperature", "must be in"),
    ({"top_p": 0}, "top_p", "must be in (0.0, 1.0]"),
    ({"top_k": 1.5}, "top_k", "valid integer"),
    ({"top_k": True}, "top_k", "valid integer"),
    ({"n": 0}, "n", "must be in [1, 128]"),
    ({"n": 129}, "n", "must be in [1, 128]"),
    ({"n": 10**9}, "n", "must be in [1, 128]"),
    ({"n": 10**30}, "n", "less than"),
    ({"max_tokens": 0}, "max_tokens", "must be in [1,"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "must be in [1,"),
    ({"max_tokens": -5}, "max_tokens", "must be in [1,"),
    ({"max_tokens": 10**30}, "max_tokens", "less than"),
    ({"seed": 10**30}, "seed", "less than"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "larger than max_tokens"),
    ({"presence_penalty": 3}, "presence_penalty", "must be in [-2.0, 2.0]"),
    ({"stop": 1}, "stop", "must be a string or an array"),
    ({"stop": [""]}, "stop", "empty string"),
    ({"stop": ["a"] * 65}, "stop", "at most 64 strings"),
    ({"stop": [f"s{i}" for i in range(10_000)]}, "stop", "at most 64 strings"),
    ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024 item(s)"),
    ({"stop": ["a" * 1025]}, "stop", "at most 1024 characters"),
    ({"logit_bias": {"1": 200}}, "logit_bias", "must be in [-100.0, 100.0]"),
    ({"logit_bias": [1]}, "logit_bias", "object"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "vocabulary"),
    ({"logit_bias": {"9" * 10: 1}}, "logit_bias", "vocabulary"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "must be token ids"),
    ({"logit_bias": {"\uff11": 1}}, "logit_bias", "must be token ids"),
    ({"logit_bias": {"1": float("nan")}}, "logit_bias", "must be in [-100.0, 100.0]"),
    ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias", "at most 4096 item(s)"),
    ({"stop_token_ids": [9999]}, "stop_token_ids", "vocabulary"),
    ({"logprobs": 3}, "logprobs", "valid boolean"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be in [0, 20]"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {}}, "stream_options", "stream: true"),
    ({"stream": True, "stream_options": 1}, "stream_options", "object"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "must be in [0, 20]"),
    ({"priority": 2**40}, "priority", "less than"),
    ({"cache_salt": "x" * 300}, "cache_salt", "at most 256"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "must not set"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "exclude",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_FIELDS)
async def test_bad_fields_are_named(
    http: httpx.AsyncClient, site: Any, fields: dict[str, Any], param: str, words: str
) -> None:
    # Python writes 1e999 as Infinity, which is how clients in Python would send it.
    error = await refused(http, CHAT, {"model": "tiny", "messages": MESSAGES, **fields})
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(site.engine.live) == 0


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "is required"),
        ({"prompt": []}, "prompt", "must be a string, token ids"),
        ({"prompt": ["a", 1]}, "prompt", "must be a string, token ids"),
        ({"prompt": [[]]}, "prompt", "must be a string, token ids"),
        ({"prompt": [True]}, "prompt", "must be a string, token ids"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [9999]}, "prompt", "outside 0 to 258"),
        ({"prompt": [-1]}, "prompt", "outside 0 to 258"),
        ({"prompt": ["a"] * 257}, "prompt", "more than 256 choices"),
        ({"prompt": ["a" * 1000] * 10_000}, "prompt", "more than 256 choices"),
        ({"prompt": ["a"] * 100, "n": 3}, "n", "more than 256 choices"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "must be in [1,"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "must be in [0, 20]"),
        ({"prompt": "a", "best_of": 3, "stream": True}, "best_of", "not supported with stream"),
        ({"prompt": "a", "best_of": 2, "n": 3}, "best_of", "must be in [n, 128]"),
        ({"prompt": "a", "best_of": 10**9}, "best_of", "must be in [n, 128]"),
    ],
)
async def test_bad_completion_fields(
    http: httpx.AsyncClient, body: dict[str, Any], param: str, words: str
) -> None:
    error = await refused(http, COMPLETIONS, body)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        ({"prompt": "a" * 512}, ("512",)),
        ({"prompt": "a" * 20_000}, ("512", "at least 1539")),
        ({"prompt": "a" * 500, "max_tokens": 13}, ("512", "513", "500", "13", "12")),
    ],
)
async def test_a_prompt_beyond_the_context(
    http: httpx.AsyncClient, body: dict[str, Any], numbers: tuple[str, ...]
) -> None:
    error = await refused(http, COMPLETIONS, body)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert all(number in error["message"] for number in numbers)


async def test_messages_beyond_the_context(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "a" * 600}]
    error = await refused(http, CHAT, {"messages": messages})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_a_hopeless_text_is_refused_before_it_is_tokenized(
    http: httpx.AsyncClient, site: Any
) -> None:
    site.engine.tokenizer.encode = None  # would fail if it were called
    error = await refused(http, COMPLETIONS, {"prompt": "a" * 1_000_000})
    assert "at least" in error["message"]


async def test_an_unknown_model(http: httpx.AsyncClient) -> None:
    error = await refused(http, CHAT, {"model": "x" * 500, "messages": MESSAGES}, status=404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'org/tiny'" in error["message"] and len(error["message"]) < 200
    response = await http.get("/v1/models/nope")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_unknown_routes_and_methods(http: httpx.AsyncClient) -> None:
    missing = await http.get("/v1/nope")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"
    wrong = await http.get(CHAT)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"] == {
        "message": f"GET {CHAT} is not allowed; use POST.",
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_allowed",
    }


async def test_other_content_types(http: httpx.AsyncClient) -> None:
    data = json.dumps({"messages": MESSAGES}).encode()
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
        response = await http.post(CHAT, content=data, headers={"content-type": content_type})
        assert response.status_code == 400
        assert "Content-Type: application/json" in response.json()["error"]["message"]
    for content_type in ("application/json; charset=utf-8", "application/vnd.x+json"):
        response = await http.post(CHAT, content=data, headers={"content-type": content_type})
        assert response.status_code == 200
    assert (await http.post(CHAT, content=data)).status_code == 200


@pytest.mark.parametrize("announced", [True, False])
async def test_bodies_that_are_too_large(site_with: Any, serving: Any, announced: bool) -> None:
    site = site_with(max_body_bytes=10_000)
    sent = 0

    async def chunks() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield b" " * 1000

    async with serving(site) as server, httpx.AsyncClient(base_url=server.url) as client:
        headers = {"content-type": "application/json"}
        content = b" " * 1_000_000 if announced else chunks()
        response = await client.post(CHAT, content=content, headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert "10000 bytes" in response.json()["error"]["message"]
        assert (await client.get("/readyz")).status_code == 200


async def test_a_body_of_100_mb(server: Any) -> None:
    """Refused by its announcement alone; or, without one, though it goes on."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head.encode())
    async with asyncio.timeout(10):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()

    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 2**20

    async with httpx.AsyncClient(base_url=server.url) as client:
        headers = {"content-type": "application/json"}
        response = await client.post(CHAT, content=chunks(), headers=headers)
        assert response.status_code == 413
        assert (await client.post(CHAT, json={"messages": MESSAGES})).status_code == 200


async def test_a_body_that_comes_too_slowly(server: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("headrace.api.body.BODY_SECONDS", 0.1)
    monkeypatch.setattr("headrace.api.upload.PAUSE_SECONDS", 0.1)
    sent = b'{"messages": '
    for path in (CHAT, "/v1/embeddings", "/v1/messages"):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head.encode() + sent)
        async with asyncio.timeout(10):
            answer = await reader.read()  # to the end: the connection is closed
        assert answer.startswith(b"HTTP/1.1 408 ") and b"within 0.1 s" in answer
        writer.close()


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [%s]}' % b",".join([b"1"] * 1_100_000),
        b'{"prompt": "a", "metadata": [%s]}' % b",".join([b"[]"] * 600_000),
        b'{"prompt": "a", "metadata": [%s]}' % b",".join([b"{}"] * 600_000),
    ],
    ids=["token ids", "arrays", "objects"],
)
async def test_a_body_of_a_million_values_is_not_parsed(
    http: httpx.AsyncClient, body: bytes
) -> None:
    error = await refused(http, COMPLETIONS, body, status=413)
    assert (error["code"], error["param"]) == ("request_too_large", None)
    assert "more than 1048576 values" in error["message"]


async def test_a_long_array_of_token_ids_is_taken_as_it_is(http: httpx.AsyncClient) -> None:
    """A union type would try each of its kinds on each element, 16 s for 30 MB, and copy."""
    for prompt in ([65] * 9, [[65] * 9], ["a"] * 9):
        assert CompletionRequest.model_validate({"prompt": prompt}).prompt is prompt
    error = await refused(http, COMPLETIONS, {"prompt": [65] * 500_000})
    assert error["code"] == "context_length_exceeded"
    error = await refused(http, COMPLETIONS, {"prompt": [[65] * 500_000]})
    assert error["code"] == "context_length_exceeded"


async def test_a_model_without_a_template(site_with: Any, http_to: Any) -> None:
    async with http_to(site_with(template=None)) as http:
        error = await refused(http, CHAT, {"messages": MESSAGES})
        assert error["code"] == "chat_template_missing"
        assert COMPLETIONS in error["message"]
        assert (await http.post(COMPLETIONS, json={"prompt": "a"})).status_code == 200


async def test_rejections_are_counted_by_code(http: httpx.AsyncClient, site: Any) -> None:
    await refused(http, CHAT, {"messages": []})
    await refused(http, COMPLETIONS, {"prompt": "a" * 512})
    for reason in ("invalid_value", "context_length_exceeded"):
        assert site.metric("requests_rejected_total", model_name="org/tiny", reason=reason) == 1, (
            reason
        )
    assert site.metric("requests_accepted_total", model_name="org/tiny") == 0
