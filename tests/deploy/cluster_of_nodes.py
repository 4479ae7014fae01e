"""A Ray cluster of several logical nodes on this machine, and requests that are counted."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import pytest
import yaml

from headrace.cli import main
from headrace.deploy.serve_file import DEPLOYMENT, OURS

ROOT = Path(__file__).parents[2]
OBJECT_STORE = 80 << 20
MODEL = "SmolLM2-135M-Instruct"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def environment(folder: Path) -> dict[str, str]:
    """What every node has in its environment before Ray starts."""
    names = {"CONFIG_FILE_LOC": "cfg", "SOCKET_PATH": "sock", "SERVER_STATE_FILE": "state"}
    files = {**names, "METRICS_SOCKET_PATH": "metrics", "SERVER_STATE_BASE": "."}
    return {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join((str(ROOT / "server"), str(ROOT / "kernels"))),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_worker_niceness": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
    }


@dataclass
class Nodes:
    """The cluster: a head without CPUs and two nodes with two each."""

    cluster: Any
    dashboard: str
    folder: Path
    url: str
    """Of HAProxy."""
    workers: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add_node(self) -> None:
        node = self.cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE)
        self.workers.append(node)

    def config(self, replicas: int = 2, **args: Any) -> dict[str, Any]:
        options = {
            "threads": 1,
            "kv_cache_memory_bytes": "64MiB",
            "max_model_len": 1024,
            "shutdown_timeout": 30,
            **args.pop("options", {}),
        }
        host, _, port = self.url.removeprefix("http://").partition(":")
        application = {
            "name": "chat",
            "import_path": OURS,
            "args": {"options": options, **args},
            "deployments": [{"name": DEPLOYMENT, "num_replicas": replicas}],
        }
        return {
            "proxy_location": "HeadOnly",
            "http_options": {"host": host, "port": int(port)},
            "logging_config": {"enable_access_log": False},
            "applications": [application],
        }

    def deploy(self, replicas: int = 2, *flags: str, **args: Any) -> int:
        """`headrace deploy`; its exit status."""
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(self.config(replicas, **args)))
        return main(["deploy", str(file), "--address", self.dashboard, *flags])

    def replicas(self) -> list[dict[str, Any]]:
        """Those that run, as Serve describes them."""
        answer = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=30).json()
        deployment = answer["applications"]["chat"]["deployments"][DEPLOYMENT]
        return [one for one in deployment["replicas"] if one["state"] == "RUNNING"]

    def has(self, replicas: int) -> bool:
        return len(self.replicas()) == replicas

    def actor(self, class_name: str) -> psutil.Process:
        """The process of an actor."""
        found = [
            process
            for process in psutil.Process().children(recursive=True)
            if any(f"ray::{class_name}" in part for part in command_of(process))
        ]
        assert len(found) == 1, found
        return found[0]


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def command_of(process: psutil.Process) -> list[str]:
    try:
        command: list[str] = process.cmdline()
    except psutil.NoSuchProcess:
        return []
    return command


@contextmanager
def cluster_of_nodes(folder: Path) -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    # Names of sockets may have 107 bytes, and Ray and HAProxy add most of them.
    with TemporaryDirectory(prefix="hr") as short, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(Path(short)).items():
            patch.setenv(name, value)
        port = free_port()
        head = {
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
            "object_store_memory": OBJECT_STORE,
            "temp_dir": f"{short}/ray",
        }
        others = set(psutil.Process().children())  # servers that tests share
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            url = f"http://127.0.0.1:{free_port()}"
            nodes = Nodes(cluster, f"http://127.0.0.1:{port}", folder, url)
            nodes.add_node()
            nodes.add_node()
            yield nodes
        finally:
            roots = set(psutil.Process().children()) - others
            started = [*roots, *(child for root in roots for child in descendants(root))]
            cluster.shutdown()
            _, alive = psutil.wait_procs(started, timeout=10)
            for process in alive:  # HAProxy outlives a head that was killed
                process.kill()


@contextmanager
def door_to(nodes: Nodes) -> Iterator[str]:
    """The URL of a `headrace route` that learns the replicas from the registry."""
    file, log = nodes.folder / "door.yaml", nodes.folder / "door.log"
    config = {"models": {MODEL: {"application": "chat"}}, "ray": {"address": nodes.address}}
    file.write_text(yaml.safe_dump({**config, "port": 0}))
    command = [sys.executable, "-P", "-m", "headrace.cli", "route", str(file)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stderr=stream, stdout=stream)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"URL\s+(http://\S+)/v1", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        while httpx.get(f"{found[1]}/readyz").status_code != 200:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


@dataclass
class Load:
    """Streams, a few at a time, until it is ended. `outcomes` counts what became of each:
    "complete"; "error", which the client sees; "silent", which it would take for complete."""

    url: str
    workers: int = 3
    max_tokens: int = 24
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(self.workers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def until(self, count: int, seconds: float = 120) -> None:
        """Wait until `count` more streams have ended."""
        goal = self.outcomes.total() + count
        deadline = time.monotonic() + seconds
        while self.outcomes.total() < goal:
            assert time.monotonic() < deadline, f"{self.outcomes}, {self.errors}"
            time.sleep(0.05)

    def _work(self) -> None:
        body = {
            "model": MODEL,
            "prompt": "Once upon a time",
            "max_tokens": self.max_tokens,
            "stream": True,
            "ignore_eos": True,
        }
        with httpx.Client(timeout=60) as client:
            while not self._over.is_set():
                outcome, reason = _stream(client, f"{self.url}/v1/completions", body)
                self.outcomes[outcome] += 1
                if outcome != "complete":
                    self.errors.append(reason)
                    time.sleep(0.05)


def _stream(client: httpx.Client, url: str, body: dict[str, Any]) -> tuple[str, str]:
    finished = False
    try:
        with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                return "error", f"{response.status_code}: {response.read()[:200]!r}"
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return ("complete", "") if finished else ("silent", "no finish_reason")
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return "error", str(event["error"])
                    finished = finished or bool(event["choices"][0]["finish_reason"])
    except httpx.HTTPError as error:
        return "error", repr(error)
    return "silent", "the stream ended without [DONE]"
