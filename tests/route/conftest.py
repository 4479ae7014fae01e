"""The door's tests run on the event loop that it runs on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from tests.e2e.conftest import LIGHT, PATIENCE, Server, _environment, free_port, launch

from headrace.route import fleet


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], uvloop.Loop]] | None:
    here = Path(__file__).parent in item.path.parents
    return {"uvloop": uvloop.new_event_loop} if here else None


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "POLL_SECONDS", 0.05)


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Server]]:
    """Two real servers of the default model, for a test that may kill one."""
    servers = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        servers.append(launch(folder / "server.log", LIGHT))
    try:
        for server in servers:
            server.wait_ready()
        yield servers
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()


@pytest.fixture
def door(replicas: list[Server], tmp_path: Path) -> Iterator[Server]:
    """A real door in front of them; it ends as it should."""
    port, log = free_port(), tmp_path / "door.log"
    names = [f"--replica=SmolLM2-135M-Instruct={replica.url}" for replica in replicas]
    command = [sys.executable, "-P", "-m", "headrace.cli", "route", *names, "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=_environment(), stdout=output, stderr=output)
    server = Server(process, ("127.0.0.1", port), log)
    try:
        server.wait_ready()
        yield server
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
