"""Whatever is wrong with a request gets the right answer, and everyone else is served on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module", autouse=True)
def good_streams(tiny_server: Server) -> Iterator[None]:
    """One good stream after the other while the bad requests come; all must be the same."""
    stop = threading.Event()
    seen: list[list[str]] = []
    body = {"prompt": "Hello", "max_tokens": 50, "temperature": 0, "ignore_eos": True}

    def read() -> None:
        while not stop.is_set():
            url = tiny_server.url + COMPLETIONS
            with httpx.stream("POST", url, json={**body, "stream": True}, timeout=120) as response:
                lines = [line for line in response.iter_lines() if line]
            texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
            seen.append([*texts, lines[-1]])

    thread = threading.Thread(target=read)
    thread.start()
    tiny_server.wait_for(lambda: seen, "the first good stream")
    yield
    stop.set()
    thread.join(120)
    assert len(seen) > 1
    assert len(seen[0]) == 51 and seen[0][-1] == "data: [DONE]"
    assert all(stream == seen[0] for stream in seen)


def check_refusal(
    response: httpx.Response, status: int, code: str | None, *words: str, param: str | None = None
) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"{'prompt': 'Hi'}", "invalid_json"),
        (b'{"prompt": "Hi"} and more', "invalid_json"),
        (b'{"prompt": "\xff\xfe"}', "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"prompt": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, "invalid_json"),
        (b"[]", "invalid_type"),
        (b"17", "invalid_type"),
        (b"null", "invalid_type"),
    ],
)
def test_malformed_json(tiny_server: Server, path: str, body: bytes, code: str) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(tiny_server.url + path, content=body, headers=headers, timeout=120)
    check_refusal(response, 400, code)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "Hi"}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {}, "messages"),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": [0, 259]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": "ten"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": 1.5}, "max_tokens"),
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": -1}, "max_tokens"),
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": 10**30}, "max_tokens"),
        (COMPLETIONS, {"prompt": "Hi", "n": 10**6}, "n"),
        (COMPLETIONS, {"prompt": "Hi", "n": 2**63}, "n"),
        (COMPLETIONS, {"prompt": ["Hi"] * 200, "n": 2}, "n"),
        (COMPLETIONS, {"prompt": "Hi", "temperature": 1e9}, "temperature"),
        (COMPLETIONS, {"prompt": "Hi", "temperature": True}, "temperature"),
        (COMPLETIONS, {"prompt": "Hi", "top_p": 1.1}, "top_p"),
        (COMPLETIONS, {"prompt": "Hi", "stop": ["a"] * 1000}, "stop"),
        (COMPLETIONS, {"prompt": "Hi", "stop": ""}, "stop"),
        (COMPLETIONS, {"prompt": "Hi", "stop": {"a": 1}}, "stop"),
        (COMPLETIONS, {"prompt": "Hi", "logit_bias": {"999999": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "Hi", "logit_bias": {"hello": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "Hi", "logprobs": 1000}, "logprobs"),
        (COMPLETIONS, {"prompt": "Hi", "seed": 2**70}, "seed"),
        (COMPLETIONS, {"prompt": "Hi", "stream": "yes"}, "stream"),
        (COMPLETIONS, {"prompt": "Hi", "best_of": 3, "stream": True}, "best_of"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [0, 10**6]}, "tokens[1]"),
    ],
)
def test_wrong_fields_are_named(
    tiny_server: Server, path: str, fields: dict[str, Any], param: str
) -> None:
    response = tiny_server.post(path, fields)
    assert response.status_code == 400, response.text
    code = response.json()["error"]["code"]
    assert isinstance(code, str)
    check_refusal(response, 400, code, param.partition("[")[0], param=param)


def test_not_a_number_is_not_json(tiny_server: Server) -> None:
    response = httpx.post(
        tiny_server.url + COMPLETIONS,
        content=b'{"prompt": "Hi", "temperature": NaN}',
        headers={"content-type": "application/json"},
        timeout=120,
    )
    assert response.status_code == 400 and "temperature" in response.text


def test_huge_output_is_refused_or_ends_with_the_context(tiny_server: Server) -> None:
    body = {"prompt": "Hi", "max_tokens": 2**31 - 1}
    check_refusal(tiny_server.post(COMPLETIONS, body), 400, "context_length_exceeded", "4096")


def test_too_many_choices_name_the_limit(tiny_server: Server) -> None:
    check_refusal(
        tiny_server.post(COMPLETIONS, {"prompt": "Hi", "n": 129}), 400, "invalid_value", "128"
    )


def test_oversized_body_is_413(tiny_server: Server) -> None:
    body = b'{"prompt": "' + b"a" * (33 << 20) + b'"}'
    headers = {"content-type": "application/json"}
    response = httpx.post(tiny_server.url + COMPLETIONS, content=body, headers=headers, timeout=120)
    check_refusal(response, 413, "request_too_large", "--max-body-bytes")


def test_endless_chunked_body_is_413(tiny_server: Server) -> None:
    """Nothing announces its size, and it is refused before it ends."""
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    with tiny_server.connect() as connection:
        connection.sendall(head.encode())
        try:
            for _ in range(64):
                connection.sendall(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it answered and closed already
        else:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_body_that_never_comes_hurts_nobody(tiny_server: Server) -> None:
    with tiny_server.connect() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n".encode())
        answer = tiny_server.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 1})
        assert answer.status_code == 200


def test_no_http_at_all(tiny_server: Server) -> None:
    with tiny_server.connect() as connection:
        connection.sendall(bytes(range(256)) * 8)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_wrong_content_type_route_and_method(tiny_server: Server) -> None:
    form = httpx.post(tiny_server.url + COMPLETIONS, data={"prompt": "Hi"}, timeout=120)
    check_refusal(form, 400, "unsupported_content_type", "application/json")
    check_refusal(tiny_server.get("/v1/nothing"), 404, "not_found", "GET /v1/nothing")
    check_refusal(tiny_server.get(COMPLETIONS), 405, "method_not_allowed", "POST")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_unknown_model(tiny_server: Server, path: str) -> None:
    body = {"model": "gpt-17", "messages": MESSAGES, "prompt": "Hi", "tokens": [1]}
    if path == "/tokenize":
        del body["messages"]
    check_refusal(
        tiny_server.post(path, body), 404, "model_not_found", "gpt-17", "tiny", param="model"
    )


def test_chat_without_a_chat_template(tiny_server: Server) -> None:
    response = tiny_server.post(CHAT, {"messages": MESSAGES})
    assert response.status_code == 400, response.text
    assert "/v1/completions" in response.json()["error"]["message"]
