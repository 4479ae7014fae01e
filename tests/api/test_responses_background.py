"""Responses that are made in the background: polled, streamed again, cancelled, abandoned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai.types.responses import Response
from tests.api.responses_checks import RESPONSES, TEMPLATE, events_of, kinds, strictly

from headrace.api import responses_background
from headrace.errors import EngineError, UnavailableError

if TYPE_CHECKING:
    from tests.api.conftest import Keeping

OPENING = ": goes on\n\n"


@pytest.fixture
async def kept(tmp_path: Path, keeping: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    monkeypatch.setattr(responses_background, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(responses_background, "POLL_SECONDS", 0.01)
    async with keeping(tmp_path / "data", template=TEMPLATE) as one:
        yield one
        await one.site.services.background.close()


async def create(kept: Keeping, **fields: Any) -> dict[str, Any]:
    raw = await kept.http.post(RESPONSES, json={"input": "Hi", "background": True, **fields})
    assert raw.status_code == 200, raw.text
    strictly(Response, raw.content)
    return dict(raw.json())


async def status(kept: Keeping, response_id: str) -> str:
    raw = await kept.http.get(f"{RESPONSES}/{response_id}")
    strictly(Response, raw.content)
    return str(raw.json()["status"])


async def becomes(kept: Keeping, response_id: str, wanted: str) -> dict[str, Any]:
    async with asyncio.timeout(5):
        while await status(kept, response_id) != wanted:
            await asyncio.sleep(0.005)
    return dict((await kept.http.get(f"{RESPONSES}/{response_id}")).json())


async def test_it_is_made_after_the_answer(kept: Keeping) -> None:
    kept.site.engine.hold = True
    queued = await create(kept, metadata={"a": "b"})
    assert (queued["status"], queued["background"], queued["output"]) == ("queued", True, [])
    assert await status(kept, queued["id"]) == "queued"
    kept.site.engine.step_seconds = 0.05
    kept.site.engine.hold = False
    running = await becomes(kept, queued["id"], "in_progress")
    assert running["output"] == []
    ended = await becomes(kept, queued["id"], "completed")
    assert ended["output"][0]["content"][0]["text"] == "Hello, world!"
    assert ended["usage"]["output_tokens"] == 14
    assert ended["metadata"] == {"a": "b"} and ended["created_at"] == queued["created_at"]
    following = await kept.openai.responses.create(
        model="tiny", input="And?", previous_response_id=queued["id"]
    )
    assert following.status == "completed"


async def test_a_running_one_cannot_be_continued(kept: Keeping) -> None:
    kept.site.engine.hold = True
    running = await create(kept)
    body = {"input": "And?", "previous_response_id": running["id"]}
    refused = await kept.http.post(RESPONSES, json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "previous_response_id")
    assert "queued" in error["message"]
    kept.site.engine.hold = False
    await becomes(kept, running["id"], "completed")


async def test_what_is_wrong_is_told_at_once(kept: Keeping) -> None:
    for fields, param in (({"store": False}, "store"), ({"temperature": -1.0}, "temperature")):
        body = {"input": "Hi", "background": True, **fields}
        refused = await kept.http.post(RESPONSES, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert kept.site.engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
async def test_it_can_be_cancelled(kept: Keeping, stream: bool) -> None:
    kept.site.engine.hold = True
    if stream:
        posted = asyncio.create_task(
            kept.http.post(RESPONSES, json={"input": "Hi", "background": True, "stream": True})
        )
        async with asyncio.timeout(5):
            while not kept.site.engine.requests:
                await asyncio.sleep(0.005)
        response_id = kept.site.engine.requests[0].request_id
        await becomes(kept, response_id, "queued")
    else:
        response_id = (await create(kept))["id"]
    cancelled = await kept.openai.responses.cancel(response_id)
    assert cancelled.status == "cancelled"
    await kept.site.settle()
    assert kept.site.engine.aborted == [response_id]
    assert (await kept.openai.responses.cancel(response_id)).status == "cancelled"
    assert await status(kept, response_id) == "cancelled"
    if stream:
        last = events_of((await posted).text)[-1]
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")


async def test_what_cannot_be_cancelled(kept: Keeping) -> None:
    plain = await kept.openai.responses.create(model="tiny", input="Hi")
    done = await create(kept)
    await becomes(kept, done["id"], "completed")
    for response_id in (plain.id, done["id"]):
        with pytest.raises(openai.BadRequestError) as error:
            await kept.openai.responses.cancel(response_id)
        assert error.value.param == "response_id"


async def test_another_process_may_cancel_it(
    kept: Keeping, tmp_path: Path, keeping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_background, "LEASE_SECONDS", 1.0)
    kept.site.engine.hold = True
    made = await create(kept)
    async with keeping(tmp_path / "data") as other:
        assert await status(other, made["id"]) == "queued"
        await other.openai.responses.cancel(made["id"])
    await kept.site.settle()
    assert kept.site.engine.aborted == [made["id"]]


async def test_what_was_cancelled_stays_so(kept: Keeping, tmp_path: Path, keeping: Any) -> None:
    """Whoever makes it has not heard of it when it is done."""
    kept.site.engine.hold = True
    made = await create(kept)
    async with keeping(tmp_path / "data") as other:
        await other.openai.responses.cancel(made["id"])
    kept.site.engine.hold = False
    await kept.site.settle()
    await kept.site.services.background.close()
    assert kept.site.engine.aborted == []
    assert await status(kept, made["id"]) == "cancelled"


async def test_deleting_ends_it(kept: Keeping) -> None:
    kept.site.engine.hold = True
    made = await create(kept)
    gone = await kept.http.delete(f"{RESPONSES}/{made['id']}")
    assert gone.json() == {"id": made["id"], "object": "response", "deleted": True}
    await kept.site.settle()
    assert kept.site.engine.aborted == [made["id"]]
    assert (await kept.http.get(f"{RESPONSES}/{made['id']}")).status_code == 404


@pytest.mark.parametrize("fail", ["fail_after", "lose_after"])
async def test_a_failing_engine(kept: Keeping, fail: str) -> None:
    setattr(kept.site.engine, fail, 3)
    kept.site.engine.step_seconds = 0.01
    failed = await becomes(kept, (await create(kept))["id"], "failed")
    assert failed["error"]["code"] == "server_error" and "engine" in failed["error"]["message"]
    streamed = await kept.http.post(
        RESPONSES, json={"input": "Hi", "background": True, "stream": True}
    )
    last = events_of(streamed.text)[-1]
    assert last["type"] == "response.failed"
    [message] = last["response"]["output"]
    assert message["status"] == "incomplete"


async def test_who_reads_it_finds_it_abandoned(
    kept: Keeping, tmp_path: Path, keeping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that makes it has no time to write a last word."""
    monkeypatch.setattr(responses_background, "LEASE_SECONDS", 0.5)
    kept.site.engine.hold = True
    streamed = asyncio.create_task(
        kept.http.post(RESPONSES, json={"input": "Hi", "background": True, "stream": True})
    )
    async with asyncio.timeout(5):
        while not kept.site.engine.requests:
            await asyncio.sleep(0.005)
    response_id = kept.site.engine.requests[0].request_id
    await becomes(kept, response_id, "queued")
    # Dead, as far as the store can see.
    monkeypatch.setattr(responses_background, "TICK_SECONDS", 3600)
    await asyncio.sleep(0.05)
    async with keeping(tmp_path / "data") as other:
        failed = await becomes(other, response_id, "failed")
        assert "ended" in failed["error"]["message"]
        again = await other.http.get(f"{RESPONSES}/{response_id}", params={"stream": "true"})
        assert kinds(events_of(again.text)) == ["created", "queued", "failed"]
    kept.site.engine.hold = False
    last = events_of((await streamed).text)[-1]
    assert last["type"] == "response.failed"


async def test_the_server_may_end(kept: Keeping) -> None:
    """What is running fails with the engine's client; its last word is still written."""
    kept.site.engine.hold = True
    made = await create(kept)
    await kept.site.engine.close()
    await kept.site.services.background.close()
    failed = await becomes(kept, made["id"], "failed")
    assert "shutting down" in failed["error"]["message"]


# --- streams ------------------------------------------------------------------------------------


async def test_a_stream_of_it(kept: Keeping) -> None:
    streamed = await kept.http.post(
        RESPONSES, json={"input": "Hi", "background": True, "stream": True}
    )
    events = events_of(streamed.text)
    assert kinds(events)[:4] == ["created", "queued", "in_progress", "output_item.added"]
    assert [event["response"]["status"] for event in (events[0], events[2], events[-1])] == [
        "queued",
        "in_progress",
        "completed",
    ]
    url = f"{RESPONSES}/{events[0]['response']['id']}"
    assert (await kept.http.get(url)).json() == events[-1]["response"]
    again = await kept.http.get(url, params={"stream": "true"})
    assert again.text == OPENING + streamed.text
    for after in (0, 7, len(events) - 2):
        rest = await kept.http.get(url, params={"stream": "true", "starting_after": after})
        assert events_of(rest.text) == events[after + 1 :]
    end = await kept.http.get(url, params={"stream": "true", "starting_after": len(events) - 1})
    assert (end.status_code, end.text) == (200, OPENING)


async def test_a_stream_is_resumed_while_it_runs(kept: Keeping, serving: Any) -> None:
    """The first connection breaks; the response does not."""
    kept.site.engine.step_seconds = 0.02
    async with (
        serving(kept.site) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.responses.create(
            model="tiny", input="Hi", background=True, stream=True
        )
        seen = []
        async for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        assert seen[0].type == "response.created"
        last = seen[-1].sequence_number
        resumed = await client.responses.retrieve(
            seen[0].response.id, stream=True, starting_after=last
        )
        rest = [event async for event in resumed]
    assert [event.sequence_number for event in rest] == list(range(last + 1, last + 1 + len(rest)))
    text = "".join(e.delta for e in [*seen, *rest] if e.type == "response.output_text.delta")
    assert text == "Hello, world!" and rest[-1].type == "response.completed"
    assert kept.site.engine.aborted == []


async def test_the_official_client_goes_on(kept: Keeping) -> None:
    stream = await kept.openai.responses.create(
        model="tiny", input="Hi", background=True, stream=True
    )
    events = [event async for event in stream]
    response_id = kept.site.engine.requests[0].request_id
    async with kept.openai.responses.stream(response_id=response_id, starting_after=5) as again:
        rest = [event async for event in again]
        final = await again.get_final_response()
    assert [e.type for e in rest] == [e.type for e in events[6:]]
    assert final.id == response_id and final.output_text == "Hello, world!"


async def test_a_slow_client_gets_all_of_it(kept: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_background, "_PAGE", 5)
    body = {"input": "Hi", "background": True, "stream": True}
    events = events_of((await kept.http.post(RESPONSES, json=body)).text)
    services = kept.site.services
    services.config = replace(services.config, max_unsent_bytes=10)
    url = f"{RESPONSES}/{events[0]['response']['id']}"
    again = await kept.http.get(url, params={"stream": "true"})
    assert events_of(again.text) == events


async def test_what_cannot_be_streamed_again(kept: Keeping) -> None:
    plain = await kept.http.post(RESPONSES, json={"input": "Hi"})
    url = f"{RESPONSES}/{plain.json()['id']}"
    refused = await kept.http.get(url, params={"stream": "true"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")
    streamed = await kept.http.post(
        RESPONSES, json={"input": "Hi", "background": True, "stream": True}
    )
    url = f"{RESPONSES}/{events_of(streamed.text)[0]['response']['id']}"
    for name, value in (("starting_after", "x"), ("include", "everything")):
        refused = await kept.http.get(url, params={"stream": "true", name: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


# --- streams that are not in the background -----------------------------------------------------


@pytest.mark.parametrize("fail", ["fail_after", "lose_after"])
async def test_a_stream_tells_of_a_failure(kept: Keeping, fail: str) -> None:
    setattr(kept.site.engine, fail, 3)
    streamed = await kept.http.post(RESPONSES, json={"input": "Hi", "stream": True})
    events = events_of(streamed.text)
    assert kinds(events)[-1] == "failed"
    failed = events[-1]["response"]
    assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"
    assert (await kept.http.get(f"{RESPONSES}/{failed['id']}")).json() == failed
    whole = await kept.http.post(RESPONSES, json={"input": "Hi"})
    assert whole.status_code == (500 if fail == "fail_after" else 503)


@pytest.mark.parametrize("error", [EngineError("Broken."), UnavailableError("Loading.")])
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"background": True}])
async def test_refusals_of_the_engine(kept: Keeping, error: Any, fields: Any) -> None:
    kept.site.engine.refuse = error
    response = await kept.http.post(RESPONSES, json={"input": "Hi", **fields})
    assert response.status_code in (500, 503)
    assert response.json()["error"]["message"] == error.message


async def test_a_client_that_leaves_ends_its_response(kept: Keeping, serving: Any) -> None:
    kept.site.engine.answer = "x" * 300
    kept.site.engine.step_seconds = 0.01
    async with serving(kept.site) as server:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        stream = await client.responses.create(model="tiny", input="Hi", stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        await kept.site.settle()
    assert len(kept.site.engine.aborted) == 1
