"""Mirrored requests: compared and counted, and clients notice nothing of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.route.scripted import (
    PATIENCE,
    TEXT,
    WHOLE,
    Replica,
    Request,
    ask,
    chunk,
    door_before,
    post,
    reply,
)

from headrace.route import fleet, shadow
from headrace.route.choose import ReplicaLoad
from headrace.route.door import Door
from headrace.route.shadow import read_choices

CHAT = {"model": "llama", "messages": [{"role": "user", "content": "Hello!"}]}
STREAM = {**CHAT, "stream": True}


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "POLL_SECONDS", 0.05)


@contextlib.asynccontextmanager
async def mirrored(own: Replica, copy: Replica, share: float = 1.0) -> AsyncIterator[Any]:
    """A door that mirrors to `copy`, and its port."""
    await own.start()
    await copy.start()
    model = {"replicas": [own.url], "shadow": {"replicas": [copy.url], "share": share}}
    async with door_before(models={"llama": model}) as (door, port):
        async with asyncio.timeout(PATIENCE):
            while len(door.fleet.usable("llama/shadow")) < 1:
                await asyncio.sleep(0.01)
        try:
            yield door, port
        finally:
            own.kill()
            copy.kill()


async def counted(door: Door) -> dict[str, int]:
    """Outcomes, once no mirrored request runs."""
    async with asyncio.timeout(PATIENCE):
        while door.shadows.running:
            await asyncio.sleep(0.005)
    found = {}
    for line in door.metrics.render().decode().splitlines():
        if line.startswith("headrace_door_shadow_requests_total{"):
            found[line.split('outcome="')[1].split('"')[0]] = int(float(line.split()[-1]))
    return found


async def other(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 200, {"choices": [{"message": {"content": TEXT[:30]}}]})


async def refuses(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 500, {"error": {"message": "no"}})


async def ends_otherwise(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
    choice = {"message": {"content": TEXT}, "finish_reason": "length"}
    await reply(writer, 200, {"choices": [choice]})


async def is_slow(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)
    await reply(writer, 200, {"choices": [{"message": {"content": TEXT}}]})


async def is_long(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 200, {"choices": [{"message": {"content": "x" * shadow.MAX_ANSWER}}]})


async def hangs(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
    writer.write(b"transfer-encoding: chunked\r\n\r\n" + chunk(b"data: {}\n\n"))
    await writer.drain()
    await asyncio.sleep(30)


async def dies(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
    raise ConnectionResetError


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_equal_answers(body: dict[str, Any]) -> None:
    own, copy = Replica(piece=100), Replica(piece=7)
    async with mirrored(own, copy) as (door, port):
        got = await ask(port, post(body))
        assert got.body == WHOLE if body is STREAM else got.json["choices"]
        assert await counted(door) == {"equal": 1}
        assert len(own.requests) == len(copy.requests) == 1
        assert copy.requests[0].json == body
        assert not copy.requests[0].header("headrace-journal")
        assert copy.requests[0].header("x-request-id").startswith("shadow-")
        text = door.metrics.render().decode()
        for name in ("seconds", "first_byte", "length"):
            assert f'headrace_door_shadow_{name}_ratio_count{{model_name="llama"}} 1.0' in text
        assert 'length_ratio_bucket{le="0.95",model_name="llama"} 0.0' in text


@pytest.mark.parametrize(
    ("handler", "outcome"),
    [
        (other, "text"),
        (refuses, "status"),
        (ends_otherwise, "finish_reason"),
        (dies, "failed"),
        (is_long, "too_long"),
    ],
)
async def test_differences(handler: Any, outcome: str) -> None:
    own, copy = Replica(), Replica(handler=handler)
    async with mirrored(own, copy) as (door, port):
        got = await ask(port, post(CHAT))
        assert got.status == 200 and got.json["choices"][0]["message"]["content"] == TEXT
        assert await counted(door) == {outcome: 1}


async def test_clients_do_not_wait_and_their_connections_go_on() -> None:
    own, copy = Replica(), Replica(handler=is_slow)
    async with mirrored(own, copy) as (door, port):
        async with asyncio.timeout(0.25):
            for _ in range(3):
                assert (await ask(port, post(CHAT))).status == 200
        assert len(door.shadows.running) == 3
        assert await counted(door) == {"equal": 3}


async def test_a_share_of_nothing() -> None:
    async with mirrored(Replica(), copy := Replica(), share=0.0) as (door, port):
        assert (await ask(port, post(CHAT))).status == 200
        assert not copy.requests and await counted(door) == {}


async def test_only_so_many_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "MAX_RUNNING", 2)
    async with mirrored(Replica(), copy := Replica(handler=is_slow)) as (door, port):
        await asyncio.gather(*(ask(port, post(CHAT)) for _ in range(6)))
        assert await counted(door) == {"equal": 2, "dropped": 4}
        assert len(copy.requests) == 2


@pytest.mark.parametrize("busy", ["llama", "llama/shadow"])
async def test_where_requests_wait_none_is_mirrored(
    busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "POLL_SECONDS", 60.0)
    async with mirrored(Replica(), copy := Replica()) as (door, port):
        for replica in door.fleet.usable(busy):
            replica.view.load = ReplicaLoad(queued=1, queued_tokens=100)
        assert (await ask(port, post(CHAT))).status == 200
        assert not copy.requests and await counted(door) == {"dropped": 1}


async def test_what_could_not_be_answered_is_not_mirrored() -> None:
    async with mirrored(Replica(handler=refuses), copy := Replica()) as (door, port):
        assert (await ask(port, post(CHAT))).status == 500
        assert not copy.requests and await counted(door) == {}


async def test_a_client_that_leaves_ends_both() -> None:
    own, copy = Replica(handler=hangs), Replica(handler=hangs)
    async with mirrored(own, copy) as (door, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(STREAM))
        await reader.readuntil(b"data: {}")
        async with asyncio.timeout(PATIENCE):
            while not copy.requests:
                await asyncio.sleep(0.005)
        writer.close()
        assert await counted(door) == {"left": 1}


async def test_the_shadow_draws_as_the_client_was_drawn_for() -> None:
    async def seeded(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
        sampling = 'headrace-sampling: {"temperature":1.0,"seed":12345,"n":1}\r\n'
        await reply(writer, 200, {"choices": []}, more=sampling)

    async with mirrored(Replica(handler=seeded), copy := Replica(names=("copy",))) as (door, port):
        for seed in ({}, {"seed": None}, {"seed": 7}):
            await ask(port, post({**CHAT, **seed}))
        await counted(door)
        assert [request.json["seed"] for request in copy.requests] == [12345, 12345, 7]
        assert {request.json["model"] for request in copy.requests} == {"copy"}


async def test_what_cannot_be_compared_is_not_mirrored() -> None:
    async with mirrored(Replica(), copy := Replica()) as (door, port):
        await ask(port, post({"model": "llama", "input": "x"}, path="/v1/embeddings"))
        assert not copy.requests and await counted(door) == {}


def test_choices_whole_and_in_events_read_the_same() -> None:
    call = {"function": {"name": "f", "arguments": '{"a":1}'}}
    whole = [
        {
            "index": 0,
            "message": {"reasoning_content": "I", "content": "see", "tool_calls": [call]},
            "finish_reason": "tool_calls",
        },
        {"index": 1, "text": "Yes", "finish_reason": "stop"},
    ]
    deltas: list[dict[str, Any]] = [
        {"index": 0, "delta": {"role": "assistant", "reasoning_content": "I"}},
        {"index": 1, "text": "Y"},
        {"index": 0, "delta": {"content": "see"}},
        {"index": 0, "delta": {"tool_calls": [{"function": {"name": "f", "arguments": ""}}]}},
        {"index": 0, "delta": {"tool_calls": [{"function": {"arguments": '{"a":1}'}}]}},
        {"index": 1, "text": "es", "finish_reason": "stop"},
        {"index": 0, "delta": {}, "finish_reason": "tool_calls"},
    ]
    events = "".join(f"data: {json.dumps({'choices': [delta]})}\n\n" for delta in deltas)
    read = read_choices(json.dumps({"choices": whole}).encode())
    assert read == read_choices(f"{events}data: [DONE]\n\n".encode())
    assert read[0].text == 'Iseef{"a":1}' and read[1].finish_reason == "stop"
    assert read_choices(b"no JSON") == {}
