"""Many streams at once, and clients that leave or stall: others do not notice, nothing leaks."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server, StartServer

pytestmark = pytest.mark.e2e

NUM_STREAMS = 64


async def read(
    client: openai.AsyncOpenAI, model: str, prompt: str, max_tokens: int, leave_after: int | None
) -> str | None:
    """The whole text of a greedy stream of exactly max_tokens events; None if the reader left."""
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text, reasons = "", []
    async with stream:
        async for chunk in stream:
            text += chunk.choices[0].text
            reasons.append(chunk.choices[0].finish_reason)
            if len(reasons) == leave_after:
                return None
    assert reasons == [None] * (max_tokens - 1) + ["length"]
    return text


async def check_many_streams(
    server: Server, model: str, shortest: int, step: int, unread: int
) -> None:
    """64 streams of different lengths; a third of their readers leave at a random token, with
    `unread` more to come than others have. What is left is what the same prompts give alone."""
    before = server.wait_idle()
    leavers = set(random.sample(range(NUM_STREAMS), NUM_STREAMS // 3))
    prompts = [f"Chapter {index}: " + "and so on, " * (index % 7) for index in range(NUM_STREAMS)]
    lengths = [shortest + step * index for index in range(NUM_STREAMS)]
    async with server.async_client() as client:
        texts = await asyncio.gather(
            *(
                read(client, model, prompts[index], length + unread, random.randint(1, length))
                if index in leavers
                else read(client, model, prompts[index], length, None)
                for index, length in enumerate(lengths)
            )
        )
        assert {index for index, text in enumerate(texts) if text is None} == leavers
        for index in sorted(set(range(NUM_STREAMS)) - leavers)[::15]:
            assert texts[index] == await read(client, model, prompts[index], lengths[index], None)

    after = await asyncio.to_thread(server.wait_idle)
    assert after["headrace_kv_cache_blocks{used}"] == 0
    assert after["headrace_kv_cache_blocks{free}"] == before["headrace_kv_cache_blocks{free}"]
    aborted = "headrace_requests_finished_total{abort}"
    assert 0 < after[aborted] - before[aborted] <= len(leavers)
    error = "headrace_requests_finished_total{error}"
    assert after[error] == before[error]


async def test_64_streams_of_which_a_third_disconnect(tiny_server: Server) -> None:
    await check_many_streams(tiny_server, "tiny", shortest=20, step=4, unread=3000)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_64_streams_of_the_default_model(server: Server) -> None:
    await check_many_streams(server, "SmolLM2-135M-Instruct", shortest=5, step=2, unread=100)


def request_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_blocks(tiny_server: Server, stream: bool) -> None:
    before = tiny_server.wait_idle()
    body = {"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    with tiny_server.connect() as connection:
        connection.sendall(request_bytes(body))
        tiny_server.wait_for(
            lambda: tiny_server.metrics()["headrace_kv_cache_blocks{used}"], "blocks in use"
        )
    after = tiny_server.wait_idle()
    assert after["headrace_kv_cache_blocks{used}"] == 0
    aborted = "headrace_requests_finished_total{abort}"
    assert after[aborted] == before[aborted] + 1
    tokens = "headrace_generation_tokens_total"
    assert after[tokens] - before[tokens] < 4000, "it ran to its end with nobody there"


def test_slow_reader_gets_every_token(tiny_server: Server) -> None:
    """It reads nothing until the engine is done; meanwhile another stream is served."""
    before = tiny_server.wait_idle()
    body = {"prompt": "Hello", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with tiny_server.connect() as connection:
        connection.sendall(request_bytes(body))
        neighbour = tiny_server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 5})
        assert neighbour.json()["choices"][0]["finish_reason"]
        finished = tiny_server.finished(before) + 2
        tiny_server.wait_for(lambda: tiny_server.finished() == finished, "the engine's end")
        received = b""
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            data = connection.recv(1 << 16)
            assert data, "the connection broke"
            received += data
    assert received.count(b'"finish_reason":null') == 499
    assert received.count(b'"finish_reason":"length"') == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_client_that_never_reads_is_dropped(start_server: StartServer, tiny_model: Path) -> None:
    """What waits for it is bounded: its request is aborted and its connection broken, while
    others are served."""
    server = start_server(tiny_model, "--threads", "1", "--kv-cache-memory-bytes", "64MiB")
    body = {"prompt": "Hello", "max_tokens": 4000, "n": 8, "ignore_eos": True, "stream": True}
    body |= {"logprobs": 20}
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with connection:
        connection.connect(server.address)
        connection.sendall(request_bytes(body))
        neighbour = server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 5})
        assert neighbour.json()["choices"][0]["finish_reason"]
        aborted = "headrace_requests_finished_total{abort}"
        server.wait_for(lambda: server.metrics()[aborted] == 8, "the aborts")
        received = b""
        try:
            while data := connection.recv(1 << 20):
                received += data
        except ConnectionResetError:
            pass
    assert b"[DONE]" not in received and b'"finish_reason":"' not in received
    assert not received.endswith(b"0\r\n\r\n"), "a clean end"
    assert "does not read" in server.log.read_text()
    server.stop()
