"""The differential test: recorded requests to all of OpenAI's endpoints, and what OpenAI answers.

Status, the shape of the body by openai-python's own types in strict mode, errors by field and code,
and the order of events. See expectations.py for the rows, and for where we knowingly differ.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import TYPE_CHECKING, Any

import httpx
import openai.types
import openai.types.chat
import openai.types.responses
import openai.types.responses.input_token_count_response
import pytest
from pydantic import TypeAdapter
from tests.clients.expectations import FILE, lines

if TYPE_CHECKING:
    from tests.clients.conftest import Target

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PATIENCE = 100
CODES_ARE_TEXT = (str, type(None))


def kind_of(name: str) -> Any:
    if name == "responses.InputTokenCountResponse":
        name = "responses.input_token_count_response.InputTokenCountResponse"
    return reduce(getattr, name.split("."), openai.types)


def strictly(name: str, raw: str) -> None:
    """Raises for whatever is not as OpenAI's types say."""
    if name == "CreateEmbeddingResponse":  # its type is of numbers, whatever came over the wire
        answer = json.loads(raw)
        for one in answer["data"]:
            if isinstance(one["embedding"], str):
                data = base64.b64decode(one["embedding"], validate=True)
                one["embedding"] = struct.unpack(f"<{len(data) // 4}f", data)
        raw = json.dumps(answer)
    TypeAdapter(kind_of(name)).validate_json(raw, strict=True)


def check(response: httpx.Response, expected: dict[str, Any]) -> None:
    assert response.status_code == expected["status"], response.text[:500]
    assert response.headers["x-request-id"]
    if "events" in expected:
        check_events(response, expected["events"])
        return
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    if response.status_code != 200:
        check_error(body, expected.get("error", {}))
    elif "list" in expected:
        assert body["object"] == "list"
        for item in body["data"]:
            strictly(expected["list"], json.dumps(item))
    else:
        strictly(expected["type"], response.text)


def check_error(body: Any, expected: dict[str, Any]) -> None:
    assert set(body) == {"error"}
    found = body["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert isinstance(found["message"], str) and found["message"]
    assert isinstance(found["code"], CODES_ARE_TEXT)
    assert found["type"] == expected["type"]
    if "code" in expected:
        assert found["code"] == expected["code"]
    if "param" in expected:  # or a place inside of that field
        assert re.fullmatch(rf"{re.escape(expected['param'])}([.\[].*)?", found["param"]), found


def check_events(response: httpx.Response, expected: list[str]) -> None:
    """`+`: one or more of that kind; `|`: one of them."""
    assert response.headers["content-type"].startswith("text/event-stream")
    kinds: list[str] = []
    for event in response.text.split("\n\n"):
        if not event or event.startswith(":"):
            continue
        *_, data = event.split("\n")
        text = data.removeprefix("data: ")
        kinds.append("[DONE]" if text == "[DONE]" else kind_of_event(text, expected[0]))
    pattern = "".join(
        f"(?:(?:{re.escape(kind.removesuffix('+'))}) )+"
        if kind.endswith("+")
        else f"(?:{'|'.join(map(re.escape, kind.split('|')))}) "
        for kind in expected
    )
    assert re.fullmatch(pattern, "".join(f"{kind} " for kind in kinds)), kinds


def kind_of_event(text: str, first: str) -> str:
    fields = json.loads(text)
    if "type" in fields:
        strictly("responses.ResponseStreamEvent", text)
        return str(fields["type"])
    name = first.removesuffix("+")
    if name == "Completion":  # whose type has no unfinished choice: the rest of it is checked
        for choice in fields["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
    strictly(name, json.dumps(fields))
    return name if fields["choices"] else "usage"


def test_the_file_is_the_table() -> None:
    remedy = "run: python tests/clients/expectations.py"
    assert FILE.read_text() == "".join(lines()), remedy


def test_answers_are_as_expected(target: Target) -> None:
    rows = [json.loads(line) for line in FILE.read_text().splitlines()]
    assert len(rows) >= 200

    def ask(client: httpx.Client, row: Any) -> str | None:
        body = row["body"]
        sent: Any = {"content": body} if isinstance(body, str) else {"json": body}
        if row["method"] == "GET":
            sent = {}
        else:
            sent["headers"] = {"content-type": "application/json"}
        try:
            response = client.request(row["method"], target.url + row["path"], **sent)
            check(response, row.get("ours", row["openai"]))
        except Exception as problem:
            return f"{json.dumps(row, ensure_ascii=False)[:400]}\n  {str(problem)[:600]}"
        return None

    with httpx.Client(timeout=PATIENCE) as client, ThreadPoolExecutor(4) as pool:
        problems = [found for found in pool.map(lambda row: ask(client, row), rows) if found]
    assert not problems, f"{len(problems)} of {len(rows)}:\n" + "\n".join(problems)
