"""A real Ray of one machine that serves SmolLM2, started as users start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

with warnings.catch_warnings(action="ignore"):  # of Ray's own code, when it is first imported
    import ray.serve  # noqa: F401

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
"""Seconds after which what should happen counts as not happening; no measure of speed."""


def _wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE:.0f} s"
        time.sleep(0.1)


@dataclass
class Cluster:
    process: subprocess.Popen[bytes]
    url: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE
        )

    def descendants(self) -> list[psutil.Process]:
        children: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return children

    def engines(self) -> list[psutil.Process]:
        return [p for p in self.descendants() if "headrace.engine.process" in command_of(p)]

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # or a zombie
        return ""


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, f"still there: {[command_of(process) for process in alive]}"


def environment() -> dict[str, str]:
    roots = (str(ROOT / "server"), str(ROOT / "kernels"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}


@contextmanager
def running_cluster(log: Path, *arguments: str) -> Iterator[Cluster]:
    command = [sys.executable, "-P", "-m", "headrace.cli", "serve-ray", "--port", "0"]
    options = ["--kv-cache-memory-bytes", "256MiB", "--max-model-len", "1024"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *options, *arguments], stderr=file, stdout=file, env=environment()
        )
    cluster = Cluster(process, "")
    try:
        found = None

        def announced() -> bool:
            nonlocal found
            found = re.search(r"on Ray Serve: (http://\S+)/v1", log.read_text())
            assert found or process.poll() is None, log.read_text()
            return found is not None

        _wait_until(announced, "the cluster is ready")
        assert found is not None
        cluster.url = found[1]
        yield cluster
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("ray") / "log") as cluster:
        yield cluster


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster of one's own, with more arguments, for tests that break it."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(running_cluster(tmp_path / "log", *arguments))


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object], str], None]:
    return _wait_until


@pytest.fixture(scope="session", name="assert_gone")
def _assert_gone() -> Callable[[list[psutil.Process]], None]:
    return assert_gone


@pytest.fixture
def import_path() -> dict[str, str]:
    """An environment whose Python finds this checkout."""
    return environment()
