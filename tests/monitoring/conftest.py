"""A real server to look at, and Prometheus's own programs, where they are installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.e2e.conftest import LIGHT, PATIENCE, Server, free_port, launch

ROOT = Path(__file__).parents[2]


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian package prometheus)")
    return found


@pytest.fixture(scope="session")
def promtool() -> str:
    return _program("promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    return _program("prometheus")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2-135M-Instruct."""
    server = launch(tmp_path_factory.mktemp("server") / "log", LIGHT)
    try:
        server.wait_ready()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(PATIENCE)


@contextmanager
def running_door(log: Path, *arguments: str | Path) -> Iterator[str]:
    """The URL of a door, ready when it comes."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-P", "-m", "headrace.cli", "route", *arguments]
    roots = os.pathsep.join([str(ROOT / "server"), str(ROOT / "kernels")])
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", address.partition(":")[2]],
            env={**os.environ, "PYTHONPATH": roots},
            stdout=output,
            stderr=output,
        )
    try:
        _wait_until_ready(f"http://{address}/readyz", process, log)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(PATIENCE)


@dataclass
class Prometheus:
    """A running one, and what Grafana would ask it."""

    url: str
    window: str
    """For `$__rate_interval`."""

    def ask(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=PATIENCE).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expr: str) -> list[float]:
        """The values of the series, now."""
        expr = re.sub(r"\$(model|application|replica)", ".*", expr)
        expr = expr.replace("$__rate_interval", self.window)
        return [float(s["value"][1]) for s in self.ask("query", query=expr)["result"]]

    def wait_for(self, expr: str) -> list[float]:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if values := self.query(expr):
                return values
            time.sleep(0.2)
        raise AssertionError(f"Prometheus has no data for {expr}")


@contextmanager
def running_prometheus(
    program: str, folder: Path, config: dict[str, Any], window: str
) -> Iterator[Prometheus]:
    """Ready when it comes. `config`: of prometheus.yml; relative paths are below `folder`."""
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until_ready(f"http://{address}/-/ready", process, folder / "log")
        yield Prometheus(f"http://{address}", window)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=PATIENCE).status_code == 200:
                return
        time.sleep(0.1)
