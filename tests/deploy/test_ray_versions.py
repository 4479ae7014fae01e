"""A replica whose model is a folder of versions switches by itself."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def put(folder: Path, number: int, model: Path) -> None:
    staged = folder / f".{number}"
    staged.mkdir(parents=True)
    (staged / "model.gguf").symlink_to(model)
    staged.rename(folder / str(number))


def test_a_replica_switches_versions_under_load(
    start_cluster: Any, smollm2_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "smol"
    put(folder, 1, smollm2_path)
    cluster = start_cluster(str(folder), "--model-poll-interval", "0.2")
    client, errors, ending = cluster.client(), [], threading.Event()

    def ask() -> None:
        while not ending.is_set():
            try:
                events = list(
                    client.completions.create(
                        model="smol",
                        prompt="Once upon a time",
                        max_tokens=24,
                        stream=True,
                        extra_body={"ignore_eos": True},
                    )
                )
                assert events[-1].choices[0].finish_reason == "length"
            except Exception as error:
                errors.append(repr(error))
                return

    asking = threading.Thread(target=ask)
    asking.start()
    put(folder, 2, smollm2_path)
    deadline = time.monotonic() + 100

    def card() -> dict[str, Any]:
        answer = httpx.get(f"{cluster.url}/v1/models/smol", timeout=30)
        return dict(answer.raise_for_status().json())

    while card()["version"] != 2 or len(cluster.engines()) != 1:
        assert time.monotonic() < deadline, card()
        time.sleep(0.2)
    ending.set()
    asking.join()
    assert errors == []
