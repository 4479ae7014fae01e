"""Lines of batches that are wrong, each in its own way, beside good ones that still run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from headrace.api import batch_input, batch_job, inner_request
from headrace.api.model_table import UnservedVersion

if TYPE_CHECKING:
    from tests.api.conftest import Keeping

COMPLETIONS = "/v1/completions"
Keep = Callable[..., AbstractAsyncContextManager["Keeping"]]


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": custom_id, **body}
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": body}


BAD_LINES: list[tuple[Any, str, str | None]] = [
    ("{", "invalid_json_line", None),
    ('{"custom_id": ' * 100_000, "invalid_line", None),
    ('{"extra": ' * 100_000, "invalid_json_line", None),
    (b'{"custom_id": "\xff\xfe"}', "invalid_json_line", None),
    ('{"custom_id": "\\ud800"}', "invalid_json_line", None),
    ("[" * 100_000, "invalid_line", None),
    ({"custom_id": "x"}, "invalid_line", "x"),
    ({**line("x"), "custom_id": 5}, "invalid_line", None),
    ({**line("x"), "custom_id": ""}, "invalid_custom_id", None),
    ({**line("x"), "custom_id": "x" * 513}, "invalid_custom_id", None),
    ({**line("x"), "method": "GET"}, "invalid_method", "x"),
    ({**line("x"), "url": "/v1/embeddings"}, "mismatched_endpoint", "x"),
    ({**line("x"), "body": "text"}, "invalid_line", "x"),
    (line("x", stream=True), "invalid_request", "x"),
    (line("good"), "duplicate_custom_id", "good"),
]


async def test_bad_lines_leave_the_good_ones(kept: Keeping) -> None:
    bad = [line for line, _, _ in BAD_LINES]
    done = await kept.run(line("good"), *bad, "", line("also good"))
    assert done.status == "completed" and done.request_counts is not None
    counts = {"total": len(bad) + 2, "completed": 2, "failed": len(bad)}
    assert done.request_counts.to_dict() == counts
    rows = await kept.rows(done.output_file_id)
    assert [row["custom_id"] for row in rows] == ["good", "also good"]
    rows = await kept.rows(done.error_file_id)
    found = [(row["error"]["code"], row["custom_id"]) for row in rows]
    assert found == [(code, custom_id) for _, code, custom_id in BAD_LINES]
    assert [row["error"]["line"] for row in rows] == list(range(2, len(bad) + 2))
    assert all(row["response"] is None and row["error"]["message"] for row in rows)


async def test_what_an_endpoint_refuses_is_in_the_error_file(kept: Keeping) -> None:
    bad = [
        line("cold", temperature=-1),
        line("other", model="gpt-6"),
        line("deep", metadata=json.loads("[" * 300 + "]" * 300)),
        json.dumps(line("deeper")).replace(
            '"prompt"', '"a": ' + "[" * 900 + "]" * 900 + ', "prompt"'
        ),
        b'{"custom_id": "bytes", "method": "POST", "url": "/v1/completions", '
        b'"body": {"prompt": "\xff"}}',
    ]
    done = await kept.run(line("good"), *bad)
    assert done.request_counts is not None
    rows = {row["custom_id"]: row for row in await kept.rows(done.error_file_id)}
    assert rows["cold"]["error"] is None and rows["cold"]["response"]["status_code"] == 400
    assert rows["cold"]["response"]["body"]["error"]["param"] == "temperature"
    assert rows["other"]["response"]["status_code"] == 404
    assert rows["bytes"]["response"]["body"]["error"]["code"] == "invalid_json"
    for name in ("deep", "deeper"):
        assert rows[name]["response"]["body"]["error"]["code"] == "invalid_json"
    assert done.request_counts.to_dict() == {"total": 6, "completed": 1, "failed": 5}


async def test_a_line_may_be_as_long_as_a_body(keeping: Keep, tmp_path: Path) -> None:
    async with keeping(tmp_path, max_body_bytes=2**20) as kept:
        long = json.dumps(line("long")) + " " * 2**20
        done = await kept.run(line("a"), long, line("b"), line("c", user="u" * 900_000))
        assert done.request_counts is not None
        assert done.request_counts.to_dict() == {"total": 4, "completed": 3, "failed": 1}
        (row,) = await kept.rows(done.error_file_id)
        assert row["error"]["code"] == "line_too_long" and row["error"]["line"] == 2


async def test_line_ends_and_marks_of_other_systems(kept: Keeping) -> None:
    data = "\ufeff" + "\r\n".join(json.dumps(line(name)) for name in ("a", "b")) + "\r\n"
    done = await kept.run(data)
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 2, "completed": 2, "failed": 0}


async def test_a_file_without_a_good_line_fails(kept: Keeping) -> None:
    done = await kept.run(*(["{"] * 60))
    assert done.status == "failed" and done.failed_at and done.output_file_id is None
    assert done.errors is not None and done.errors.data is not None
    assert len(done.errors.data) == 50
    assert (done.errors.data[1].line, done.errors.data[1].code) == (2, "invalid_json_line")


@pytest.mark.parametrize(
    ("lines", "code"), [((" ", ""), "empty_file"), (("a", "b", "c"), "too_many_lines")]
)
async def test_files_that_are_no_batch(
    kept: Keeping, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...], code: str
) -> None:
    monkeypatch.setattr(batch_input, "MAX_LINES", 2)
    rows = [line(name) if name.strip() else name for name in lines]
    done = await kept.run(*rows)
    assert done.status == "failed"
    assert done.errors is not None and done.errors.data is not None
    assert done.errors.data[0].code == code


async def test_a_batch_waits_while_no_version_serves(kept: Keeping) -> None:
    models = kept.site.services.models
    kept.site.engine.hold = True
    batch = await kept.create(*(line(f"line {index}") for index in range(8)))
    async with asyncio.timeout(5):
        while not kept.site.engine.requests:
            await asyncio.sleep(0.005)
    models.replace([], [UnservedVersion(name="org/tiny", version=2, state="loading")])
    kept.site.engine.hold = False
    await asyncio.sleep(0.2)
    begun = len(kept.site.engine.requests)
    assert begun < 8
    models.replace([kept.site.model], [])
    done = await kept.ended(batch.id)
    assert done.status == "completed" and done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 8, "completed": 8, "failed": 0}


async def test_a_line_whose_model_goes_just_before_its_endpoint_is_asked_again(
    kept: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, post = kept.site.services.models, batch_job.post
    statuses = []

    async def while_it_goes(*arguments: Any, **named: Any) -> inner_request.Answer:
        if not statuses:
            models.replace([], [])
        answer = await post(*arguments, **named)
        statuses.append(answer.status)
        asyncio.get_running_loop().call_later(0.05, models.replace, [kept.site.model], [])
        return answer

    monkeypatch.setattr(batch_job, "post", while_it_goes)
    done = await kept.run(line("a"), line("b"))
    assert statuses[0] == 404
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 2, "completed": 2, "failed": 0}
