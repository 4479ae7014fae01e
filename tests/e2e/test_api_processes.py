"""Several API processes at one port with one engine: what clients notice of that, and what not."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from tests.e2e.conftest import launch
from tests.e2e.test_lifetime import Reader, check_replay, is_gone

if TYPE_CHECKING:
    from tests.e2e.conftest import Server, StartServer

pytestmark = pytest.mark.e2e

TWO = ("--threads", "1", "--kv-cache-memory-bytes", "64MiB", "--api-processes", "2")
BODY: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "ignore_eos": True, "temperature": 0}
CHANGES_BY_ITSELF = ("process_", "host_", "step_age", "/metrics")


def steady(text: str) -> list[str]:
    """The lines of /metrics that do not change while nothing but scrapes happens."""
    return [line for line in text.splitlines() if not any(w in line for w in CHANGES_BY_ITSELF)]


def connections_of(pid: int, port: int) -> list[int]:
    """The clients' ports of connections that a process has accepted."""
    return [
        int(connection.raddr.port)
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
    ]


def listens(pid: int, port: int) -> bool:
    """A process that takes the place of another one does once it can answer."""
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for connection in psutil.Process(pid).net_connections("tcp")
    )


class Stream:
    """A completion on a connection of its own, read in a thread to whatever end it has."""

    def __init__(self, server: Server, max_tokens: int) -> None:
        self.lines: list[str] = []
        self.error: httpx.HTTPError | None = None
        self.port = 0
        self._body = {**BODY, "max_tokens": max_tokens, "stream": True}
        self._url = f"{server.url}/v1/completions"
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        server.wait_for(lambda: len(self.lines) > 4, "the first tokens")

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=100) as response:
                stream = response.extensions["network_stream"]
                self.port = stream.get_extra_info("client_addr")[1]
                self.lines.extend(line for line in response.iter_lines() if line)
        except httpx.HTTPError as error:
            self.error = error

    def join(self) -> Stream:
        self._thread.join(100)
        assert not self._thread.is_alive(), "the stream has no end"
        return self


def streams_on_both(server: Server, max_tokens: int) -> dict[int, list[Stream]]:
    """API process -> its streams; each has at least one."""
    streams: list[Stream] = []
    found: dict[int, list[Stream]] = {}
    while len(found) < 2:
        assert len(streams) < 40, "all connections go to one process"
        streams.append(Stream(server, max_tokens))
        for pid in server.api_pids:
            ports = connections_of(pid, server.address[1])
            if mine := [stream for stream in streams if stream.port in ports]:
                found[pid] = mine
    return found


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tests of this file follow each other on it; the last one ends it."""
    server = launch(tmp_path_factory.mktemp("two") / "server.log", [tiny_model, *TWO])
    try:
        server.wait_ready()
        server.wait_for(lambda: "URL" in server.log.read_text() or None, "all processes")
        yield server
    finally:
        server.process.kill()


def test_metrics_and_probes_are_the_same_whichever_process_answers(server: Server) -> None:
    port = server.address[1]

    def ask(number: int) -> None:
        body = {**BODY, "max_tokens": 5 + number % 3}
        assert server.post("/v1/completions", body).status_code == 200

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(24)))
    server.wait_idle()
    clients = [httpx.Client(base_url=server.url, timeout=100) for _ in range(16)]
    texts = [client.get("/metrics").text for client in clients]
    assert all(connections_of(pid, port) for pid in server.api_pids)
    assert len(server.api_pids) == 2
    assert all(steady(text) == steady(texts[0]) for text in texts)
    facts = [client.get("/server_info").json()["models"][0]["engine"] for client in clients]
    assert all(fact == facts[0] for fact in facts)
    assert {client.post("/reset_prefix_cache").status_code for client in clients} == {200}
    assert {client.get("/livez").status_code for client in clients} == {200}
    for client in clients:
        client.close()
    metrics = server.metrics()
    assert metrics["headrace_requests_finished_total{length}"] == 24
    assert metrics["headrace_generation_tokens_total"] == 24 * 6
    assert metrics["vllm:generation_tokens_total"] == 24 * 6
    assert metrics["headrace_e2e_request_latency_seconds_count"] == 24
    assert metrics["headrace_iteration_tokens_count"] == metrics["headrace_engine_steps_total"]


def test_streams_of_all_processes_outlive_their_engine(server: Server) -> None:
    check_replay(server, "tiny", max_tokens=300)


def test_a_killed_api_process_is_replaced_and_the_others_go_on(server: Server) -> None:
    streams = streams_on_both(server, max_tokens=4000)
    before = server.metrics()
    killed, other = streams
    os.kill(killed, signal.SIGKILL)
    for stream in streams[killed]:
        stream.join()
        assert isinstance(stream.error, httpx.RemoteProtocolError | httpx.ReadError)
    for stream in streams[other]:
        stream.join()
        assert stream.error is None and len(stream.lines) == 4001 and "[DONE]" in stream.lines[-1]
    server.wait_for(lambda: len(server.api_pids) == 2 or None, "another API process")
    assert other in server.api_pids and killed not in server.api_pids
    (new,) = set(server.api_pids) - {other}
    while not listens(new, server.address[1]):  # nobody is sent to it before
        assert server.get("/readyz").status_code == 200
    after = server.wait_idle()
    assert after["headrace_api_process_restarts_total"] == 1
    aborted = "headrace_requests_finished_total{abort}"
    assert after[aborted] == before[aborted] + len(streams[killed])
    assert after["headrace_kv_cache_blocks{used}"] == 0
    for name, value in before.items():
        if name.partition("{")[0].endswith(("_total", "_count", "_sum", "_bucket")):
            assert after[name] >= value, f"{name} went back"


def test_sigterm_lets_the_streams_of_all_processes_finish(server: Server) -> None:
    streams = streams_on_both(server, max_tokens=1500)
    pids = [*server.api_pids, server.engine_pid]
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.get("/readyz").status_code == 503 or None, "draining")
    for stream in [stream for found in streams.values() for stream in found]:
        stream.join()
        assert stream.error is None and len(stream.lines) == 1501
    assert server.process.wait(100) == 0
    assert all(pid is not None and is_gone(pid) for pid in pids)
    with socket.create_server(server.address):
        pass
    log = server.log.read_text()
    assert "Traceback" not in log
    errors = [line for line in log.splitlines() if " ERROR " in line]
    assert len(errors) == 3 and sum("API process" in line for line in errors) == 1, errors


@pytest.mark.slow
def test_all_processes_die_with_their_parent(start_server: StartServer, tiny_model: Path) -> None:
    server = start_server(tiny_model, *TWO)
    pids = [*server.api_pids, server.engine_pid]
    reader = Reader(server, model="tiny", max_tokens=4000, temperature=0)
    os.kill(server.process.pid, signal.SIGKILL)
    server.wait_for(lambda: all(pid and is_gone(pid) for pid in pids) or None, "all deaths")
    assert reader.join().error is not None


@pytest.mark.slow
def test_a_stuck_api_process_is_replaced(start_server: StartServer, tiny_model: Path) -> None:
    server = start_server(tiny_model, *TWO, "--step-timeout", "3")
    server.wait_for(lambda: "URL" in server.log.read_text() or None, "all processes")
    stuck, other = server.api_pids
    os.kill(stuck, signal.SIGSTOP)
    server.wait_for(lambda: is_gone(stuck) or None, "the end of the stuck process")
    server.wait_for(lambda: len(server.api_pids) == 2 or None, "another API process")
    assert other in server.api_pids
    server.stop()
