"""/v1/files: uploads, lists, contents, deletion, through openai-python and without it."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Keeping

DATA = b'{"custom_id": "a"}\n'


def contents(folder: Path) -> int:
    """Files of content on the disk, whole or not."""
    return len(list((folder / "contents").iterdir()))


async def test_a_file_through_its_life(kept: Keeping, tmp_path: Path) -> None:
    client = kept.openai
    # Quotes and newlines in names are escaped as WHATWG has it.
    file = await client.files.create(file=("börse.jsonl", DATA), purpose="batch")
    assert file.id.startswith("file-")
    assert (file.object, file.bytes, file.purpose) == ("file", len(DATA), "batch")
    assert (file.filename, file.status) == ("börse.jsonl", "processed")
    assert file.expires_at == file.created_at + 30 * 24 * 3600
    assert await client.files.retrieve(file.id) == file
    content = await client.files.content(file.id)
    assert content.content == DATA
    headers = content.response.headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"] == "attachment; filename*=UTF-8''b%C3%B6rse.jsonl"
    deleted = await client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    assert contents(tmp_path / "data") == 0
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            await call(file.id)  # type: ignore[operator]
        assert caught.value.body == {
            "message": f"No such File object: {file.id}",
            "type": "invalid_request_error",
            "param": "file_id",
            "code": "not_found",
        }


async def test_a_file_may_expire(kept: Keeping) -> None:
    file = await kept.openai.files.create(
        file=DATA, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    assert file.filename == "upload"


async def test_lists_are_paged(kept: Keeping) -> None:
    client = kept.openai
    ids = [(await client.files.create(file=DATA, purpose="batch")).id for _ in range(5)]
    assert [file.id async for file in client.files.list()] == ids[::-1]
    assert [file.id async for file in client.files.list(limit=2)] == ids[::-1]
    assert [file.id async for file in client.files.list(order="asc", limit=2)] == ids
    assert [file.id async for file in client.files.list(purpose="batch_output")] == []
    page = (await kept.http.get("/v1/files", params={"limit": 2, "after": ids[4]})).json()
    assert page["first_id"] == ids[3] and page["last_id"] == ids[2] and page["has_more"]
    assert page["object"] == "list"
    empty = (await kept.http.get("/v1/files", params={"purpose": "none"})).json()
    assert (empty["data"], empty["first_id"], empty["has_more"]) == ([], None, False)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "10001"}, "limit"),
        ({"limit": "９"}, "limit"),
        ({"limit": "9" * 5000}, "limit"),
        ({"order": "newest"}, "order"),
        ({"after": "file-none"}, "after"),
    ],
)
async def test_queries_that_are_refused(kept: Keeping, query: dict[str, str], param: str) -> None:
    response = await kept.http.get("/v1/files", params=query)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and param in error["message"]


FILE = ("in.jsonl", DATA)


@pytest.mark.parametrize(
    ("form", "param", "words"),
    [
        ({"data": {"purpose": "batch"}, "files": {"other": FILE}}, "file", "required"),
        ({"files": {"file": FILE}}, "purpose", "required"),
        ({"data": {"purpose": "vision"}, "files": {"file": FILE}}, "purpose", "must be 'batch'"),
        ({"data": {"purpose": "batch"}, "files": {"file": ("a", b"")}}, "file", "empty"),
        ({"json": {"purpose": "batch"}}, None, "multipart/form-data"),
        ({"data": {"purpose": "batch"}}, None, "multipart/form-data"),
        (
            {
                "data": {"purpose": "batch", "expires_after[seconds]": "3600"},
                "files": {"file": FILE},
            },
            "expires_after",
            "anchor",
        ),
        (
            {
                "data": {
                    "purpose": "batch",
                    "expires_after[anchor]": "created_at",
                    "expires_after[seconds]": "60",
                },
                "files": {"file": FILE},
            },
            "expires_after",
            "3600",
        ),
        ({"data": {"purpose": "b" * 5000}, "files": {"file": FILE}}, None, "longer than"),
        ({"files": [("file", FILE), ("file", FILE)]}, None, "more than one file"),
        ({"files": [(f"part{i}", FILE) for i in range(17)]}, None, "more than 16 parts"),
    ],
)
async def test_forms_that_are_refused(
    kept: Keeping, tmp_path: Path, form: dict[str, Any], param: str | None, words: str
) -> None:
    response = await kept.http.post("/v1/files", **form)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"]
    assert contents(tmp_path / "data") == 0
    assert (await kept.http.get("/v1/files")).json()["data"] == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"no boundary at all",
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc',
        b"--b\r\n" + b"X: y\r\n" * 1000,
        b"--b\r\n" + b"X" * 100_000,
        b"--b\r\n\r\n\xff\xfe\r\n--b--\r\n",
    ],
)
async def test_broken_forms(kept: Keeping, tmp_path: Path, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = await kept.http.post("/v1/files", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert contents(tmp_path / "data") == 0


async def chunks_of_a_form(size: int) -> AsyncIterator[bytes]:
    yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
    yield b'Content-Disposition: form-data; name="file"; filename="big"\r\n\r\n'
    chunk = b"0123456\n" * 8192
    for _ in range(size // len(chunk)):
        yield chunk
    yield b"\r\n--b--\r\n"


FORM = {"content-type": "multipart/form-data; boundary=b"}
Keep = Callable[..., AbstractAsyncContextManager["Keeping"]]


async def test_large_files_are_not_held_in_memory(kept: Keeping) -> None:
    # The test's client joins what it sends; the server's own reading is measured.
    size = 32 * 2**20
    tracemalloc.start()
    try:
        async with kept.http.stream(
            "POST", "/v1/files", content=chunks_of_a_form(size), headers=FORM
        ) as response:
            await response.aread()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert response.status_code == 200, response.text
    assert response.json()["bytes"] == size
    assert peak < 8 * 2**20


async def test_files_that_are_too_large(keeping: Keep, tmp_path: Path) -> None:
    async with keeping(tmp_path / "data", max_file_bytes=2**20) as kept:
        # announced, and found out while reading
        big = await kept.http.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": bytes(2**21)}
        )
        unannounced = await kept.http.post(
            "/v1/files", content=chunks_of_a_form(2**21), headers=FORM
        )
        for response in (big, unannounced):
            assert response.status_code == 413
            assert "--max-file-bytes" in response.json()["error"]["message"]
        just = await kept.http.post("/v1/files", content=chunks_of_a_form(2**20), headers=FORM)
        assert just.status_code == 200
        assert contents(tmp_path / "data") == 1


async def test_a_full_store_takes_no_more(keeping: Keep, tmp_path: Path) -> None:
    async with keeping(tmp_path / "data", data_limit=3 * 2**19) as kept:
        form = {"data": {"purpose": "batch"}, "files": {"file": bytes(2**20)}}
        first = await kept.http.post("/v1/files", **form)  # type: ignore[arg-type]
        assert first.status_code == 200
        response = await kept.http.post("/v1/files", **form)  # type: ignore[arg-type]
        assert response.status_code == 413
        assert "--data-limit" in response.json()["error"]["message"]
        await kept.http.delete(f"/v1/files/{first.json()['id']}")
        again = await kept.http.post("/v1/files", **form)  # type: ignore[arg-type]
        assert again.status_code == 200


async def test_an_expired_file_is_not_found(kept: Keeping, monkeypatch: Any) -> None:
    file = await kept.openai.files.create(
        file=DATA, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert (await kept.http.get(f"/v1/files/{file.id}")).status_code == 404


async def test_without_a_folder_nothing_is_kept(http: httpx.AsyncClient) -> None:
    for path in ("/v1/files", "/v1/files/file-1", "/v1/batches", "/v1/batches/batch_1"):
        response = await http.get(path)
        assert response.status_code == 503
        assert "--data-dir" in response.json()["error"]["message"]
