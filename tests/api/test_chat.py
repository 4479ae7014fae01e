"""POST /v1/chat/completions, with and without streaming, through the official client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(server: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as made:
        yield made


async def test_an_answer(site: Any, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="org/tiny", messages=MESSAGES)
    [choice] = answer.choices
    assert choice.message.content == "Hello, world!"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == "org/tiny"
    assert answer.system_fingerprint == "fp_0123456789abcdef"
    [request] = site.engine.requests
    assert (
        site.engine.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == len("Hello, world!") + 1
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


async def test_a_stream_has_one_event_per_token(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.content for delta in deltas] == [*"Hello, world!", ""]
    assert [delta.role for delta in deltas] == ["assistant", *[None] * 13]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * 13, "stop"]
    assert all(chunk.usage is None and chunk.id == last.id for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None and last.usage.completion_tokens == 14


async def test_the_stream_equals_the_answer(site: Any, client: openai.AsyncOpenAI) -> None:
    site.engine.answer = "Ünïcödé 你好 👩‍👩‍👧 end"
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == answer.choices[0].message.content == site.engine.answer
    assert not any("\ufffd" in part for part in parts)


async def test_a_client_slower_than_the_engine_still_gets_an_event_per_token(
    site: Any, client: openai.AsyncOpenAI
) -> None:
    site.engine.burst = 100
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == [*"Hello, world!", ""]


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_are_n_requests(
    site: Any, client: openai.AsyncOpenAI, stream: bool
) -> None:
    arguments: Any = {"model": "tiny", "messages": MESSAGES, "n": 3, "seed": 2**63 - 2}
    texts = {index: "" for index in range(3)}
    reasons: dict[int, str | None] = {}
    if stream:
        async for chunk in await client.chat.completions.create(**arguments, stream=True):
            [choice] = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    else:
        answer = await client.chat.completions.create(**arguments)
        texts = {choice.index: choice.message.content or "" for choice in answer.choices}
        reasons = {choice.index: choice.finish_reason for choice in answer.choices}
        prompt_tokens = len(site.engine.requests[0].prompt_token_ids)
        assert answer.usage and answer.usage.prompt_tokens == prompt_tokens
        assert answer.usage.completion_tokens == 3 * 14
    assert texts == dict.fromkeys(range(3), "Hello, world!")
    assert reasons == dict.fromkeys(range(3), "stop")
    seeds = [request.sampling.seed for request in site.engine.requests]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert len({request.request_id for request in site.engine.requests}) == 3
    assert all(request.sampling.n == 1 for request in site.engine.requests)


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities(client: openai.AsyncOpenAI, stream: bool) -> None:
    arguments: Any = {
        "model": "tiny",
        "messages": MESSAGES,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 2,
    }
    entries: list[Any] = []
    if stream:
        async for chunk in await client.chat.completions.create(**arguments, stream=True):
            entries += chunk.choices[0].logprobs.content or []
    else:
        answer = await client.chat.completions.create(**arguments)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        entries = logprobs.content or []
    assert [(entry.token, entry.bytes, entry.logprob) for entry in entries] == [
        ("H", [72], -0.39),
        ("e", [101], -0.68),
    ]
    assert [(top.token, top.logprob) for top in entries[0].top_logprobs] == [
        ("b", -0.065),
        ("c", -0.066),
    ]


async def test_parts_of_characters_have_bytes(site: Any, client: openai.AsyncOpenAI) -> None:
    site.engine.answer = "é"
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    raw = [byte for entry in logprobs.content[:2] for byte in entry.bytes or []]
    assert bytes(raw).decode() == "é"
    assert logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "text", "tokens"),
    [
        ({"stop": "o, w"}, "Hell", 8),
        ({"stop": ["nothing", "wor"]}, "Hello, ", 10),
        ({"stop": "o,", "include_stop_str_in_output": True}, "Hello,", 6),
        ({"stop": "l", "min_tokens": 4}, "Hello, wor", 11),
        ({"stop": "world!?"}, "Hello, world!", 14),
    ],
)
async def test_stop_strings(
    site: Any,
    client: openai.AsyncOpenAI,
    stream: bool,
    options: dict[str, Any],
    text: str,
    tokens: int,
) -> None:
    arguments: Any = {"model": "tiny", "messages": MESSAGES, "extra_body": options}
    if stream:
        arguments["stream_options"] = {"include_usage": True}
        chunks = [c async for c in await client.chat.completions.create(**arguments, stream=True)]
        *chunks, last = chunks
        got = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason, usage = chunks[-1].choices[0].finish_reason, last.usage
    else:
        answer = await client.chat.completions.create(**arguments)
        got = answer.choices[0].message.content or ""
        reason, usage = answer.choices[0].finish_reason, answer.usage
    assert (got, reason) == (text, "stop")
    assert usage is not None and usage.completion_tokens == tokens
    await site.settle()
    # However the engine ended it, the request counts as stopped, once.
    assert site.finished("stop") == 1
    assert site.finished("abort") == 0


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"max_tokens": 3}, "Hel", "length"),
        ({"max_completion_tokens": 2, "max_tokens": 5}, "He", "length"),
        ({"max_tokens": 16, "ignore_eos": True, "min_tokens": 16}, "Hello, world!Hel", "length"),
        ({"stop_token_ids": [75]}, "He", "stop"),
        ({"stop_token_ids": [75], "include_stop_str_in_output": True}, "Hel", "stop"),
    ],
)
async def test_ends(
    client: openai.AsyncOpenAI, options: dict[str, Any], text: str, reason: str
) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, extra_body=options
    )
    [choice] = answer.choices
    assert choice.finish_reason == reason
    assert choice.message.content == text


async def test_messages_of_every_role_and_parts(site: Any, http: httpx.AsyncClient) -> None:
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "c", "name": "Ann"},
    ]
    answer = await http.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 200
    prompt = site.engine.requests[0].prompt_token_ids
    text = site.engine.tokenizer.decode(prompt, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def test_a_final_message_is_continued(site: Any, http: httpx.AsyncClient) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "I say "}]
    body = {"messages": messages, "continue_final_message": True}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    prompt = site.engine.requests[0].prompt_token_ids
    assert site.engine.tokenizer.decode(prompt).endswith("assistant\nI say ")


async def test_token_ids_and_prompt_log_probabilities(http: httpx.AsyncClient, site: Any) -> None:
    body = {"messages": MESSAGES, "return_token_ids": True, "prompt_logprobs": 1, "max_tokens": 2}
    answer = (await http.post("/v1/chat/completions", json=body)).json()
    prompt = site.engine.requests[0].prompt_token_ids
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == [39, 68]
    entries = answer["prompt_logprobs"]
    assert len(entries) == len(prompt) and entries[0] is None
    assert entries[1]["65"] == {"logprob": -0.065, "rank": 1, "decoded_token": "b"}
    assert entries[1][str(prompt[1])]["logprob"] == -prompt[1] / 100


async def test_parameters_reach_the_engine(http: httpx.AsyncClient, site: Any) -> None:
    values = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.2,
        "seed": 5,
        "min_tokens": 1,
        "max_tokens": 9,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    body = {
        "messages": MESSAGES,
        **values,
        "logit_bias": {"5": 2},
        "priority": -3,
        "cache_salt": "s",
    }
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    answer = await http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200
    [request] = site.engine.requests
    assert {name: getattr(request.sampling, name) for name in values} == values
    assert request.sampling.logit_bias == {5: 2.0}
    assert (request.priority, request.cache_salt) == (-3, "s")
    assert request.trace_context == headers["traceparent"]


async def test_openai_s_defaults(http: httpx.AsyncClient, site: Any) -> None:
    body = {"messages": MESSAGES, "temperature": None, "stop": None, "n": None}
    await http.post("/v1/chat/completions", json=body)
    [request] = site.engine.requests
    assert request.sampling.temperature == 1.0
    assert request.sampling.max_tokens is None
