"""/v1/batches over a fake engine: every end a batch can have, and what stops and resumes it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from headrace.api.batch_runner import BatchRunner
from headrace.api.store import Record
from headrace.engine.client import EngineState, EngineStats
from headrace.errors import OverloadedError

if TYPE_CHECKING:
    from tests.api.conftest import Keeping

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Keep = Callable[..., AbstractAsyncContextManager["Keeping"]]


def chat_line(custom_id: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": custom_id}]
    body = {"model": "tiny", "messages": messages, **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": custom_id, **body}
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": body}


# --- the whole way ------------------------------------------------------------------------------


async def test_a_batch_of_chats(kept: Keeping) -> None:
    client = kept.openai
    lines = [chat_line(f"q{i}", max_tokens=5 + i) for i in range(3)]
    batch = await kept.create(*lines, endpoint=CHAT, metadata={"job": "nightly"})
    assert batch.id.startswith("batch_") and batch.object == "batch"
    assert (batch.status, batch.endpoint) == ("validating", CHAT)
    assert batch.metadata == {"job": "nightly"}
    assert batch.expires_at == batch.created_at + 24 * 3600
    assert batch.model == "org/tiny"
    done = await kept.ended(batch.id)
    assert done.status == "completed" and done.error_file_id is None and done.errors is None
    assert done.in_progress_at and done.finalizing_at and done.completed_at
    assert done.request_counts is not None and done.usage is not None
    assert done.request_counts.to_dict() == {"total": 3, "completed": 3, "failed": 0}
    rows = await kept.rows(done.output_file_id)
    assert [row["custom_id"] for row in rows] == ["q0", "q1", "q2"]
    for index, row in enumerate(rows):
        assert row["id"].startswith("batch_req_") and row["error"] is None
        assert row["response"]["status_code"] == 200
        assert row["response"]["request_id"] == f"{batch.id}-{index + 1}"
        body = row["response"]["body"]
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["content"] == "Hello, world!"[: 5 + index]
    usages = [row["response"]["body"]["usage"] for row in rows]
    assert done.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert done.usage.output_tokens == 5 + 6 + 7
    assert done.usage.total_tokens == done.usage.input_tokens + 18
    assert done.usage.input_tokens_details.cached_tokens == 12
    output = await client.files.retrieve(done.output_file_id or "")
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert output.expires_at is None
    assert kept.site.finished("length") == 3
    assert await kept.store.count_parts("batch", batch.id) == {}


async def test_lines_run_at_the_lowest_priority(kept: Keeping) -> None:
    assert (await kept.run(line("a"), line("b", priority=-5))).status == "completed"
    assert [request.priority for request in kept.site.engine.requests] == [2**31 - 1] * 2


async def test_lines_are_no_http_requests(keeping: Keep, tmp_path: Path) -> None:
    async with keeping(tmp_path, api_keys=("secret",), strict_fields=True) as kept:
        kept.http.headers["authorization"] = "Bearer secret"
        kept.openai.api_key = "secret"
        assert (await kept.run(line("a"))).status == "completed"
        text = kept.site.metrics.render().decode()
        assert 'route="/v1/batches"' in text and 'route="/v1/completions"' not in text


async def test_output_files_may_expire(kept: Keeping) -> None:
    done = await kept.run(line("a"), output_expires_after={"anchor": "created_at", "seconds": 7200})
    output = await kept.openai.files.retrieve(done.output_file_id or "")
    assert output.expires_at == output.created_at + 7200


async def test_an_input_outlives_its_batch(kept: Keeping) -> None:
    file = await kept.openai.files.create(
        file=json.dumps(line("a")).encode(),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    batch = await kept.openai.batches.create(
        input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h"
    )
    file = await kept.openai.files.retrieve(file.id)
    assert file.expires_at is not None and batch.expires_at is not None
    assert file.expires_at > batch.expires_at


async def test_lists_are_paged(kept: Keeping) -> None:
    ids = [(await kept.create(line("a"))).id for _ in range(3)]
    assert [batch.id async for batch in kept.openai.batches.list(limit=2)] == ids[::-1]
    response = await kept.http.get("/v1/batches", params={"limit": 101})
    assert response.status_code == 400


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"input_file_id": "file-none"}, 404, "input_file_id"),
        ({"input_file_id": None}, 400, "input_file_id"),
        ({"endpoint": "/v1/images/generations"}, 400, "endpoint"),
        ({"completion_window": "48h"}, 400, "completion_window"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
        ({"metadata": {"a": "x" * 513}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "x", "seconds": 1}}, 400, "output_expires_after"),
    ],
)
async def test_batches_that_are_refused(
    kept: Keeping, change: dict[str, Any], status: int, param: str
) -> None:
    file_id = await kept.upload(line("a"))
    body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    response = await kept.http.post("/v1/batches", json={**body, **change})
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


async def test_a_model_that_is_not_served_is_refused_at_once(kept: Keeping) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await kept.create(line("a", model="gpt-6"))
    assert caught.value.code == "model_not_found"


async def test_an_output_is_no_input(kept: Keeping) -> None:
    done = await kept.run(line("a"))
    with pytest.raises(openai.BadRequestError, match="batch_output"):
        await kept.openai.batches.create(
            input_file_id=done.output_file_id or "",
            endpoint=COMPLETIONS,
            completion_window="24h",
        )


async def test_unknown_fields_are_named(kept: Keeping) -> None:
    file_id = await kept.upload(line("a"))
    body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    answer = (await kept.http.post("/v1/batches", json={**body, "colour": 1})).json()
    assert answer["headrace"] == {"ignored_fields": ["colour"]}


async def test_the_api_document_has_them(kept: Keeping) -> None:
    paths = (await kept.http.get("/openapi.json")).json()["paths"]
    form = paths["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file", "purpose"]
    body = paths["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/BatchRequest"}
    (parameter,) = paths["/v1/batches/{batch_id}/cancel"]["post"]["parameters"]
    assert (parameter["name"], parameter["in"]) == ("batch_id", "path")


# --- ends before all is done --------------------------------------------------------------------


async def working(kept: Keeping, batch_id: str, completed: int) -> None:
    """Wait until so many lines have their answer."""
    async with asyncio.timeout(10):
        while (await kept.store.count_parts("batch", batch_id)).get("output", 0) < completed:
            await asyncio.sleep(0.005)


async def test_cancelling_keeps_what_is_done(kept: Keeping) -> None:
    engine = kept.site.engine
    engine.step_seconds = 0.01
    batch = await kept.create(*(line(f"{i}", ignore_eos=i >= 4, max_tokens=400) for i in range(9)))
    await working(kept, batch.id, 4)
    live = await kept.openai.batches.retrieve(batch.id)
    assert live.status == "in_progress" and live.request_counts is not None
    assert live.request_counts.to_dict() == {"total": 9, "completed": 4, "failed": 0}
    with pytest.raises(openai.BadRequestError) as caught:
        await kept.openai.files.delete(batch.input_file_id)
    assert caught.value.code == "file_in_use"
    assert (await kept.openai.batches.cancel(batch.id)).status == "cancelling"
    await kept.openai.batches.cancel(batch.id)
    done = await kept.ended(batch.id)
    assert done.status == "cancelled" and done.cancelling_at and done.cancelled_at
    rows = await kept.rows(done.output_file_id)
    assert [row["custom_id"] for row in rows] == ["0", "1", "2", "3"]
    assert done.error_file_id is None and done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 9, "completed": 4, "failed": 0}
    await kept.site.settle()
    assert len(engine.aborted) == len(engine.requests) - 4 <= 4, "those that ran at the time"
    with pytest.raises(openai.BadRequestError, match="status 'cancelled'"):
        await kept.openai.batches.cancel(batch.id)
    await kept.openai.files.delete(batch.input_file_id)


async def test_a_waiting_batch_is_cancelled_behind_a_running_one(kept: Keeping) -> None:
    kept.site.engine.hold = True
    running = await kept.create(line("a"))
    async with asyncio.timeout(10):
        while not kept.site.engine.requests:
            await asyncio.sleep(0.005)
    waiting = await kept.create(line("b"))
    await kept.openai.batches.cancel(waiting.id)
    done = await kept.ended(waiting.id)
    assert done.status == "cancelled" and done.output_file_id is None
    kept.site.engine.hold = False
    assert (await kept.ended(running.id)).status == "completed"


async def test_an_absent_batch_is_not_found(kept: Keeping) -> None:
    for call in (kept.openai.batches.retrieve, kept.openai.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="No such Batch object: batch_1"):
            await call("batch_1")


async def test_an_expired_batch_names_what_was_not_answered(kept: Keeping) -> None:
    kept.site.engine.step_seconds = 0.01
    lines = [line(f"{i}", ignore_eos=i >= 2, max_tokens=400) for i in range(4)]
    batch = await kept.create(*lines, "{")
    await working(kept, batch.id, 2)

    def overdue(record: Record) -> Record:
        return replace(record, value={**record.value, "expires_at": int(time.time()) - 1})

    await kept.store.update("batch", batch.id, overdue)
    done = await kept.ended(batch.id)
    assert done.status == "expired" and done.expired_at and done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 5, "completed": 2, "failed": 3}
    assert [row["custom_id"] for row in await kept.rows(done.output_file_id)] == ["0", "1"]
    rows = await kept.rows(done.error_file_id)
    assert [row["custom_id"] for row in rows] == ["2", "3", None]
    assert [row["error"]["code"] for row in rows[:2]] == ["batch_expired"] * 2
    await kept.site.settle()


# --- who runs it, and when ----------------------------------------------------------------------


async def test_a_batch_goes_on_where_it_was_stopped(keeping: Keep, tmp_path: Path) -> None:
    lines = [line(f"{i}", ignore_eos=i >= 3, max_tokens=60) for i in range(6)]
    async with keeping(tmp_path) as kept:
        kept.site.engine.step_seconds = 0.005
        batch = await kept.create(*lines)
        await working(kept, batch.id, 3)
    assert 1 <= len(kept.site.engine.aborted) <= 3
    async with keeping(tmp_path) as kept:
        done = await kept.ended(batch.id)
        assert done.status == "completed"
        # Those that were done are not done again.
        assert len(kept.site.engine.requests) == 3
        rows = await kept.rows(done.output_file_id)
        assert [row["custom_id"] for row in rows] == [str(i) for i in range(6)]


async def test_the_files_are_made_again_after_a_crash_in_between(
    keeping: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with keeping(tmp_path) as kept:
        put = kept.store.put

        async def crash(record: Record) -> None:
            await put(record)
            if record.tag == "batch_output":
                await asyncio.Event().wait()

        monkeypatch.setattr(kept.store, "put", crash)
        batch = await kept.create(line("a"))
        async with asyncio.timeout(10):
            while not (await kept.store.page("file", limit=1, tag="batch_output")).records:
                await asyncio.sleep(0.005)
        assert (await kept.openai.batches.retrieve(batch.id)).status == "finalizing"
    async with keeping(tmp_path) as kept:
        done = await kept.ended(batch.id)
        assert done.status == "completed" and kept.site.engine.requests == []
        assert len(await kept.rows(done.output_file_id)) == 1
        assert len((await kept.store.page("file", limit=9, tag="batch_output")).records) == 1


async def test_one_of_two_runners_has_it(keeping: Keep, tmp_path: Path) -> None:
    async with keeping(tmp_path) as one, keeping(tmp_path) as two:
        batches = [await one.create(*(line(f"{i}") for i in range(10))) for _ in range(3)]
        for batch in batches:
            done = await two.ended(batch.id)
            assert done.status == "completed"
            assert len(await one.rows(done.output_file_id)) == 10
        requests = [*one.site.engine.requests, *two.site.engine.requests]
        assert len(requests) == 30, "no line ran twice"


async def test_the_batch_of_a_dead_process_is_taken_over(keeping: Keep, tmp_path: Path) -> None:
    async with keeping(tmp_path, work=False) as dead:
        batch = await dead.create(line("a"))
        assert await dead.store.lease("batch", batch.id, "dead", 0.5)
        async with keeping(tmp_path) as kept:
            await asyncio.sleep(0.2)
            assert kept.site.engine.requests == [], "the lease still lasts"
            assert (await kept.ended(batch.id)).status == "completed"


async def test_a_batch_waits_for_its_model(kept: Keeping) -> None:
    kept.site.engine.state = EngineState.LOADING
    batch = await kept.create(line("a"))
    await asyncio.sleep(0.15)
    assert (await kept.openai.batches.retrieve(batch.id)).status == "validating"
    kept.site.engine.state = EngineState.READY
    assert (await kept.ended(batch.id)).status == "completed"


async def test_a_full_queue_only_delays_lines(kept: Keeping) -> None:
    kept.site.engine.refuse = OverloadedError("The queue is full.")
    batch = await kept.create(line("a"), line("b"))
    await asyncio.sleep(0.15)
    counts = (await kept.openai.batches.retrieve(batch.id)).request_counts
    assert counts is not None and counts.to_dict() == {"total": 2, "completed": 0, "failed": 0}
    kept.site.engine.refuse = None
    done = await kept.ended(batch.id)
    assert done.request_counts is not None and done.request_counts.completed == 2


@pytest.mark.parametrize(
    ("option", "stats", "most"),
    [
        (None, EngineStats(), 4),
        (2, EngineStats(), 2),
        (None, EngineStats(running=6), 1),
        (None, EngineStats(running=7), 0),
        (None, EngineStats(waiting=1), 0),
    ],
)
async def test_online_requests_come_first(
    keeping: Keep, tmp_path: Path, option: int | None, stats: EngineStats, most: int
) -> None:
    """The fake engine has 8 rows. Its gauges do not count the batch's own lines here."""
    async with keeping(tmp_path, batch_concurrency=option) as kept:
        engine = kept.site.engine
        engine.hold, engine.stats = True, stats
        batch = await kept.create(*(line(f"{i}") for i in range(20)))
        async with asyncio.timeout(10):
            while len(engine.requests) < most or not await in_progress(kept, batch.id):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.15)
        if stats.running < 6:
            assert len(engine.requests) == most
        engine.hold, engine.stats = False, EngineStats()
        assert (await kept.ended(batch.id)).status == "completed"


async def in_progress(kept: Keeping, batch_id: str) -> bool:
    return (await kept.openai.batches.retrieve(batch_id)).status == "in_progress"


async def test_a_bug_fails_the_batch_in_the_end(
    kept: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("headrace.api.batch_job.post", broken)
    done = await kept.run(line("a"))
    assert done.status == "failed"
    assert done.errors is not None and done.errors.data is not None
    assert done.errors.data[0].code == "internal_error"


async def test_a_failing_engine_is_an_error_of_the_line(kept: Keeping) -> None:
    kept.site.engine.fail_after = 2
    done = await kept.run(line("a"))
    assert done.status == "completed"
    (row,) = await kept.rows(done.error_file_id)
    assert row["response"]["status_code"] == 500


async def test_a_stopped_runner_gives_its_lease_back(keeping: Keep, tmp_path: Path) -> None:
    async with keeping(tmp_path, work=False) as kept:
        kept.site.engine.hold = True
        runner = BatchRunner(kept.site.app, kept.site.services, lease_seconds=600)
        runner.start()
        batch = await kept.create(line("a"))
        async with asyncio.timeout(10):
            while not kept.site.engine.requests:
                await asyncio.sleep(0.005)
        assert not await kept.store.lease("batch", batch.id, "other", 1)
        await runner.close()
        assert await kept.store.lease("batch", batch.id, "other", 1)
        await kept.site.settle()


async def test_a_runner_stops_while_its_wait_ends(keeping: Keep, tmp_path: Path) -> None:
    async with keeping(tmp_path, work=False) as kept:
        for _ in range(5):
            runner = BatchRunner(kept.site.app, kept.site.services, poll_seconds=0.01)
            runner.start()
            await asyncio.sleep(0.02)
            time.sleep(0.02)  # so that the time is up in the same turn of the loop
            async with asyncio.timeout(5):
                await runner.close()
