"""Responses that are kept: fetched, listed, continued, deleted, and forgotten in time."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseItemList
from tests.api.responses_checks import RESPONSES, TEMPLATE, TOOLS, events_of, prompt_of, strictly

from headrace.api import responses_store
from headrace.api.store import Record

if TYPE_CHECKING:
    from tests.api.conftest import Keeping


async def create(kept: Keeping, **fields: Any) -> Response:
    return await kept.openai.responses.create(**{"model": "tiny", "input": "Hi", **fields})


async def items_of(kept: Keeping, response_id: str, **query: Any) -> list[Any]:
    raw = await kept.http.get(f"{RESPONSES}/{response_id}/input_items", params=query)
    return list(strictly(ResponseItemList, raw.content).data)


@pytest.fixture
async def talking(tmp_path: Path, keeping: Any) -> Any:
    async with keeping(tmp_path / "data", template=TEMPLATE) as one:
        yield one


async def test_it_is_kept_as_it_was_told(kept: Keeping) -> None:
    whole = (await kept.http.post(RESPONSES, json={"input": "Hi", "metadata": {"a": "b"}})).json()
    assert whole["store"] is True
    fetched = await kept.http.get(f"{RESPONSES}/{whole['id']}")
    assert fetched.json() == whole and strictly(Response, fetched.content).metadata == {"a": "b"}
    streamed = await kept.http.post(RESPONSES, json={"input": "Hi", "stream": True})
    last = events_of(streamed.text)[-1]["response"]
    assert (await kept.http.get(f"{RESPONSES}/{last['id']}")).json() == last


async def test_the_official_client(kept: Keeping) -> None:
    response = await create(kept)
    again = await kept.openai.responses.retrieve(response.id)
    assert again.output_text == response.output_text == "Hello, world!"
    listed = [item async for item in kept.openai.responses.input_items.list(response.id)]
    [message] = listed
    assert message.type == "message" and message.role == "user"
    await kept.openai.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        await kept.openai.responses.retrieve(response.id)


async def test_store_false_keeps_nothing(kept: Keeping) -> None:
    response = await create(kept, store=False)
    with pytest.raises(openai.NotFoundError) as error:
        await kept.openai.responses.retrieve(response.id)
    assert error.value.param == "response_id"
    with pytest.raises(openai.BadRequestError) as refused:
        await create(kept, previous_response_id=response.id)
    assert refused.value.code == "previous_response_not_found"
    assert refused.value.param == "previous_response_id"


async def test_a_conversation_goes_on(talking: Keeping) -> None:
    engine = talking.site.engine
    engine.answer = '<think>Hm.</think>So:<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    first = await create(talking, tools=TOOLS, instructions="Forgotten.")
    [call] = [item for item in first.output if item.type == "function_call"]
    engine.answer = "Fine."
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = await create(talking, input=[result], previous_response_id=first.id)
    third = await create(
        talking, input="And?", previous_response_id=second.id, instructions="Brief."
    )
    assert third.previous_response_id == second.id
    assert prompt_of(talking.site).replace("<|im_start|>", "") == (
        "system\nBrief.<|im_end|>\nuser\nHi<|im_end|>\n"
        'assistant\n<think>Hm.</think>So:<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        "<|im_end|>\ntool\nsunny<|im_end|>\nassistant\nFine.<|im_end|>\nuser\nAnd?<|im_end|>\n"
        "assistant\n"
    )


async def test_both_branches_of_a_conversation(kept: Keeping) -> None:
    first = await create(kept)
    for question in ("A", "B"):
        await create(kept, input=question, previous_response_id=first.id, store=False)
        assert "Hello, world!" in prompt_of(kept.site) and question in prompt_of(kept.site)


async def test_what_was_cut_off_can_be_continued(talking: Keeping) -> None:
    """But for the arguments of a call, which are no JSON."""
    talking.site.engine.answer = 'So:<tool_call>\n{"name": "f", "arguments": {"city": "Paris"}}'
    streamed = await talking.http.post(
        RESPONSES,
        json={"input": "Hi", "tools": TOOLS, "stream": True, "max_output_tokens": 52},
    )
    last = events_of(streamed.text)[-1]["response"]
    assert [item["status"] for item in last["output"]] == ["completed", "incomplete"]
    await create(talking, input="Go on.", previous_response_id=last["id"])
    assert "So:<|im_end|>\n<|im_start|>user\nGo on." in prompt_of(talking.site)


async def test_errors_in_history_are_told_by_its_field(kept: Keeping) -> None:
    first = await create(kept, input="x" * 450)
    with pytest.raises(openai.BadRequestError) as error:
        await create(kept, input="y" * 60, previous_response_id=first.id)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "input")


async def test_items_may_be_referred_to(talking: Keeping) -> None:
    first = await create(talking, input=[{"role": "user", "content": "One"}])
    [question] = await items_of(talking, first.id)
    answer = first.output[0].id
    references: Any = [
        {"type": "item_reference", "id": question.id},
        {"id": answer},
        {"role": "user", "content": "Two"},
    ]
    second = await create(talking, input=references)
    assert prompt_of(talking.site) == (
        "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\nHello, world!<|im_end|>\n"
        "<|im_start|>user\nTwo<|im_end|>\n<|im_start|>assistant\n"
    )
    listed = await items_of(talking, second.id, order="asc")
    assert [item.id for item in listed[:2]] == [question.id, answer]
    third = await create(talking, input=[{"type": "item_reference", "id": listed[2].id}])
    assert third.status == "completed"


@pytest.mark.parametrize("item_id", ["msg_1", f"msg_{'0' * 24}_1", 5, None])
async def test_a_reference_to_nothing(kept: Keeping, item_id: Any) -> None:
    body = {"input": [{"type": "item_reference", "id": item_id}]}
    response = await kept.http.post(RESPONSES, json=body)
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "input[0].id"


async def test_input_items(kept: Keeping) -> None:
    items: Any = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": "b", "id": "mine"},
        {"role": "assistant", "content": "c", "id": "mine"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "d"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "e"}]},
        {"role": "user", "content": "f"},
    ]
    response = await create(kept, input=items)
    listed = await items_of(kept, response.id, order="asc")
    assert [item.type for item in listed] == [item.get("type", "message") for item in items]
    ids = [item.id for item in listed]
    assert ids[1] == "mine" and len(set(ids)) == len(ids)
    assert [item.id for item in await items_of(kept, response.id)] == ids[::-1]
    turned = [
        item.id
        async for item in kept.openai.responses.input_items.list(response.id, limit=3, order="asc")
    ]
    assert turned == ids
    assert await items_of(kept, response.id, order="asc", after=ids[-1]) == []
    for query, param in (
        ({"limit": 0}, "limit"),
        ({"after": "x"}, "after"),
        ({"order": "x"}, "order"),
    ):
        bad = await kept.http.get(f"{RESPONSES}/{response.id}/input_items", params=query)
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")]
)
async def test_what_is_not_there(
    kept: Keeping, site_with: Any, http_to: Any, method: str, path: str
) -> None:
    url = f"{RESPONSES}/resp_none{path}"
    response = await kept.http.request(method, url)
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "response_id"
    async with http_to(site_with()) as storeless:
        response = await storeless.request(method, url)
    assert response.status_code == 404 and "--data-dir" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
async def test_without_a_store(
    http: httpx.AsyncClient, keeping: Any, tmp_path: Path, fields: Any, param: str
) -> None:
    plain = await http.post(RESPONSES, json={"input": "Hi"})
    assert plain.json()["store"] is False
    response = await http.post(RESPONSES, json={"input": "Hi", **fields})
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)
    async with keeping(tmp_path, max_stored_responses=0) as kept:
        response = await kept.http.post(RESPONSES, json={"input": "Hi", **fields})
        assert "--max-stored-responses" in response.json()["error"]["message"]


async def test_the_oldest_are_forgotten(
    tmp_path: Path, keeping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_store, "_PUTS_PER_TRIM", 1)
    async with keeping(tmp_path / "few", max_stored_responses=2) as kept:
        made = [(await create(kept)).id for _ in range(4)]
        assert await there(kept, made) == [False, False, True, True]
    async with keeping(tmp_path / "small", data_limit=20_000) as kept:
        made = [
            (await create(kept, metadata={f"{n}": "x" * 500 for n in range(15)})).id
            for _ in range(4)
        ]
        assert await there(kept, made) != [True] * 4
        assert await kept.store.bytes_used() <= 20_000


async def there(kept: Keeping, ids: list[str]) -> list[bool]:
    found = [await kept.store.get("response", response_id) for response_id in ids]
    return [record is not None for record in found]


async def test_they_expire(kept: Keeping) -> None:
    response = await create(kept)
    record = await kept.store.get("response", response.id)
    assert record is not None and record.expires_at == record.created_at + 30 * 24 * 3600
    await kept.store.put(replace(record, expires_at=int(time.time()) - 1))
    assert (await kept.http.get(f"{RESPONSES}/{response.id}")).status_code == 404


async def test_an_answer_outlives_its_store(kept: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(record: Record) -> None:
        raise OSError("The disk is full.")

    monkeypatch.setattr(kept.store, "put", full)
    response = await create(kept)
    assert response.output_text == "Hello, world!"
    assert json.loads(response.to_json())["store"] is False


async def test_long_conversations_are_bounded(
    kept: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_store, "MAX_TURNS", 2)
    first = await create(kept, input="1", max_output_tokens=1)
    second = await create(kept, input="2", max_output_tokens=1, previous_response_id=first.id)
    third = await create(kept, input="3", max_output_tokens=1, previous_response_id=second.id)
    with pytest.raises(openai.BadRequestError) as error:
        await create(kept, previous_response_id=third.id)
    assert error.value.param == "previous_response_id"


async def test_lines_of_batches(kept: Keeping) -> None:
    def line(number: int, **body: Any) -> dict[str, Any]:
        body = {"input": f"Number {number}", "max_output_tokens": 4, **body}
        return {"custom_id": str(number), "method": "POST", "url": RESPONSES, "body": body}

    batch = await kept.run(
        line(0), line(1, store=True), line(2, background=True), endpoint=RESPONSES
    )
    assert batch.status == "completed" and batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
    rows = sorted(await kept.rows(batch.output_file_id), key=lambda row: row["custom_id"])
    bodies = [row["response"]["body"] for row in rows]
    assert [body["store"] for body in bodies] == [False, True]
    used = sum(body["usage"]["total_tokens"] for body in bodies)
    assert batch.usage is not None and batch.usage.total_tokens == used
    [bad] = await kept.rows(batch.error_file_id)
    assert "background" in json.dumps(bad)
