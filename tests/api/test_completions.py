"""POST /v1/completions: prompts of every kind, echo, and log-probabilities for scoring."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

URL = "/v1/completions"


async def complete(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await http.post(URL, json={"model": "tiny", **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def events(http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    response = await http.post(URL, json={"model": "tiny", "stream": True, **body})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *lines, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_an_answer(http: httpx.AsyncClient, site: Any) -> None:
    answer = await complete(http, prompt="Say ")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "Hello, world!", "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["usage"]["prompt_tokens"] == 4
    assert site.engine.requests[0].sampling.max_tokens == 16


async def test_a_stream(http: httpx.AsyncClient) -> None:
    chunks = await events(http, prompt="Say ", max_tokens=5)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [*"Hello"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [*[None] * 4, "length"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert not any("usage" in chunk for chunk in chunks)


async def test_running_usage(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await events(http, prompt="ab", max_tokens=3, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 5


PROMPTS: list[tuple[Any, list[str]]] = [
    ("ab", ["ab"]),
    ([65, 66], ["bc"]),
    (["ab", "c"], ["ab", "c"]),
    ([[65, 66], [67]], ["bc", "d"]),
]


@pytest.mark.parametrize(("prompt", "echoes"), PROMPTS)
@pytest.mark.parametrize("n", [1, 2])
async def test_prompts_of_every_kind_in_order(
    http: httpx.AsyncClient, site: Any, prompt: Any, echoes: list[str], n: int
) -> None:
    answer = await complete(http, prompt=prompt, n=n, echo=True, max_tokens=2)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(echoes) * n))
    assert [choice["text"] for choice in choices] == [e + "He" for e in echoes for _ in range(n)]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, echoes))
    assert answer["usage"]["completion_tokens"] == 2 * len(echoes) * n
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == sum(map(len, echoes))


async def test_scoring_a_text(http: httpx.AsyncClient) -> None:
    """What evaluation harnesses send: ids, echo, logprobs, one token more."""
    answer = await complete(
        http, prompt=[[65, 66, 67]], echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["b", "c", "d", "H"]
    assert logprobs["token_logprobs"] == [None, -0.66, -0.67, -0.39]
    assert logprobs["top_logprobs"] == [
        None,
        {"b": -0.065, "c": -0.66},
        {"b": -0.065, "d": -0.67},
        {"b": -0.065, "H": -0.39},
    ]
    assert logprobs["text_offset"] == [0, 1, 2, 3]


async def test_scoring_without_a_new_token(http: httpx.AsyncClient) -> None:
    answer = await complete(http, prompt="bcd", echo=True, logprobs=0, max_tokens=0)
    [choice] = answer["choices"]
    assert choice["text"] == "bcd"
    assert choice["logprobs"]["tokens"] == ["b", "c", "d"]
    assert choice["logprobs"]["top_logprobs"][1] == {"c": -0.66}
    assert answer["usage"]["completion_tokens"] == 0


async def test_offsets_count_characters(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.answer = "你a👍"
    answer = await complete(http, prompt="é", logprobs=0, echo=True)
    [choice] = answer["choices"]
    assert choice["text"] == "é你a👍"
    # Two tokens make é, three 你, one a, four the thumb; the last one ends the text.
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4]
    assert choice["logprobs"]["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]


async def test_streamed_log_probabilities_equal_the_answer_s(http: httpx.AsyncClient) -> None:
    arguments: dict[str, Any] = {"prompt": "ab", "echo": True, "logprobs": 2, "max_tokens": 4}
    whole = (await complete(http, **arguments))["choices"][0]["logprobs"]
    parts: dict[str, list[Any]] = {name: [] for name in whole}
    for chunk in await events(http, **arguments):
        for name, values in chunk["choices"][0]["logprobs"].items():
            parts[name] += values
    assert parts == whole


async def test_streamed_token_ids(http: httpx.AsyncClient) -> None:
    chunks = await events(http, prompt="ab", return_token_ids=True, max_tokens=2)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [64, 65]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[39], [68]]


async def test_prompt_log_probabilities(http: httpx.AsyncClient) -> None:
    answer = await complete(http, prompt="ab", prompt_logprobs=0, max_tokens=1)
    [choice] = answer["choices"]
    expected = {"65": {"logprob": -0.65, "rank": None, "decoded_token": "b"}}
    assert choice["prompt_logprobs"] == [None, expected]


async def test_long_prompts_are_tokenized_beside_the_event_loop(
    http: httpx.AsyncClient, site: Any
) -> None:
    site.engine.max_model_len = 40_000
    answer = await complete(http, prompt="ab" * 15_000, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == 30_000


async def test_no_choice_is_refused(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={"prompt": "Hi", "n": 0})
    assert response.status_code == 400 and response.json()["error"]["param"] == "n"
