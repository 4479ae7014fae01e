"""Requests whose answers OpenAI's documentation and types fix: sent here, and compared.

Each line of expectations.jsonl is one request with what OpenAI answers, in the order in which they
are sent to one server:

* `id`; `request`: method, path, and the body: an object as JSON, a string as it is, and
  `{"form", "file"}` as multipart; `server`: which one, if not the chat model's; `headers`;
* `openai`: the answer. `status`; `body`: a model of openai-python, which must hold strictly
  (`list[...]`: each item of `data`); `has`: values by path, where `#` is a length and a string that
  begins with `~` a regular expression; `lacks`: paths that are not there;
  `events`: of a stream, in order, those of one kind in a row as one; by choice where there are
  several (`""`: those of none);
* `differs`: why Headrace answers otherwise, and `headrace`: its answer if that has a `status`, or
  else what replaces values in `has`;
* `keep`: values of the answer that later requests name as `$NAME`;
  `until`: the request is repeated until the answer has these values.

Expectations are written from https://platform.openai.com/docs/api-reference, openai-python's types
and error bodies that users have published, never from what Headrace answers. What OpenAI does not
fix is not in them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import openai.types
import openai.types.chat
import openai.types.responses
import openai.types.shared
import pytest
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from tests.api.conftest import FakeEngine, make_site
from tests.api.pooling_site import pooling_site
from tests.api.responses_checks import events_of, kinds
from tests.clients.conftest import TEMPLATE, ScriptedEngine

from headrace.api.batch_runner import BatchRunner
from headrace.api.store_sqlite import SqliteStore
from headrace.engine.client import Task

EXPECTATIONS: list[dict[str, Any]] = [
    json.loads(line)
    for line in Path(__file__).with_name("expectations.jsonl").read_text().splitlines()
]
PARTS = re.compile(r"[^.]+")
KEY = "sk-right"
PATIENCE = 20.0


# --- sending ------------------------------------------------------------------------------------


def scripted(**options: Any) -> Any:
    site = make_site(template=TEMPLATE, **options)
    engine: FakeEngine = ScriptedEngine(site.engine.tokenizer, max_model_len=2048)
    engine.on_record = site.engine.on_record
    site.engine = site.model.client = engine
    return site


SERVERS: dict[str, Callable[[], Any]] = {
    "chat": scripted,
    "strict": lambda: scripted(strict_fields=True),
    "keyed": lambda: scripted(api_keys=(KEY,)),
    "embed": pooling_site,
    "moderate": lambda: pooling_site(tasks=[Task.CLASSIFY], labels=["hate", "violence"]),
}


async def send_all(folder: Path) -> dict[str, httpx.Response]:
    """The answers by id."""
    answers: dict[str, httpx.Response] = {}
    kept: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        clients: dict[str, httpx.AsyncClient] = {}
        for name, make in SERVERS.items():
            site = make()
            transport = httpx.ASGITransport(site.app, raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url="http://test")
            clients[name] = await stack.enter_async_context(client)
            if name == "chat":
                store = SqliteStore(folder)
                await store.open()
                stack.push_async_callback(store.close)
                site.services.store = store
                runner = BatchRunner(site.app, site.services, poll_seconds=0.05)
                runner.start()
                stack.push_async_callback(runner.close)
        for line in EXPECTATIONS:
            answer = await send(clients[line.get("server", "chat")], line, kept)
            answers[line["id"]] = answer
            for name, path in line.get("keep", {}).items():
                kept[name] = at(answer.json(), path)
    return answers


async def send(
    client: httpx.AsyncClient, line: dict[str, Any], kept: dict[str, str]
) -> httpx.Response:
    written = json.dumps(line["request"])
    for name, value in kept.items():
        written = written.replace(f"${name}", value)
    method, path, *rest = json.loads(written)
    body = rest[0] if rest else None
    options: dict[str, Any] = {"headers": line.get("headers", {})}
    if isinstance(body, str):
        options["content"] = body
        options["headers"] = {"content-type": "application/json", **options["headers"]}
    elif isinstance(body, dict) and "form" in body:
        options["data"] = body["form"]
        # A file part, even if there is none that matters: else it would not be multipart.
        options["files"] = {"file": tuple(body["file"])} if body["file"] else {"other": b""}
    elif body is not None:
        options["json"] = body
    async with asyncio.timeout(PATIENCE):
        while True:
            answer = await client.request(method, path, **options)
            wanted = line.get("until", {})
            if all(at(answer.json(), key) == value for key, value in wanted.items()):
                return answer
            await asyncio.sleep(0.02)


# --- judging ------------------------------------------------------------------------------------


def at(value: Any, path: str) -> Any:
    """What is at `choices.0.text`. Raises KeyError or IndexError."""
    for part in PARTS.findall(path):
        if part == "#":
            value = len(value)
        elif isinstance(value, list):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value[part]
        else:
            raise KeyError(path)
    return value


def is_there(value: Any, path: str) -> bool:
    with suppress(KeyError, IndexError):
        return at(value, path) is not None
    return False


def model_of(name: str) -> Any:
    if name == "InputTokenCountResponse":
        return InputTokenCountResponse
    kits = (openai.types, openai.types.chat, openai.types.responses, openai.types.shared)
    return next(getattr(kit, name) for kit in kits if hasattr(kit, name))


def check_shape(kind: str, raw: bytes | str) -> None:
    """Raises ValidationError unless it is what OpenAI's type says, without any conversion."""
    if kind == "ErrorObject":
        raw = json.dumps(json.loads(raw)["error"])
    if kind == "Completion":
        raw = json.dumps(without_nulls(json.loads(raw)))
    if listed := re.fullmatch(r"list\[(\w+)\]", kind):
        answer = json.loads(raw)
        assert answer["object"] == "list"
        for item in answer["data"]:
            model_of(listed[1]).model_validate_json(json.dumps(item), strict=True)
    elif kind not in ("bytes", "object"):
        model_of(kind).model_validate_json(raw, strict=True)


def without_nulls(completion: dict[str, Any]) -> dict[str, Any]:
    """Without those that the API reference has and openai-python's type lacks: there is no
    finish_reason before the end of a stream, and no log-probability of a prompt's first token."""
    for choice in completion["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        for name, nothing in (("token_logprobs", 0.0), ("top_logprobs", {})):
            first = (choice["logprobs"] or {}).get(name)
            if first and first[0] is None:
                first[0] = nothing
    return completion


def check_values(answer: Any, expected: dict[str, Any]) -> None:
    for path, value in expected.get("has", {}).items():
        found = at(answer, path)
        if isinstance(value, str) and value.startswith("~"):
            assert isinstance(found, str) and re.search(value[1:], found), (path, found)
        else:
            assert type(found) is type(value) and found == value, (path, found)
    for path in expected.get("lacks", ()):
        assert not is_there(answer, path), path


def kinds_of(chunk: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The choice and what happens to it, for each thing that a chunk tells."""
    if not chunk["choices"]:
        yield "", "usage" if chunk["usage"] else "nothing"
    for choice in chunk["choices"]:
        index = str(choice["index"])
        if choice.get("text"):
            yield index, "text"
        delta = choice.get("delta", {})
        if "role" in delta:
            yield index, "role"
        for field in ("content", "refusal"):
            if delta.get(field):
                yield index, field
        calls = [*(delta.get("tool_calls") or ())]
        if delta.get("function_call"):
            calls.append({"function": delta["function_call"]})
        for call in calls:
            if call["function"].get("name"):
                yield index, f"call {call['function']['name']}"
            if call["function"].get("arguments"):
                yield index, "arguments"
        if choice["finish_reason"]:
            yield index, f"finish {choice['finish_reason']}"


def check_events(text: str, kind: str, events: Any) -> Any:
    """The chunks, which must come in the order of `events`."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(re.fullmatch(r"data: [^\n]*", block) for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    told = []
    for one in data[:-1]:
        check_shape(kind, one)
        told += list(kinds_of(json.loads(one)))
    told.append(("", data[-1]))
    chunks = [json.loads(one) for one in data[:-1]]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    order = events if isinstance(events, dict) else {None: events}
    for index, expected in order.items():
        found: list[str] = []
        for of, happens in told:
            if index in (None, of) and not (found and found[-1] == happens):
                found.append(happens)
        assert found == expected
    if isinstance(events, dict):
        assert {of for of, _ in told} == set(events)
    return {"chunks": chunks, "last": chunks[-1], "first": chunks[0]}


def judge(answer: httpx.Response, expected: dict[str, Any]) -> None:
    """Raises unless it is as expected."""
    assert answer.status_code == expected["status"], answer.text
    kind = expected["body"]
    if "events" not in expected:
        check_shape(kind, answer.content)
        if kind == "bytes":
            assert answer.text == expected["has"][""]
        else:
            check_values(answer.json(), expected)
        return
    assert answer.headers["content-type"].startswith("text/event-stream")
    if kind == "ResponseStreamEvent":
        told = events_of(answer.text)
        assert kinds(told) == expected["events"]
        check_values({"first": told[0], "last": told[-1]}, expected)
    else:
        check_values(check_events(answer.text, kind, expected["events"]), expected)


def expected_here(line: dict[str, Any]) -> dict[str, Any]:
    theirs, ours = line["openai"], line.get("headrace", {})
    if "status" in ours:
        return ours
    return {**theirs, "has": {**theirs.get("has", {}), **ours.get("has", {})}}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, httpx.Response]:
    return asyncio.run(send_all(tmp_path_factory.mktemp("differential")))


@pytest.mark.parametrize("line", EXPECTATIONS, ids=[line["id"] for line in EXPECTATIONS])
def test_answers_are_openais(line: dict[str, Any], answers: dict[str, httpx.Response]) -> None:
    answer = answers[line["id"]]
    judge(answer, expected_here(line))
    if "differs" in line:
        # Not a difference any more: then it is to be taken out.
        with pytest.raises((AssertionError, LookupError, ValueError)):
            judge(answer, line["openai"])


def test_there_are_two_hundred_of_all_kinds() -> None:
    assert len({line["id"] for line in EXPECTATIONS}) == len(EXPECTATIONS) >= 200
    assert all(bool(line.get("differs")) == ("headrace" in line) for line in EXPECTATIONS)
    paths = {"/".join(line["request"][1].split("?")[0].split("/")[:3]) for line in EXPECTATIONS}
    wanted = "chat completions responses embeddings moderations files batches models"
    assert paths >= {f"/v1/{name}" for name in wanted.split()}
    good = sum(line["openai"]["status"] == 200 for line in EXPECTATIONS)
    assert 80 <= good <= len(EXPECTATIONS) - 60
