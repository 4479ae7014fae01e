"""How the server ends, and what it survives: a killed engine, signals, its own violent death."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest

if TYPE_CHECKING:
    from openai.types import Completion
    from tests.e2e.conftest import Server, StartServer

pytestmark = pytest.mark.e2e

TINY = ("--threads", "1", "--kv-cache-memory-bytes", "64MiB")


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class Reader:
    """Reads a stream, in a thread, to whatever end it has."""

    def __init__(self, server: Server, **body: Any) -> None:
        self.error: openai.APIError | httpx.HTTPError | None = None
        self.chunks: list[Completion] = []
        extra = {"ignore_eos": True, **body.pop("extra_body", {})}
        self._stream = server.client().completions.create(
            prompt="Hello", stream=True, extra_body=extra, **body
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        server.wait_for(lambda: len(self.chunks) > 5, "the first tokens")

    def _read(self) -> None:
        try:
            self.chunks.extend(self._stream)
        except (openai.APIError, httpx.HTTPError) as error:
            self.error = error

    def join(self) -> Reader:
        self._thread.join(120)
        assert not self._thread.is_alive(), "the stream has no end"
        return self

    @property
    def text(self) -> str:
        return "".join(chunk.choices[0].text for chunk in self.chunks)

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].choices[0].finish_reason


GREEDY: dict[str, Any] = {"temperature": 0}
SAMPLED: dict[str, Any] = {"temperature": 1, "seed": 7, "presence_penalty": 0.5}
FITTING: dict[str, Any] = {
    "temperature": 1,
    "seed": 3,
    "extra_body": {"guided_regex": "([a-z]{1,9}, ?){700}"},
}
WAYS = (GREEDY, SAMPLED, FITTING)


def check_replay(server: Server, model: str, max_tokens: int) -> None:
    """Streams go on through the death of their engine, with the tokens of undisturbed ones."""
    before = server.wait_idle()
    bodies = [{"model": model, "max_tokens": max_tokens, **how} for how in WAYS]
    undisturbed = [Reader(server, **body).join().text for body in bodies]
    readers = [Reader(server, **body) for body in bodies]
    server.kill_engine()
    arrived_meanwhile = server.post(
        "/v1/completions", {"prompt": "Hi", "max_tokens": 3, "ignore_eos": True}
    )
    assert arrived_meanwhile.json()["usage"]["completion_tokens"] == 3
    for reader, text in zip(readers, undisturbed, strict=True):
        reader.join()
        assert reader.error is None
        assert reader.text == text
        assert reader.finish_reason == "length" and len(reader.chunks) == max_tokens
    after = server.wait_idle()
    restarts = "headrace_engine_restarts_total"
    assert after[restarts] == before[restarts] + 1
    assert after["headrace_kv_cache_blocks{used}"] == 0
    tokens = "headrace_generation_tokens_total"
    assert after[tokens] - before[tokens] == 2 * len(WAYS) * max_tokens + 3


def test_killed_engine_is_replaced_and_streams_go_on(
    start_server: StartServer, tiny_model: Path
) -> None:
    server = start_server(tiny_model, *TINY)
    check_replay(server, "tiny", max_tokens=600)
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_replay_of_the_default_model(start_server: StartServer, dtype: str) -> None:
    light = ("--kv-cache-memory-bytes", "512MiB", "--max-model-len", "2048")
    server = start_server("--threads", "2", *light, "--dtype", dtype)
    check_replay(server, "SmolLM2-135M-Instruct", max_tokens=80)
    server.stop()


@pytest.mark.parametrize("engine", [pytest.param("stopped", marks=pytest.mark.slow), "restarting"])
def test_client_that_leaves_while_the_engine_dies_is_accounted_for(
    start_server: StartServer, tiny_model: Path, engine: str
) -> None:
    """Its abort reaches an engine that will never answer, or one that does not know it."""
    server = start_server(tiny_model, *TINY)
    pid = server.engine_pid
    assert pid is not None
    with server.client().completions.create(
        model="tiny", prompt="Hello", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(stream)
        if engine == "stopped":
            os.kill(pid, signal.SIGSTOP)
        else:
            server.kill_engine()
    gone = "headrace_http_requests_total"
    server.wait_for(lambda: server.metrics().get(f"{gone}{{499}}"), "the disconnection")
    if engine == "stopped":
        server.kill_engine()
    server.wait_ready()
    metrics = server.wait_idle()
    assert metrics["headrace_requests_finished_total{abort}"] == 1
    assert metrics["headrace_kv_cache_blocks{used}"] == 0
    server.stop()


def events(lines: Iterator[str]) -> list[str]:
    return [line.removeprefix("data: ") for line in lines if line]


def test_engine_that_keeps_dying_ends_streams_with_an_error_and_the_server(
    start_server: StartServer, tiny_model: Path
) -> None:
    server = start_server(tiny_model, *TINY)
    body = {"model": "tiny", "max_tokens": 4000, "temperature": 0}
    reader = Reader(server, **body)
    raw_body = {"prompt": "Hello", "stream": True, "ignore_eos": True, **body}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=raw_body, timeout=120) as response:
        for _ in range(4):
            server.kill_engine()
        *tokens, last = events(response.iter_lines())
    assert json.loads(last)["error"]["type"] == "server_error"
    assert json.loads(last)["error"]["code"] == "internal_error"
    assert all(json.loads(token)["choices"][0]["finish_reason"] is None for token in tokens)
    reader.join()
    assert isinstance(reader.error, openai.APIError)
    assert reader.finish_reason is None
    assert server.process.wait(120) == 1
    log = server.log.read_text()
    assert "giving up" in log and "Traceback" not in log


def test_sigterm_lets_streams_finish(start_server: StartServer, tiny_model: Path) -> None:
    server = start_server(tiny_model, *TINY)
    engine_pid = server.engine_pid
    assert engine_pid is not None
    reader = Reader(server, model="tiny", max_tokens=1500, temperature=0)
    server.process.send_signal(signal.SIGTERM)
    probe = server.wait_for(
        lambda: response if (response := server.get("/readyz")).status_code != 200 else None,
        "a /readyz that says no",
    )
    assert (probe.status_code, probe.json()) == (503, {"status": "draining"})
    refused = server.post("/v1/completions", {"prompt": "Hi"})
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "unavailable"
    assert server.get("/livez").status_code == 200
    reader.join()
    assert reader.error is None
    assert reader.finish_reason == "length" and len(reader.chunks) == 1500
    assert server.process.wait(120) == 0
    assert is_gone(engine_pid)
    assert " ERROR " not in server.log.read_text()


@pytest.mark.slow
def test_streams_that_outlast_the_shutdown_timeout_end_with_an_error(
    start_server: StartServer, tiny_model: Path
) -> None:
    server = start_server(tiny_model, *TINY, "--shutdown-timeout", "0.2")
    reader = Reader(server, model="tiny", max_tokens=4000, temperature=0)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(120) == 0
    reader.join()
    assert reader.error is not None and reader.finish_reason is None


def test_second_signal_ends_at_once(start_server: StartServer, tiny_model: Path) -> None:
    server = start_server(tiny_model, *TINY)
    engine_pid = server.engine_pid
    assert engine_pid is not None
    reader = Reader(server, model="tiny", max_tokens=4000, temperature=0)
    server.process.send_signal(signal.SIGINT)
    server.wait_for(lambda: server.get("/readyz").status_code == 503, "draining")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(120) == 130
    reader.join()
    assert reader.error is not None and reader.finish_reason is None
    assert is_gone(engine_pid)


def test_engine_dies_with_its_parent(start_server: StartServer, tiny_model: Path) -> None:
    server = start_server(tiny_model, *TINY)
    engine_pid = server.engine_pid
    assert engine_pid is not None
    reader = Reader(server, model="tiny", max_tokens=4000, temperature=0)  # while it is at work
    os.kill(server.process.pid, signal.SIGKILL)
    server.wait_for(lambda: is_gone(engine_pid), "the engine's death")
    assert reader.join().error is not None


def test_sigterm_while_loading(start_server: StartServer, tiny_model: Path) -> None:
    server = start_server(tiny_model, *TINY, wait=False)
    engine_pid = server.wait_for(lambda: server.engine_pid, "an engine process")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(120) == 0
    assert is_gone(engine_pid)
