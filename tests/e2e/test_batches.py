"""Batches on the real server: beside online requests, and through its violent death."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from openai.types import Batch
    from tests.e2e.conftest import Server, StartServer

pytestmark = pytest.mark.e2e

LIGHT = ("--threads", "1", "--kv-cache-memory-bytes", "64MiB")


def create(client: openai.OpenAI, count: int, **body: Any) -> Batch:
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"Number {number}", "temperature": 0, **body},
        }
        for number in range(count)
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )


def completed(client: openai.OpenAI, batch: Batch) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    assert counts is not None
    return counts.completed


def end(server: Server, client: openai.OpenAI, batch: Batch) -> Batch:
    def ended() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in ("completed", "failed", "cancelled", "expired") else None

    return server.wait_for(ended, "the end of the batch", server.log.read_text)


def rows(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(row) for row in client.files.content(file_id).text.splitlines()]


def test_a_batch_beside_online_requests(tiny_server: Server) -> None:
    client = tiny_server.client()
    batch = create(client, 20, max_tokens=20)
    online = client.completions.create(
        model="tiny", prompt="Number 7", max_tokens=20, temperature=0
    )
    done = end(tiny_server, client, batch)
    assert done.status == "completed" and done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 20, "completed": 20, "failed": 0}
    found = rows(client, done.output_file_id)
    assert [row["custom_id"] for row in found] == [f"line-{number}" for number in range(20)]
    assert found[7]["response"]["body"]["choices"][0]["text"] == online.choices[0].text


@pytest.mark.slow
def test_a_killed_server_resumes_its_batch(
    start_server: StartServer, tiny_model: Path, tmp_path: Path
) -> None:
    """kill -9: what was answered is not computed again, and nothing is missing at the end."""
    arguments = (tiny_model, *LIGHT, "--data-dir", tmp_path / "data", "--batch-concurrency", "2")
    server = start_server(*arguments)
    client = server.client()
    batch = create(client, 60, max_tokens=200, ignore_eos=True)
    server.wait_for(lambda: completed(client, batch) >= 5, "the first answers")
    server.process.kill()
    server.process.wait(30)

    with sqlite3.connect(tmp_path / "data" / "store.sqlite3") as store:
        (answered,) = store.execute("SELECT COUNT(*) FROM parts").fetchone()
    store.close()
    assert 5 <= answered < 60

    server = start_server(*arguments)
    client = server.client()
    done = end(server, client, batch)
    assert done.status == "completed" and done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 60, "completed": 60, "failed": 0}
    found = rows(client, done.output_file_id)
    assert [row["custom_id"] for row in found] == [f"line-{number}" for number in range(60)]
    assert server.finished(server.wait_idle()) == 60 - answered


@pytest.mark.slow
def test_a_drained_server_hands_its_batch_on(
    start_server: StartServer, tiny_model: Path, tmp_path: Path
) -> None:
    """SIGTERM does not wait for lines, and the next server need not wait for a lease."""
    arguments = (tiny_model, *LIGHT, "--data-dir", tmp_path / "data", "--batch-concurrency", "2")
    server = start_server(*arguments)
    client = server.client()
    batch = create(client, 30, max_tokens=1500, ignore_eos=True)
    server.wait_for(lambda: completed(client, batch) >= 1, "the first answer")
    server.stop()
    assert "requests did not finish" not in server.log.read_text()

    server = start_server(*arguments)
    client = server.client()
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = end(server, client, batch)
    assert done.status == "cancelled"
    assert 1 <= len(rows(client, done.output_file_id)) < 30
    server.stop()


def test_a_folder_that_cannot_be_used_ends_the_start(tmp_path: Path, run_command: Any) -> None:
    (tmp_path / "file").write_text("")
    result = run_command("serve", "--port", "0", "--data-dir", tmp_path / "file")
    assert result.returncode != 0
    assert "cannot be used" in result.stderr and "--data-dir" in result.stderr
    assert "Traceback" not in result.stderr
