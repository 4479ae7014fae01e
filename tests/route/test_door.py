"""The door in front of scripted replicas, over real sockets."""

from __future__ import annotations

import asyncio
import json

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
    get,
    post,
    prefer,
    read_answer,
    reply,
    stream_of,
)

CHAT = {"model": "llama", "messages": [{"role": "user", "content": "Hello!"}]}
STREAM = {**CHAT, "stream": True}


async def test_an_answer_comes_back_as_the_replica_made_it() -> None:
    replica = Replica()
    async with door_before(replica) as (_, port):
        got = await ask(port, post(CHAT, more="x-request-id: mine\r\nauthorization: Bearer k\r\n"))
        assert got.status == 200 and got.json["choices"][0]["message"]["content"] == TEXT
        request = replica.requests[0]
        assert request.body == json.dumps(CHAT).encode()
        assert request.header("x-request-id") == "mine"
        assert request.header("authorization") == "Bearer k"
        assert not request.header("headrace-journal")


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
async def test_a_stream_comes_without_its_journal(piece: int) -> None:
    async with door_before(Replica(piece=piece)) as (_, port):
        got = await ask(port, post(STREAM))
        assert got.body == WHOLE
        assert got.headers["content-type"] == "text/event-stream"
        assert "headrace-journal" not in got.headers


async def test_requests_in_pieces_and_pipelined() -> None:
    replica = Replica()
    async with door_before(replica) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for byte in post(CHAT):
            writer.write(bytes([byte]))
            await writer.drain()
        assert (await read_answer(reader)).status == 200
        writer.write(post(STREAM) + post(CHAT) + get("/v1/models") + post(STREAM))
        bodies = [(await read_answer(reader)).body for _ in range(4)]
        writer.close()
        assert bodies[0] == bodies[3] == WHOLE
        assert json.loads(bodies[2])["data"][0]["id"] == "llama"


def stream_bytes() -> int:

    request = Request(
        b"POST / HTTP/1.1\r\nheadrace-journal: 1\r\n\r\n", json.dumps(STREAM).encode()
    )
    return len(b"".join(stream_of(request)[:4]))


async def test_a_replica_may_die_at_any_byte_of_an_event() -> None:
    """Every byte of the first four events, and then the stream goes on at the other replica."""
    dying, other = Replica(), Replica()
    async with door_before(dying, other) as (door, port):
        prefer(door, dying)
        for it in door.fleet.replicas():  # a poll would find out that it is dead
            assert it.task is not None
            it.task.cancel()
        for position in range(0, stream_bytes(), 3):
            dying.dies_after = position
            await dying.start()
            next(it for it in door.fleet.replicas() if it.url == dying.url).up = True
            dying.requests.clear()
            got = await ask(port, post(STREAM))
            assert got.body == WHOLE, position
            assert dying.requests, "it was asked first"
        assert sum("headrace_resume" in it.json for it in other.requests) > 50


async def test_streams_of_a_replica_without_journal_end_with_an_error_event() -> None:
    async def foreign(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        writer.write(b"transfer-encoding: chunked\r\n\r\n" + chunk(b"data: 1\n\ndata: ha"))
        await writer.drain()
        await asyncio.sleep(0.05)
        replica.kill()

    async with door_before(Replica(foreign), Replica(foreign)) as (_, port):
        got = await ask(port, post(STREAM))
        first, last = got.body.removesuffix(b"\n\n").split(b"\n\n")
        assert first == b"data: 1"
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["type"] == "server_error" and "died" in error["message"]


async def test_requests_that_are_not_streamed_are_sent_again() -> None:
    replicas = Replica(dies_after=0), Replica()
    async with door_before(*replicas) as (door, port):
        prefer(door, replicas[0])
        for _ in range(3):
            assert (await ask(port, post(CHAT))).status == 200
        assert len(replicas[0].requests) == 1 and len(replicas[1].requests) == 3
        assert {it.state for it in door.fleet.replicas()} == {"ready", "down"}


@pytest.mark.parametrize("status", [429, 503])
async def test_a_replica_that_refuses_is_passed_over(status: int) -> None:
    async def refuses(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer, status, {"error": {"code": "queue_full"}}, "retry-after: 7\r\n")

    full = Replica(refuses)
    async with door_before(full, Replica()) as (door, port):
        prefer(door, full)
        for _ in range(3):
            assert (await ask(port, post(CHAT))).status == 200
        assert len(full.requests) == 3
    async with door_before(Replica(refuses), Replica(refuses)) as (_, port):
        got = await ask(port, post(STREAM))
        assert got.status == status and got.headers["retry-after"] == "7"
        assert got.json["error"]["code"] == "queue_full"


async def test_without_a_replica_there_is_a_503_until_one_comes() -> None:
    replica = Replica()
    async with door_before(replica) as (_, port):
        replica.kill()
        got = await ask(port, post(CHAT))
        assert got.status == 503 and got.headers["retry-after"] == "1"
        assert got.json["error"]["code"] == "unavailable"
        assert (await ask(port, get("/readyz"))).status == 503
        assert (await ask(port, get("/v1/models"))).json["data"][0]["state"] == "unavailable"
        await replica.start()
        async with asyncio.timeout(PATIENCE):
            while (await ask(port, post(CHAT))).status != 200:
                await asyncio.sleep(0.05)


async def test_the_rest_of_a_stream_waits_for_a_replica() -> None:
    replica = Replica(dies_after=stream_bytes())
    async with door_before(replica) as (_, port):
        asking = asyncio.create_task(ask(port, post(STREAM)))
        async with asyncio.timeout(PATIENCE):
            while replica._server is not None:
                await asyncio.sleep(0.01)
        replica.dies_after = None
        await replica.start()
        assert (await asking).body == WHOLE


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [("/v1/nothing", 404, "not_found"), ("/", 404, "not_found"), ("/admin", 404, "not_found")],
)
async def test_paths_that_are_not_there(path: str, status: int, code: str) -> None:
    async with door_before(Replica()) as (_, port):
        got = await ask(port, get(path))
        assert got.status == status and got.json["error"]["code"] == code


async def test_unknown_models_are_told_which_there_are() -> None:
    async with door_before(Replica()) as (_, port):
        got = await ask(port, post({**CHAT, "model": "lama"}))
        assert got.status == 404
        error = got.json["error"]
        assert error["code"] == "model_not_found" and error["param"] == "model"
        assert "did you mean 'llama'?" in error["message"]


async def test_aliases_are_told_to_the_replica_by_its_own_name() -> None:
    replica = Replica(names=("llama-3",))
    await replica.start()
    models = {"llama": {"replicas": [replica.url], "aliases": ["gpt"]}}
    async with door_before(models=models) as (_, port):
        for name in ("llama", "gpt"):
            assert (await ask(port, post({**CHAT, "model": name}))).status == 200
        assert [it.json["model"] for it in replica.requests] == ["llama-3"] * 2
        assert replica.requests[0].json["messages"] == CHAT["messages"]
        cards = (await ask(port, get("/v1/models"))).json["data"]
        assert [(card["id"], card["root"]) for card in cards] == [
            ("llama", "llama"),
            ("gpt", "llama"),
        ]
        assert (await ask(port, get("/v1/models/gpt"))).json["replicas"][0]["state"] == "ready"
    replica.kill()


async def test_the_card_is_that_of_what_a_replica_serves_now() -> None:
    replica = Replica(digest=None)
    async with door_before(replica) as (_, port):
        for digest in (None, "first", "second"):
            replica.digest = digest
            async with asyncio.timeout(PATIENCE):
                while (await card(port))["digest"] != digest:
                    await asyncio.sleep(0.05)


async def card(port: int) -> dict[str, object]:
    found: dict[str, object] = (await ask(port, get("/v1/models"))).json["data"][0]
    return found


async def test_a_client_that_leaves_ends_the_work() -> None:
    replica = Replica(piece=20, pause=0.01)
    async with door_before(replica) as (door, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(STREAM))
        await reader.readuntil(b"data: ")
        writer.close()
        async with asyncio.timeout(PATIENCE):
            while not replica.gone:
                await asyncio.sleep(0.01)
        assert door.num_live == 0


async def test_a_slow_client_slows_the_replica() -> None:
    sent = 0

    async def endless(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        writer.write(b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(600):
            writer.write(chunk(b"data: " + b"x" * 65536 + b"\n\n"))
            await writer.drain()
            sent += 1
        writer.write(b"0\r\n\r\n")

    async with door_before(Replica(endless)) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(post(STREAM))
        await reader.readuntil(b"\r\n\r\n")
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.1)
        assert sent < 600, "what nobody reads is not made"
        while await reader.read(1 << 20):
            if sent == 600:
                break
        writer.close()


async def test_bodies_of_any_size_and_form() -> None:
    async def count(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 200, {"id": "file-1", "bytes": len(request.body)})

    replica = Replica(count)
    async with door_before(replica, max_body_bytes="1MiB") as (_, port):
        big = b"x" * (20 << 20)
        head = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data\r\n"
        known = head + b"content-length: %d\r\n\r\n" % len(big) + big
        unknown = head + b"transfer-encoding: chunked\r\n\r\n" + chunk(big) + b"0\r\n\r\n"
        for upload in (known, unknown):
            assert (await ask(port, upload)).json["bytes"] == len(big)
        for long in (
            post({**CHAT, "messages": "x" * (1 << 20)}),
            post(CHAT).split(b"content-length")[0]
            + b"transfer-encoding: chunked\r\n\r\n"
            + chunk(b"x" * (1 << 20) + b"x")
            + b"0\r\n\r\n",
        ):
            got = await ask(port, long)
            assert got.status == 413 and got.json["error"]["code"] == "request_too_large"
            assert got.headers["connection"] == "close"
        expects = post(CHAT, more="expect: 100-continue\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(expects.split(b"\r\n\r\n")[0] + b"\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(expects.split(b"\r\n\r\n", 1)[1])
        assert (await read_answer(reader)).status == 200
        writer.close()


async def test_what_is_not_http_is_told_so() -> None:
    async with door_before(Replica()) as (_, port):
        assert (await ask(port, b"what is this\r\n\r\n")).status == 400
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in range(9):
            writer.write(
                b"GET / HTTP/1.1\r\n" if not number else b"x-long: " + b"x" * 9999 + b"\r\n"
            )
            await asyncio.sleep(0.01)
        assert (await read_answer(reader)).status == 431


async def test_head_and_options_and_http_1_0() -> None:
    async def plain(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
        if request.head.startswith(b"HEAD"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 204 No Content\r\nallow: POST\r\n\r\n")

    async with door_before(Replica(plain)) as (_, port):
        got = await ask(port, get("/v1/files/file-1", method="HEAD"))
        assert got.status == 200 and got.headers["content-length"] == "5"
        got = await ask(port, get("/v1/chat/completions", method="OPTIONS"))
        assert got.status == 204 and got.headers["allow"] == "post"
        assert (await ask(port, get("/v1/models", method="HEAD"))).status == 200
    async with door_before(Replica()) as (_, port):
        got = await ask(port, post(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert got.body == WHOLE and got.headers["connection"] == "close"


async def test_the_door_checks_its_key() -> None:
    async with door_before(Replica(), api_key="secret") as (_, port):
        got = await ask(port, post(CHAT))
        assert got.status == 401 and got.json["error"]["code"] == "invalid_api_key"
        assert (await ask(port, get("/readyz"))).status == 200
        for key in ("authorization: Bearer secret\r\n", "x-api-key: secret\r\n"):
            assert (await ask(port, post(CHAT, more=key))).status == 200


async def test_a_response_is_found_where_it_is_kept() -> None:
    def keeps(name: str):  # type: ignore[no-untyped-def]
        async def handler(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
            if request.head.startswith(b"POST"):
                previous = request.json.get("previous_response_id", name)
                status = 200 if previous == name else 404
                await reply(writer, status, {"id": name, "object": "response"})
            elif request.path == f"/v1/responses/{name}":
                await reply(writer, 200, {"id": name})
            else:
                await reply(writer, 404, {"error": {"code": "not_found"}})

        return handler

    of_other_model = Replica(keeps("resp_q"), names=("qwen",))
    replicas = [Replica(keeps(f"resp_{name}")) for name in "abc"]
    for replica in (of_other_model, *replicas):
        await replica.start()
    models = {
        "llama": {"replicas": [it.url for it in replicas]},
        "qwen": {"replicas": [of_other_model.url]},
    }
    async with door_before(models=models) as (_, port):
        assert (await ask(port, get("/v1/responses/resp_q"))).json["id"] == "resp_q"
        for name in "abc":
            for _ in range(2):
                got = await ask(port, get(f"/v1/responses/resp_{name}"))
                assert got.status == 200 and got.json["id"] == f"resp_{name}"
            follows = {"model": "llama", "input": "x", "previous_response_id": f"resp_{name}"}
            got = await ask(port, post(follows, "/v1/responses"))
            assert got.status == 200 and got.json["id"] == f"resp_{name}"
        assert (await ask(port, get("/v1/responses/resp_d"))).status == 404
    for replica in (of_other_model, *replicas):
        replica.kill()


async def test_draining_finishes_streams() -> None:
    replica = Replica(piece=200, pause=0.01)
    async with door_before(replica) as (door, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        idle, _ = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(STREAM))
        await reader.readuntil(b"\r\n\r\n")
        door.drain()
        assert await idle.read() == b""
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", port)
        assert await door.drained(PATIENCE)
        assert (await reader.read()).endswith(b"0\r\n\r\n")


async def test_metrics_count_what_happened() -> None:
    async with door_before(Replica(), Replica(dies_after=500)) as (_, port):
        for _ in range(6):
            await ask(port, post(STREAM))
        await ask(port, post({**CHAT, "model": "x"}))
        text = (await ask(port, get("/metrics"))).body.decode()
        assert 'headrace_door_requests_total{model_name="llama",status="200"} 6.0' in text
        assert 'headrace_door_requests_total{model_name="",status="404"} 1.0' in text
        assert 'headrace_door_replicas{model_name="llama",state="ready"}' in text
        assert "headrace_door_requests_in_flight" in text
