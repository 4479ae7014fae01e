"""openai-python as its users use it: sync and async, helpers, tools, retries, timeouts, aborts."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import openai
import pytest
from pydantic import BaseModel

if TYPE_CHECKING:
    from tests.clients.conftest import Scripted, Target

pytestmark = pytest.mark.e2e

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
MANY: Any = [{"role": "user", "content": "Count from 1 to 1000, one number a line."}]


def says(text: str) -> Any:
    return [{"role": "user", "content": f"say {text}"}]


def jsonl(text: str) -> list[Any]:
    return [json.loads(line) for line in text.split("\n") if line]


class Weather(BaseModel):
    """The weather of a place."""

    city: str
    days: int


# --- asking -------------------------------------------------------------------------------------


def test_sync_and_async_agree(target: Target) -> None:
    arguments: Any = {"model": target.model, "messages": QUESTION, "temperature": 0}
    sync = target.openai().chat.completions.create(**arguments).choices[0].message.content

    async def ask() -> list[str | None]:
        async with target.async_openai() as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(**arguments) for _ in range(4))
            )
            return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask()) == [sync] * 4
    assert sync and "Paris" in sync


def test_the_streaming_helper_builds_the_same_completion(target: Target) -> None:
    client = target.openai()
    arguments: Any = {"model": target.model, "messages": QUESTION, "temperature": 0}
    whole = client.chat.completions.create(**arguments)
    kinds: set[str] = set()
    deltas: list[str] = []
    with client.chat.completions.stream(
        **arguments, stream_options={"include_usage": True}, logprobs=True
    ) as stream:
        for event in stream:
            kinds.add(event.type)
            if event.type == "content.delta":
                deltas.append(event.delta)
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content == "".join(deltas)
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.usage is not None and whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens
    logprobs = final.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content).startswith("".join(deltas))
    assert all(entry.logprob <= 0 for entry in logprobs.content)


def test_choices_in_the_streaming_helper(target: Target) -> None:
    client = target.openai()
    arguments: Any = {"model": target.model, "messages": QUESTION, "max_tokens": 8}
    arguments |= {"n": 3, "seed": 5, "temperature": 1.0}
    whole = client.chat.completions.create(**arguments)
    with client.chat.completions.stream(**arguments) as stream:
        # Its final completion would be refused as cut short.
        final = stream.until_done().current_completion_snapshot
    texts = [[c.message.content for c in answer.choices] for answer in (whole, final)]
    assert texts[0] == texts[1] and len(texts[0]) == 3
    assert [choice.index for choice in final.choices] == [0, 1, 2]


def test_raw_and_streaming_responses_show_the_headers(target: Target) -> None:
    completions = target.openai().chat.completions
    raw = completions.with_raw_response.create(
        model=target.model, messages=QUESTION, max_tokens=1, extra_headers={"x-request-id": "r-1"}
    )
    assert raw.headers["x-request-id"] == raw.request_id == "r-1"
    assert float(raw.headers["openai-processing-ms"]) > 0
    assert raw.parse().choices[0].finish_reason == "length"
    with completions.with_streaming_response.create(
        model=target.model, messages=QUESTION, max_tokens=2, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)


def test_completions_stream_and_usage(target: Target) -> None:
    arguments: Any = {"model": target.model, "prompt": "1, 2, 3, 4,", "max_tokens": 6}
    client = target.openai()
    whole = client.completions.create(**arguments, temperature=0)
    *chunks, last = client.completions.create(
        **arguments, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 6


def test_models_are_a_page_that_iterates(target: Target) -> None:
    assert target.model in [model.id for model in target.openai().models.list()]


def test_embeddings_are_numbers_whatever_went_over_the_wire(target: Target) -> None:
    """The client asks for base64 unless it is told otherwise."""
    client = target.openai()
    packed = client.embeddings.create(model=target.model, input=["Hi", "Ho"])
    plain = client.embeddings.create(
        model=target.model, input=["Hi", "Ho"], encoding_format="float"
    )
    assert [one.index for one in packed.data] == [0, 1]
    for ours, theirs in zip(packed.data, plain.data, strict=True):
        assert ours.embedding == pytest.approx(theirs.embedding, abs=1e-5)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0


# --- tools --------------------------------------------------------------------------------------


def test_a_call_and_its_result(scripted: Scripted) -> None:
    client = scripted.openai()
    tools: Any = [openai.pydantic_function_tool(Weather, name="weather")]
    tools[0]["function"].pop("strict")
    messages: Any = [{"role": "user", "content": 'call weather {"city": "Zürich", "days": 3}'}]
    answer = client.chat.completions.create(model=scripted.model, messages=messages, tools=tools)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
    (call,) = message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Zürich", "days": 3}
    # The message goes back as it came.
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    again = client.chat.completions.create(model=scripted.model, messages=messages, tools=tools)
    assert again.choices[0].message.content == "The tool said: rain"
    assert again.choices[0].finish_reason == "stop"


def test_streamed_calls_in_the_helper(scripted: Scripted) -> None:
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
        for name in ("f", "g")
    ]
    messages: Any = [{"role": "user", "content": 'call f {"a": [1, "x"]}\ncall g {}'}]
    done: list[tuple[str, str]] = []
    with scripted.openai().chat.completions.stream(
        model=scripted.model, messages=messages, tools=tools
    ) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.done":
                done.append((event.name, event.arguments))
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls or []
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("f", {"a": [1, "x"]}),
        ("g", {}),
    ]
    assert done == [(c.function.name, c.function.arguments) for c in calls]
    assert final.choices[0].finish_reason == "tool_calls"
    assert len({call.id for call in calls}) == 2


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "param"),
    [
        ({"temperature": "hot"}, openai.BadRequestError, "invalid_type", "temperature"),
        ({"temperature": 1e9}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"model": "gpt-17"}, openai.NotFoundError, "model_not_found", "model"),
        (
            {"modalities": ["text", "audio"]},
            openai.BadRequestError,
            "unsupported_parameter",
            "modalities",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_typed(
    target: Target, arguments: Any, kind: Any, code: str, param: str, stream: bool
) -> None:
    body = {"model": target.model, "messages": QUESTION, "stream": stream, **arguments}
    with pytest.raises(kind) as caught:
        target.openai().chat.completions.create(**body)
    error = caught.value
    assert (error.code, error.param) == (code, param)
    assert error.type == "invalid_request_error" and error.request_id


def test_an_unknown_route_is_a_typed_error(target: Target) -> None:
    with pytest.raises(openai.NotFoundError):
        target.openai().post("/nothing-here", cast_to=object, body={})
    with pytest.raises(openai.APIStatusError) as caught:
        target.openai().get("/chat/nothing", cast_to=object)
    assert caught.value.status_code == 404


def test_busy_servers_are_asked_again(scripted: Scripted) -> None:
    busy: Any = [{"role": "user", "content": "busy openai-python-1 say at last"}]
    with pytest.raises(openai.RateLimitError) as caught:
        scripted.openai().chat.completions.create(model=scripted.model, messages=busy)
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.type == "rate_limit_error"

    busy = [{"role": "user", "content": "busy openai-python-2 say at last"}]
    began = time.monotonic()
    raw = scripted.openai(max_retries=1).chat.completions.with_raw_response.create(
        model=scripted.model, messages=busy
    )
    assert raw.parse().choices[0].message.content == "at last" and raw.retries_taken == 1
    # Not an assertion about speed: the header asked the client to wait a second.
    assert time.monotonic() - began >= 1


def test_a_timeout_ends_the_request_on_the_server(scripted: Scripted) -> None:
    scripted.engine.hold = True
    try:
        before = len(scripted.engine.aborted)
        with pytest.raises(openai.APITimeoutError):
            scripted.openai(timeout=0.3).chat.completions.create(
                model=scripted.model, messages=QUESTION
            )
        deadline = time.monotonic() + 20
        while len(scripted.engine.aborted) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(scripted.engine.aborted) == before + 1
    finally:
        scripted.engine.hold = False


def test_leaving_a_stream_ends_the_request_on_the_server(scripted: Scripted) -> None:
    before = len(scripted.engine.aborted)
    scripted.engine.step_seconds = 0.01
    try:
        stream = scripted.openai().chat.completions.create(
            model=scripted.model, messages=says("word " * 200), stream=True
        )
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        stream.close()
        deadline = time.monotonic() + 20
        while len(scripted.engine.aborted) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(scripted.engine.aborted) == before + 1
    finally:
        scripted.engine.step_seconds = 0.0


def test_a_cancelled_task_ends_the_request(target: Target) -> None:
    """On the real server: the fixture checks that it is idle in the end."""

    async def leave() -> None:
        async with target.async_openai() as client:
            task = asyncio.create_task(
                client.chat.completions.create(
                    model=target.model,
                    messages=MANY,
                    max_tokens=1500,
                    extra_body={"ignore_eos": True},
                )
            )
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave())


# --- what is kept -------------------------------------------------------------------------------


def test_files_through_their_life(target: Target) -> None:
    files = target.openai().files
    contents = {f"life-{i}.jsonl": b'{"line": %d}\n' % i for i in range(5)}
    made = [files.create(file=(name, data), purpose="batch").id for name, data in contents.items()]
    assert set(made) <= {file.id for file in files.list(limit=2)}  # turns pages by itself
    found = files.retrieve(made[0])
    assert (found.filename, found.bytes, found.purpose) == ("life-0.jsonl", 12, "batch")
    assert files.wait_for_processing(made[0]).status == "processed"
    assert files.content(made[3]).read() == b'{"line": 3}\n'
    with files.with_streaming_response.content(made[4]) as response:
        assert b"".join(response.iter_bytes(4)) == b'{"line": 4}\n'
    for one in made:
        assert files.delete(one).deleted
    with pytest.raises(openai.NotFoundError):
        files.retrieve(made[0])


def test_a_batch_through_its_life(target: Target) -> None:
    client = target.openai()
    lines: list[dict[str, Any]] = [
        {
            "custom_id": f"line-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": target.model, "messages": QUESTION, "max_tokens": 4 if i else -4},
        }
        for i in range(4)
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"who": "me"},
    )
    assert batch.id in [one.id for one in client.batches.list(limit=1)]
    deadline = time.monotonic() + 100
    while batch.status in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed" and batch.metadata == {"who": "me"}
    counts = batch.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (4, 3, 1)
    assert batch.output_file_id is not None and batch.error_file_id is not None
    rows = jsonl(client.files.content(batch.output_file_id).text)
    assert sorted(row["custom_id"] for row in rows) == ["line-1", "line-2", "line-3"]
    assert all(row["response"]["status_code"] == 200 for row in rows)
    (bad,) = jsonl(client.files.content(batch.error_file_id).text)
    assert bad["custom_id"] == "line-0"
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)
