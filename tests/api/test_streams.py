"""How streams end, on real sockets: whole, with an error, or cut; and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import openai
import pytest

from headrace.api.streaming import Outbox, SlowClientError
from headrace.errors import OverloadedError
from headrace.observability.logging import request_id_var

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
BODY = {"model": "tiny", "messages": MESSAGES}


async def raw_stream(url: str, **more: Any) -> tuple[int, list[str]]:
    """Status and events of a chat stream, read to its end."""
    async with httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/chat/completions", json={**BODY, "stream": True, **more})
    return response.status_code, [event for event in response.text.split("\n\n") if event]


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_whole_stream(server: Any) -> None:
    status, events = await raw_stream(server.url)
    assert status == 200
    assert events[-1] == "data: [DONE]"
    assert '"finish_reason":"stop"' in events[-2]
    await server.site.settle()


async def test_choices_begin_in_order(server: Any) -> None:
    """The official client's helper keeps them in a list, and fails where the second comes first."""
    server.site.engine.last_first = True
    async with (
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
        client.chat.completions.stream(model="tiny", messages=MESSAGES, n=3) as stream,
    ):
        chunks = [event.chunk async for event in stream if event.type == "chunk"]
        final = await stream.get_final_completion()
    begins = [c.choices[0].index for c in chunks if c.choices[0].delta.role == "assistant"]
    assert begins == [0, 1, 2]
    assert [choice.message.content for choice in final.choices] == ["Hello, world!"] * 3


@pytest.mark.parametrize("how", ["fail_after", "lose_after"])
async def test_an_error_in_the_middle_is_an_event_and_no_end(server: Any, how: str) -> None:
    setattr(server.site.engine, how, 3)
    status, events = await raw_stream(server.url)
    assert status == 200
    assert len(events) == 4
    assert "[DONE]" not in "".join(events)
    assert not any('"finish_reason":"' in event for event in events)
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert "engine" in error["message"].lower()
    await server.site.settle()


@pytest.mark.parametrize("how", ["fail_after", "lose_after"])
async def test_the_official_client_raises_on_such_an_event(server: Any, how: str) -> None:
    setattr(server.site.engine, how, 3)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="(?i)engine"):
            async for _ in stream:
                pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("how", "status"), [("fail_after", 500), ("lose_after", 503)])
async def test_an_error_before_the_first_token_has_a_status(
    server: Any, stream: bool, how: str, status: int
) -> None:
    setattr(server.site.engine, how, 0)
    got, [body] = await raw_stream(server.url, stream=stream)
    assert got == status
    assert json.loads(body)["error"]["type"] == "server_error"
    await server.site.settle()


async def test_an_error_of_one_choice_ends_all(server: Any) -> None:
    server.site.engine.fail_after = 3
    _, events = await raw_stream(server.url, n=2)
    assert '"error"' in events[-1] and "[DONE]" not in events[-1]
    await server.site.settle()
    assert len(server.site.engine.records) == 2


async def test_overload_is_429_with_retry_after(server: Any) -> None:
    server.site.engine.refuse = OverloadedError("The queue is full.", retry_after=2.4)
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="x", max_retries=0
    ) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.code == "queue_full"


async def test_a_partly_refused_batch_leaves_nothing_behind(server: Any) -> None:
    server.site.engine.hold = True
    async with httpx.AsyncClient(base_url=server.url) as client:
        response = await client.post("/v1/completions", json={"prompt": ["a"] * 65})
    assert response.status_code == 429
    assert len(server.site.engine.aborted) == 64
    await server.site.settle()


@pytest.mark.parametrize("n", [1, 2])
async def test_leaving_a_stream_aborts_it(server: Any, n: int) -> None:
    engine = server.site.engine
    engine.step_seconds = 0.01
    body = {**BODY, "stream": True, "ignore_eos": True, "n": n}
    async with (
        httpx.AsyncClient(base_url=server.url) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        async for _ in response.aiter_raw():
            break
    await until(lambda: len(engine.aborted) == n)
    await server.site.settle()
    assert server.site.finished("abort") == n


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_token_aborts(server: Any, stream: bool) -> None:
    engine = server.site.engine
    engine.hold = True
    async with httpx.AsyncClient(base_url=server.url) as client:
        body = {**BODY, "stream": stream}
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: engine.requests)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: engine.aborted)
    await server.site.settle()


async def test_a_client_that_does_not_read_is_dropped(
    site_with: Any, serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    site = site_with(max_unsent_bytes=50_000)
    site.engine.max_model_len = 100_000
    site.engine.burst = 20
    body = {**BODY, "stream": True, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    data = json.dumps(body).encode()
    async with serving(site) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
        )
        with caplog.at_level(logging.WARNING, "headrace"):
            await until(lambda: site.engine.aborted)
            await site.settle()
        sent = await reader.read()
        writer.close()
    assert b"[DONE]" not in sent
    assert any("does not read" in record.message for record in caplog.records)


async def test_a_bug_is_500_with_the_request_id_and_one_log_record(
    site: Any, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    site.engine.refuse = ZeroDivisionError("a bug")
    with caplog.at_level(logging.ERROR, "headrace"):
        response = await http.post(
            "/v1/chat/completions", json=BODY, headers={"x-request-id": "abc-1"}
        )
    assert response.status_code == 500
    assert "abc-1" in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "internal_error"
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_one_line_per_request_carries_its_id(
    site: Any, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    ids: list[str] = []

    class Ids(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            ids.append(request_id_var.get())
            return True

    caplog.handler.addFilter(Ids())
    with caplog.at_level(logging.INFO, "headrace"):
        await http.post("/v1/chat/completions", json=BODY, headers={"x-request-id": "abc-1"})
        await http.get("/readyz")
    [line] = [record.getMessage() for record in caplog.records if record.name != "httpx"]
    assert line.startswith("POST /v1/chat/completions 200 ")
    assert "Hi" not in line and "abc-1" in ids


async def test_draining_lets_streams_finish(server: Any) -> None:
    engine, services = server.site.engine, server.site.services
    engine.step_seconds = 0.01
    running = asyncio.create_task(raw_stream(server.url))
    await until(lambda: engine.requests)
    services.draining = True
    status, [body] = await raw_stream(server.url)
    assert status == 503
    assert json.loads(body)["error"]["code"] == "unavailable"
    status, events = await running
    assert (status, events[-1]) == (200, "data: [DONE]")


async def test_shutting_down_ends_streams_with_an_error(server: Any) -> None:
    engine = server.site.engine
    engine.step_seconds = 0.01
    running = asyncio.create_task(raw_stream(server.url, ignore_eos=True))
    await until(lambda: engine.live and any(s for s in engine.requests))
    await asyncio.sleep(0.05)
    await engine.close()
    _, events = await running
    assert "shutting down" in events[-1] and '"error"' in events[-1]


async def test_many_streams_with_some_that_leave(server: Any) -> None:
    engine = server.site.engine
    engine.step_seconds = 0.001

    async def leave(client: httpx.AsyncClient) -> None:
        body = {**BODY, "stream": True, "ignore_eos": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for _ in response.aiter_raw():
                return

    async with httpx.AsyncClient(base_url=server.url) as client:
        results = await asyncio.gather(
            *(leave(client) if i % 3 == 0 else raw_stream(server.url) for i in range(24))
        )
    await server.site.settle()
    assert all(result is None or result[1][-1] == "data: [DONE]" for result in results)
    assert len(engine.records) == 24 and len(engine.aborted) == 8


async def test_the_outbox_joins_what_waits_and_has_a_limit() -> None:
    outbox = Outbox(10)
    outbox.put(b"abc")
    outbox.put(b"def")
    assert await outbox.take() == b"abcdef"
    outbox.put(b"0123456789")
    with pytest.raises(SlowClientError, match="more than 10 bytes"):
        outbox.put(b"x")
    assert await outbox.take() == b"0123456789"
    outbox.put(b"a single long event")
    outbox.close()
    assert await outbox.take() == b"a single long event"
    assert await outbox.take() == b""
