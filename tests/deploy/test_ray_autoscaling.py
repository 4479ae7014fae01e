"""A model behind the door scales from zero to two replicas and back, on a real Ray."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from headrace.listening import listen

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

NAME = "smollm"
WAKE_S = 90.0
WaitUntil = Callable[[Callable[[], object], str], None]


class Site:
    """The door's URL, and what happened to requests."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.statuses: list[int] = []
        self.wanted = 0
        """Threads that ask, one request after the other."""

    def ask(self, max_tokens: int = 48) -> int:
        body = {"model": NAME, "prompt": "Once upon a time", "max_tokens": max_tokens}
        body["ignore_eos"] = True
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=WAKE_S + 30)
        self.statuses.append(answer.status_code)
        return answer.status_code

    def replicas(self) -> int:
        """That the door knows and finds ready."""
        told = httpx.get(f"{self.url}/v1/models/{NAME}", timeout=10).json()["replicas"]
        return sum(replica["state"] == "ready" for replica in told)

    def metric(self, line: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        values = [row.split()[-1] for row in text.splitlines() if row.startswith(line)]
        return float(values[0]) if values else 0.0

    def load(self, index: int, ended: threading.Event) -> None:
        while not ended.is_set():
            if index < self.wanted:
                self.ask()
            else:
                time.sleep(0.1)


@contextlib.contextmanager
def running(
    command: list[str], log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """A process with pipes, which ends when its standard input does, or else soon after."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
        )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(30)


@pytest.fixture
def site(tmp_path: Path, import_path: dict[str, str]) -> Iterator[Site]:
    environment = {**import_path, "RAY_AUTH_MODE": "disabled"}
    # Ray's sockets lie below it, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="hr-"))
    for name, place in {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "METRICS_SOCKET_PATH": "metrics.sock",
        "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "state",
    }.items():
        environment[f"RAY_SERVE_HAPROXY_{name}"] = str(folder / place)
    cluster = [sys.executable, "-P", str(Path(__file__).with_name("autoscaled_cluster.py"))]
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    try:
        with running([*cluster, str(folder)], tmp_path / "ray.log", environment) as ray_process:
            assert ray_process.stdout is not None
            lines = iter(ray_process.stdout.readline, "")
            address = next((line.strip() for line in lines if _is_address(line)), None)
            assert address, (tmp_path / "ray.log").read_text()
            content = {
                "models": {
                    NAME: {"application": "chat", "wake": {"queue": 8, "deadline_s": WAKE_S}}
                },
                "ray": {"address": address},
                "port": port,
            }
            file = tmp_path / "door.yaml"
            file.write_text(yaml.safe_dump(content))
            door = [sys.executable, "-P", "-m", "headrace.cli", "route", str(file)]
            with running(door, tmp_path / "door.log", environment) as process:
                yield Site(f"http://127.0.0.1:{port}")
                process.terminate()
    finally:
        # Where the policy tells why it decided: for whoever finds the test failed.
        for log in folder.glob("session_*/logs/serve/controller_*.log"):
            shutil.copy(log, tmp_path)
        shutil.rmtree(folder, ignore_errors=True)


def _is_address(line: str) -> bool:
    host, _, port = line.strip().rpartition(":")
    return bool(host) and " " not in host and port.isdigit()


def test_it_wakes_grows_shrinks_and_sleeps_and_loses_nothing(
    site: Site, wait_until: WaitUntil
) -> None:
    def answers() -> bool:
        try:
            return httpx.get(f"{site.url}/livez", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers, "the door listens")
    assert site.replicas() == 0
    over = threading.Event()
    threads = [threading.Thread(target=site.load, args=(i, over), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    try:
        site.wanted = 3
        wait_until(
            lambda: site.metric("headrace_door_queued_requests{") == 3, "requests are queued"
        )
        wait_until(lambda: len(site.statuses) >= 3, "one replica woke and answered")
        site.wanted = 8
        wait_until(lambda: site.replicas() == 2, "there are two replicas")
        site.wanted = 0
        wait_until(lambda: site.replicas() == 1, "there is one replica again")
        assert site.ask(4) == 200
        wait_until(lambda: site.replicas() == 0, "there is none")
        assert site.ask(4) == 200, "it wakes again"
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert set(site.statuses) == {200}
    ready = 'headrace_door_unqueued_requests_total{model_name="smollm",outcome="ready"}'
    assert site.metric(ready) >= 4
