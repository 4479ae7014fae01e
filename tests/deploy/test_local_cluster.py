"""The parts of the one-machine cluster that need no Ray to run."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import pytest

from headrace.cli import main
from headrace.config import DeviceOptions, EngineConfig
from headrace.deploy.local_cluster import root_cause, share_machine
from headrace.deploy.switches import SERVING, set_local_switches
from headrace.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thread", "2"], "did you mean '--threads'"),
        (["--num-replicas", "0"], "--num-replicas must be at least 1"),
    ],
)
def test_what_is_wrong_is_said_before_ray_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve-ray", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve-ray", "--port", str(port)]) == 2
    assert f"Cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def config(device: str = "auto", threads: int | None = None) -> EngineConfig:
    return replace(EngineConfig(), device=DeviceOptions(device=device, threads=threads))


@pytest.mark.parametrize(
    ("given", "cpus", "gpus", "replicas", "device", "threads"),
    [
        (config(), 8, 0, 1, "cpu", 8),
        (config(), 8, 0, 3, "cpu", 2),
        (config(threads=3), 8, 0, 2, "cpu", 3),
        (config(), 8, 2, 2, "cuda", None),
        (config("cpu"), 8, 2, 2, "cpu", 4),
    ],
)
def test_replicas_share_the_machine(
    given: EngineConfig, cpus: int, gpus: int, replicas: int, device: str, threads: int | None
) -> None:
    shared = share_machine(given, {"CPU": cpus, "GPU": gpus}, replicas).device
    assert (shared.device, shared.threads) == (device, threads)


@pytest.mark.parametrize(
    ("given", "replicas", "message"),
    [
        (config(), 5, "5 replicas need 5 threads, and this machine has 4"),
        (config(threads=3), 2, "2 replicas need 6 threads, and this machine has 4"),
        (config("cuda"), 2, "2 replicas need 2 GPUs, and this machine has 1"),
    ],
)
def test_more_replicas_than_fit_are_refused(
    given: EngineConfig, replicas: int, message: str
) -> None:
    # Ray itself would wait for a larger machine, without end.
    gpus = 1 if given.device.device == "cuda" else 0
    with pytest.raises(ConfigError, match=message):
        share_machine(given, {"CPU": 4, "GPU": gpus}, replicas)


def test_the_cause_is_found_in_rays_report() -> None:
    report = (
        "The deployment failed to start 3 times in a row. Error:\n"
        '  File "serve.py", line 58, in __init__\n'
        "headrace.errors.CheckpointError: /x.gguf: not a GGUF file: it is empty.\n\n"
    )
    assert root_cause(report) == "/x.gguf: not a GGUF file: it is empty."
    assert root_cause("Deploying failed\n  because of Ray\n\n") == "  because of Ray"


def test_switches_keep_what_the_caller_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_AUTH_MODE": "x"})
    set_local_switches()
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert os.environ["RAY_AUTH_MODE"] == "x"
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert {switch.name for switch in SERVING} <= os.environ.keys()


def test_a_cluster_of_our_own_obeys_only_us(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    for _ in range(2):
        monkeypatch.setattr(os, "environ", {})
        set_local_switches()
        assert os.environ["RAY_AUTH_MODE"] == "token"
        tokens.append(os.environ["RAY_AUTH_TOKEN"])
    assert len(tokens[0]) == 64
    assert tokens[0] != tokens[1]
