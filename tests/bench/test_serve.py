"""`headrace bench serve` from options to exit code, over real sockets."""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from headrace.bench.http_client import HttpClient
from headrace.bench.serve import add_arguments, run
from headrace.errors import ConfigError

FakeServer = Any  # the fixture of conftest.py, which tests cannot import

Captured = pytest.CaptureFixture[str]

SMALL = ("--num-prompts", "6", "--input-len", "8", "--output-len", "4")


def bench(url: str, *options: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(["--base-url", url, *SMALL, *options]))


def test_a_clean_run(server: FakeServer, capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ("--ignore-eos", "--goodput", "ttft:5000", "--temperature", "0.5")
    code = bench(server.url, *options, "--save-result", str(path), "--save-detailed")
    out, err = capsys.readouterr()
    assert (code, err) == (0, "Sending 6 requests ...\n")
    assert "Successful requests:                     6" in out
    assert "Total input tokens:                      48" in out
    assert "Total generated tokens:                  24" in out
    result = json.loads(path.read_text())
    assert result["completed"] == 6
    assert result["model_id"] == "fake"
    assert result["server"]["version"] == {"version": "9.9"}
    assert result["server"]["model"]["digest"] == "d1"
    assert result["server"]["counters"]["finished"] == 6  # the warm-up is not counted
    assert 0 < result["server"]["mean_ttft_ms"] <= result["from_send"]["mean_ttft_ms"] + 5
    assert result["disagreements"] == []
    assert result["generated_texts"] == ["xxxx"] * 6
    assert result["seed"] == 0
    assert len(server.bodies) == 7
    body = server.bodies[-1]
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (4, True, 0.5)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert all(1000 <= token < 5000 for token in body["prompt"])


def test_what_was_not_asked_for_is_not_sent(server: FakeServer) -> None:
    assert bench(server.url) == 0
    assert set(server.bodies[0]) == {"model", "prompt", "max_tokens", "stream", "stream_options"}


def test_chat_prompts_are_text_made_by_the_server(server: FakeServer) -> None:
    assert bench(server.url, "--endpoint", "chat") == 0
    body = server.bodies[-1]
    assert len(body["messages"][0]["content"].split()) == 8
    assert body["max_completion_tokens"] == 4


def test_a_file_of_messages(server: FakeServer, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "p.jsonl"
    message = {"messages": [{"role": "user", "content": "one two"}], "output_tokens": 3}
    path.write_text(2 * (json.dumps(message) + "\n"))
    options = ("--dataset", "file", "--dataset-path", str(path))
    assert bench(server.url, *options, "--endpoint", "chat") == 0
    out, err = capsys.readouterr()
    assert "Total generated tokens:                  6 " in out
    assert "holds 2 prompts" in err
    assert bench(server.url, *options) == 2
    assert "add --endpoint chat" in capsys.readouterr().err


def test_requests_are_sent_when_due_never_before(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    load = ("--request-rate", "40", "--burstiness", "inf")
    assert bench(server.url, *load, "--save-result", str(path), "--save-detailed") == 0
    result = json.loads(path.read_text())
    due = [start - result["start_times"][0] for start in result["start_times"]]
    assert due == pytest.approx([n / 40 for n in range(6)], abs=1e-6)
    assert all(lag >= 0 for lag in result["send_lags"])


def test_concurrency_is_bounded_and_a_scheduled_request_that_waits_pays_for_it(
    server: FakeServer, tmp_path: Path
) -> None:
    server.script.token_delay = 0.01
    path = tmp_path / "r.json"
    options = ("--max-concurrency", "2", "--num-warmups", "0", "--save-result", str(path))
    assert bench(server.url, *options, "--request-rate", "1000", "--burstiness", "inf") == 0
    scheduled = json.loads(path.read_text())
    assert server.most_at_once == 2
    # The third pair waits for two others, at least 2 * 4 tokens * 10 ms.
    assert scheduled["send_lag_ms"]["max"] > 60
    assert scheduled["mean_ttft_ms"] > scheduled["from_send"]["mean_ttft_ms"] + 20
    # A closed loop has no schedule to be late for.
    assert bench(server.url, *options) == 0
    closed = json.loads(path.read_text())
    assert closed["send_lag_ms"]["max"] < scheduled["send_lag_ms"]["max"]
    assert server.most_at_once == 2


@pytest.mark.parametrize("prefix", ["headrace_", "vllm:"])
@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"finished": 1}, "finished requests: the client saw 6, the server counted 7"),
        ({"generation": -2}, "generated tokens: the client saw 24, the server counted 22"),
        ({"prompt": 5}, "prompt tokens: the client saw 48, the server counted 53"),
        ({"ttft": 3.0}, "mean TTFT: "),
    ],
)
def test_a_server_that_counts_otherwise_fails_the_run(
    server: FakeServer, capsys: Captured, prefix: str, lie: dict[str, float], message: str
) -> None:
    server.script.lie, server.script.metrics_prefix = lie, prefix
    assert bench(server.url) == 1
    err = capsys.readouterr().err
    assert f"error: client and server disagree: {message}" in err
    assert err.count("disagree") == 1
    assert bench(server.url, "--no-server-check") == 0


def test_an_empty_first_event_cannot_pass_for_a_first_token(
    server: FakeServer, capsys: Captured
) -> None:
    server.script.first_event_early, server.script.token_delay = True, 0.02
    assert bench(server.url) == 1
    assert "its first event came before its first token" in capsys.readouterr().err


def test_tokens_that_are_missing_in_spite_of_ignore_eos(
    server: FakeServer, capsys: Captured
) -> None:
    server.script.fewer_tokens = 1
    assert bench(server.url) == 0
    assert bench(server.url, "--ignore-eos") == 1
    assert "fewer tokens than asked for, in spite of ignore_eos: 6" in capsys.readouterr().err


def test_a_server_without_metrics_is_measured_with_a_note(
    server: FakeServer, capsys: Captured
) -> None:
    server.script.has_metrics = False
    assert bench(server.url) == 0
    assert "the server's side is unchecked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"status": 429}, "HTTP 429: "),
        ({"break_at": 2}, "ConnectionError: the connection broke before the response ended"),
        ({"finish_reason": None}, "the stream ended without a finish_reason"),
        ({"send_done": False}, "the stream ended without [DONE]"),
        ({"error_event": True}, "error event: {'message': 'engine lost'"),
    ],
)
def test_failures_are_counted_and_told(
    server: FakeServer, capsys: Captured, script: dict[str, Any], message: str
) -> None:
    for name, value in script.items():
        setattr(server.script, name, value)
    assert bench(server.url, "--num-warmups", "0") == 1
    out, err = capsys.readouterr()
    assert "Failed requests:                         6" in out
    assert f"error: 6 requests failed; {message}" in err


def test_a_warm_up_that_fails_ends_the_run_at_once(server: FakeServer, capsys: Captured) -> None:
    server.script.status = 500
    assert bench(server.url) == 2
    assert 'The warm-up request failed: HTTP 500: {"error"' in capsys.readouterr().err
    assert len(server.bodies) == 1


def test_no_server(capsys: Captured) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert bench(url) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: No server answers at {url} (")
    assert "headrace serve" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--goodput", "ttft=3"), "--goodput takes KEY:VALUE, got 'ttft=3'."),
        (("--goodput", "itl:3"), "--goodput knows ttft, tpot, e2el, got 'itl'."),
        (("--goodput", "ttft:fast"), "--goodput takes numbers, got 'fast'."),
        (("--percentiles", "50,101"), "--percentiles must lie in 0 to 100, got 50,101."),
        (("--percentile-metrics", "x"), "--percentile-metrics knows ttft, tpot, itl, e2el"),
        (("--num-prompts", "0"), "--num-prompts must be at least 1, got 0."),
        (("--max-concurrency", "0"), "--max-concurrency must be at least 1, got 0."),
        (("--dataset", "file"), "--dataset file and --dataset-path FILE.jsonl need each other."),
        (("--save-detailed",), "--save-detailed needs --save-result FILE.json."),
        (("--save-result", "/no/such/r.json"), "--save-result: there is no folder /no/such."),
        (("--model", "other"), "--model 'other' is not served; there is fake."),
        (("--header", "X"), "--header takes KEY=VALUE, got 'X'."),
    ],
)
def test_options_that_cannot_be_followed(
    server: FakeServer, capsys: Captured, options: tuple[str, ...], message: str
) -> None:
    assert bench(server.url, *options) == 2
    assert message in capsys.readouterr().err


def test_headers_and_key_are_sent(server: FakeServer) -> None:
    assert bench(server.url, "--api-key", "secret", "--header", "X-Tenant=a=b") == 0
    assert all(headers["authorization"] == "Bearer secret" for headers in server.headers)
    assert all(headers["x-tenant"] == "a=b" for headers in server.headers)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://h:no"])
def test_a_base_url_must_be_one(url: str) -> None:
    with pytest.raises(ConfigError, match="^--base-url"):
        HttpClient(url, {})


async def test_an_answer_that_is_not_http_is_an_error() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", {})
    with pytest.raises(ConnectionError, match="not HTTP"):
        await client.get("/")
    server.close()
