"""What becomes of the cluster when its parts die, and the Serve config on a Ray of its own."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
MODEL = "SmolLM2-135M-Instruct"
ENGINE_DEATHS = 4
"""One more than its client restarts it after."""

Start = Callable[..., Any]
WaitUntil = Callable[[Callable[[], object], str], None]
AssertGone = Callable[[list[psutil.Process]], None]


def test_ray_replaces_a_replica_whose_engine_has_given_up(
    start_cluster: Start, wait_until: WaitUntil
) -> None:
    cluster = start_cluster()
    replica = cluster.engines()[0].parent()
    killed: set[int] = set()

    def has_new_engine() -> bool:
        return bool({engine.pid for engine in cluster.engines()} - killed) and cluster.is_ready()

    for _ in range(ENGINE_DEATHS):
        wait_until(has_new_engine, "the engine is restarted")
        (engine,) = [engine for engine in cluster.engines() if engine.pid not in killed]
        assert engine.parent() == replica, "its client restarts it, not Ray"
        killed.add(engine.pid)
        engine.kill()
    wait_until(lambda: not replica.is_running(), "the replica is replaced")
    wait_until(has_new_engine, "the new replica is ready")
    answer = cluster.client().completions.create(model=MODEL, prompt="1, 2, 3,", max_tokens=4)
    assert answer.choices[0].finish_reason == "length"


def test_replicas_share_the_load_and_a_killed_one_takes_its_engine(
    start_cluster: Start, wait_until: WaitUntil, assert_gone: AssertGone
) -> None:
    cluster = start_cluster("--num-replicas", "2", "--threads", "1")
    engines = cluster.engines()
    assert len(engines) == 2
    spent = [sum(engine.cpu_times()[:2]) for engine in engines]
    with cluster.client() as client:
        streams = [
            client.completions.create(model=MODEL, prompt="Once", max_tokens=16, stream=True)
            for _ in range(8)
        ]
        assert all(list(stream)[-1].choices[0].finish_reason for stream in streams)
    assert all(
        sum(engine.cpu_times()[:2]) > before for engine, before in zip(engines, spent, strict=True)
    )
    engines[0].parent().kill()
    assert_gone(engines[:1])
    wait_until(lambda: len(cluster.engines()) == 2, "Ray starts another replica")


@pytest.mark.parametrize("end", ["kill", "two signals"])
def test_an_abrupt_end_leaves_no_engine(
    start_cluster: Start, assert_gone: AssertGone, end: str
) -> None:
    cluster = start_cluster("--shutdown-timeout", "60")
    everything = cluster.descendants()
    ours = [*cluster.engines(), *(engine.parent() for engine in cluster.engines())]
    stream = cluster.client().completions.create(
        model=MODEL, prompt="Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    if end == "kill":
        cluster.process.kill()
        assert cluster.process.wait(20) == -signal.SIGKILL
        assert_gone(ours)
        for process in everything:  # Ray's own are not sure to notice
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    else:
        cluster.process.terminate()
        time.sleep(1)
        assert cluster.process.poll() is None, "it waits for the stream"
        cluster.process.terminate()
        assert cluster.process.wait(20) == 130
        assert_gone(everything)


def test_a_model_that_cannot_be_served_ends_the_command_with_the_reason(
    start_cluster: Start, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(AssertionError, match=r"headrace: .*broken\.gguf"):
        start_cluster(str(broken))


def test_the_shipped_config_serves(
    tmp_path: Path, import_path: dict[str, str], wait_until: WaitUntil, assert_gone: AssertGone
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = yaml.safe_load((ROOT / "deploy" / "ray" / "headrace.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"]["options"]["kv_cache_memory_bytes"] = "256MiB"
    file = tmp_path / "headrace.yaml"
    file.write_text(yaml.safe_dump(config))
    serve = str(Path(sys.executable).with_name("serve"))
    environment = {**import_path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen([serve, "run", "--address", "local", str(file)], env=environment)

    def is_ready() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready, "the application is ready")
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert_gone(started)
