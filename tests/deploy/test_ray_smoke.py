"""One cluster, the official client, and the end of it. The tests run in this order."""

from __future__ import annotations

import re
import signal
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.e2e

MODEL = "SmolLM2-135M-Instruct"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "The capital of France is"


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=12, temperature=0, **fields
    )


def completion(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=6, temperature=0, **fields
    )


def test_chat_answers_alike_streaming_and_not(cluster: Any) -> None:
    answer = chat(cluster.client()).choices[0]
    chunks = [chunk.choices[0] for chunk in chat(cluster.client(), stream=True)]
    assert "Paris" in answer.message.content
    assert "".join(c.delta.content or "" for c in chunks) == answer.message.content
    assert chunks[-1].finish_reason == answer.finish_reason
    assert len([c for c in chunks if c.delta.content]) > 3, "tokens arrive one by one"


def test_completions_answer_alike_streaming_and_not(cluster: Any) -> None:
    answer = completion(cluster.client()).choices[0]
    chunks = [chunk.choices[0] for chunk in completion(cluster.client(), stream=True)]
    assert "Paris" in answer.text
    assert "".join(c.text for c in chunks) == answer.text
    assert chunks[-1].finish_reason == answer.finish_reason


def test_the_other_routes_are_the_standalone_servers(cluster: Any) -> None:
    assert httpx.get(f"{cluster.url}/readyz").json() == {"status": "ready"}
    assert httpx.get(f"{cluster.url}/livez").status_code == 200
    assert [model.id for model in cluster.client().models.list()] == [MODEL]
    metrics = httpx.get(f"{cluster.url}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "headrace_" in metrics.text


def test_errors_are_openais(cluster: Any) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        cluster.client().completions.create(model="other", prompt=PROMPT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        cluster.client().completions.create(model=MODEL, prompt="word " * 2000)
    assert too_long.value.code == "context_length_exceeded"


def test_a_client_that_goes_away_ends_its_request(cluster: Any, wait_until: Any) -> None:
    stream = cluster.client().completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()

    def aborted() -> bool:
        metrics = httpx.get(f"{cluster.url}/metrics").text
        return bool(
            re.search(r'^headrace_requests_finished_total\{.*"abort".*\} 1\.0$', metrics, re.M)
        )

    wait_until(aborted, "the proxies pass the disconnect on")


def test_sigterm_finishes_a_stream_and_leaves_no_process(cluster: Any, assert_gone: Any) -> None:
    processes = cluster.descendants()
    assert len(cluster.engines()) == 1
    stream = cluster.client().completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    first = next(chunks)
    cluster.process.send_signal(signal.SIGTERM)
    rest = list(chunks)
    assert rest[-1].choices[0].finish_reason == "length"
    assert len([first, *rest]) > 30
    assert cluster.process.wait(60) == 0
    assert_gone(processes)
