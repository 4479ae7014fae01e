"""A folder of versions under a real server: switches under load, broken versions, killed engines,
rollbacks, and a machine without room for two."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from safetensors.numpy import load_file, save_file
from tests.conftest import API_PROCESSES
from tests.e2e.conftest import TINY_LIGHT, RunCommand, Server, StartServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),  # up to six engines start, one after the other
    pytest.mark.skipif(
        os.environ.get(API_PROCESSES, "1") != "1", reason="versions have one API process"
    ),
]

OPTIONS = (*TINY_LIGHT, "--model-poll-interval", "0.1", "--served-model-name", "tiny")


class Folder:
    """The versions of the small checkpoint. Each draws other tokens."""

    def __init__(self, path: Path, checkpoint: Path) -> None:
        self.path = path
        self._checkpoint = checkpoint
        path.mkdir()

    def put(self, number: int, spoil: Callable[[Path], None] = lambda folder: None) -> None:
        """By a rename, as one should."""
        staged = self.path / f".{number}.tmp"
        shutil.copytree(self._checkpoint, staged)
        weights = load_file(staged / "model.safetensors")
        noise = np.random.default_rng(number).standard_normal(weights["lm_head.weight"].shape)
        weights["lm_head.weight"] += noise.astype(np.float32)
        save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
        spoil(staged)
        staged.rename(self.path / str(number))

    def remove(self, number: int) -> None:
        gone = self.path / f".{number}.gone"
        (self.path / str(number)).rename(gone)
        shutil.rmtree(gone)


@pytest.fixture
def versions(tmp_path: Path, tiny_model: Path) -> Folder:
    return Folder(tmp_path / "versions", tiny_model)


def cards(server: Server) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in server.get("/v1/models").json()["data"]}


def states(server: Server) -> dict[str, str]:
    return {name: card["state"] for name, card in cards(server).items()}


def wait_for_version(server: Server, number: int) -> None:
    server.wait_for(
        lambda: cards(server).get("tiny", {}).get("version") == number,
        f"version {number}",
        lambda: f"{states(server)}\n{server.log.read_text()}",
    )


@contextmanager
def streams(server: Server, threads: int = 4) -> Iterator[list[str]]:
    """Streaming clients, one request after another; the errors they met."""
    errors: list[str] = []
    ending = threading.Event()
    counts = [0] * threads

    def work(index: int) -> None:
        client = server.client()
        while not ending.is_set():
            try:
                events = list(
                    client.completions.create(
                        model="tiny",
                        prompt=f"client {index} ",
                        max_tokens=120,
                        stream=True,
                        extra_body={"ignore_eos": True},
                        stream_options={"include_usage": True},
                    )
                )
                assert events[-1].usage.completion_tokens == 120
                assert events[-2].choices[0].finish_reason == "length"
                assert len({event.system_fingerprint for event in events}) == 1
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
                return
            counts[index] += 1

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    yield errors
    ending.set()
    for worker in workers:
        worker.join()
    if not errors:
        assert min(counts) > 0, counts


def test_versions_switch_and_go_back_under_load(
    start_server: StartServer, versions: Folder
) -> None:
    versions.put(1)
    server = start_server(versions.path, *OPTIONS)
    first = cards(server)["tiny"]
    assert (first["version"], first["root"]) == (1, "tiny")
    unready: list[int] = []
    with streams(server) as errors:
        for change, wanted in ((versions.put, 2), (versions.remove, 1)):
            change(2)

            def switched(wanted: int = wanted) -> bool:
                if (status := server.get("/readyz").status_code) != 200:
                    unready.append(status)
                return bool(cards(server)["tiny"]["version"] == wanted)

            server.wait_for(switched, f"version {wanted}", server.log.read_text)
        server.wait_for(lambda: len(server.engine_pids) == 1, "one engine", server.log.read_text)
    assert errors == [] and unready == []
    assert cards(server)["tiny"]["digest"] == first["digest"]
    metrics = server.wait_idle()
    assert metrics["headrace_model_version"] == 1
    assert metrics["headrace_model_loads_total"] == 3
    assert metrics["headrace_requests_finished_total{length}"] == server.finished(metrics)
    server.stop()
    assert "Traceback" not in server.log.read_text()


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 20_000)


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _with_other_shapes(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_truncate, "model.safetensors"),
        (_without_tokenizer, "tokenizer"),
        (_with_other_shapes, "norm"),
    ],
)
def test_a_broken_version_leaves_the_old_one_as_it_is(
    start_server: StartServer, versions: Folder, spoil: Callable[[Path], None], reason: str
) -> None:
    versions.put(1)
    server = start_server(versions.path, *OPTIONS)
    pid = server.engine_pids
    with streams(server, threads=2) as errors:
        versions.put(2, spoil)
        server.wait_for(
            lambda: states(server).get("tiny@2") == "failed", "a failure", server.log.read_text
        )
        time.sleep(0.5)  # looks at it again
    assert errors == []
    card = cards(server)["tiny@2"]
    assert reason in card["reason"]
    assert cards(server)["tiny"]["version"] == 1 and server.engine_pids == pid
    assert server.get("/readyz").status_code == 200
    assert server.log.read_text().count("Version 2 of tiny was not loaded") == 1
    assert server.get("/metrics").text.count('outcome="failed"} 1.0') == 1
    versions.remove(2)
    versions.put(2)
    wait_for_version(server, 2)
    server.stop()


def test_a_killed_engine_of_a_new_version_is_replaced(
    start_server: StartServer, versions: Folder
) -> None:
    versions.put(1)
    server = start_server(versions.path, *OPTIONS)
    (old,) = server.engine_pids
    with streams(server) as errors:
        versions.put(2)
        # While it loads ...
        (pid,) = server.wait_for(
            lambda: [pid for pid in server.engine_pids if pid != old], "an engine"
        )
        os.kill(pid, signal.SIGKILL)
        wait_for_version(server, 2)
        # ... and when it serves.
        server.wait_for(lambda: len(server.engine_pids) == 1, "the old one's end")
        assert server.engine_pids != [pid]
        server.kill_engine()
        server.wait_ready()
    assert errors == []
    assert cards(server)["tiny"]["version"] == 2
    server.stop()


def test_a_version_whose_engine_is_lost_gives_its_place_to_the_one_before(
    start_server: StartServer, versions: Folder
) -> None:
    versions.put(1)
    versions.put(2)
    server = start_server(versions.path, *OPTIONS)
    assert cards(server)["tiny"]["version"] == 2
    for _ in range(3):
        server.kill_engine()
        server.wait_ready()
    server.kill_engine()
    wait_for_version(server, 1)
    assert states(server)["tiny@2"] == "failed"
    assert server.client().completions.create(model="tiny", prompt="a", max_tokens=4).choices
    server.stop()


def test_all_versions_by_name(start_server: StartServer, versions: Folder) -> None:
    versions.put(1)
    versions.put(2)
    server = start_server(versions.path, *OPTIONS, "--model-versions", "all")
    ready = dict.fromkeys(("tiny", "tiny@2", "tiny@1"), "ready")
    server.wait_for(lambda: states(server) == ready, "both", server.log.read_text)
    client = server.client()

    def answer(model: str) -> tuple[str, str]:
        reply = client.completions.create(
            model=model, prompt="abc", max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
        )
        return reply.choices[0].text, str(reply.system_fingerprint)

    assert answer("tiny") == answer("tiny@2") != answer("tiny@1")
    versions.remove(2)
    wait_for_version(server, 1)
    with pytest.raises(openai.NotFoundError):
        answer("tiny@2")
    assert answer("tiny") == answer("tiny@1")
    server.stop()


def test_without_room_for_two_the_old_version_goes_first(
    start_server: StartServer, versions: Folder
) -> None:
    """The KV cache is more than half of the memory that is free. It is not written to, and counts
    all the same."""
    versions.put(1)
    kv = int(psutil.virtual_memory().available * 0.7)
    server = start_server(
        versions.path, *OPTIONS, "--kv-cache-memory-bytes", str(kv), "--shutdown-timeout", "20"
    )
    client = server.client()
    running = client.completions.create(
        model="tiny", prompt="a", max_tokens=600, stream=True, extra_body={"ignore_eos": True}
    )
    versions.put(2)
    refused = server.wait_for(
        lambda: next(iter([r for r in [server.get("/readyz")] if r.status_code == 503]), None),
        "unreadiness",
        server.log.read_text,
    )
    assert refused.headers["retry-after"]
    answer = server.post("/v1/completions", {"model": "tiny", "prompt": "a"})
    if answer.status_code != 200:  # it may be ready by now
        assert answer.status_code == 503 and answer.headers["retry-after"]
    assert len(list(running)) == 600, "what ran has finished"
    wait_for_version(server, 2)
    server.wait_ready()
    assert len(server.engine_pids) == 1
    assert "has no room beside" in server.log.read_text()
    server.stop()


def test_starts_that_are_refused(run_command: RunCommand, versions: Folder) -> None:
    def error(*arguments: str) -> str:
        result = run_command("serve", str(versions.path), *arguments)
        assert result.returncode == 2, result.stderr
        return result.stderr

    versions.put(7, _truncate)
    assert "model.safetensors" in error("--model-poll-interval", "0.1")
    assert "which has 7" in error("--model-versions", "2,3")
    assert "latest, all, or numbers" in error("--model-versions", "newest")
    assert "--api-processes 2" in error("--api-processes", "2")
    result = run_command("serve", str(versions.path / "7"), "--model-versions", "all")
    assert "has no versions" in result.stderr
