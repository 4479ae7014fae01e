"""bench/gpu.py where there is no GPU: it walks through its stages on a CPU, at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.gpu_stages.record import Case, Record

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def bench_gpu(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": "server:kernels", **environment}
    command = [sys.executable, "bench/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def dry_run(stage: str, out: Path) -> dict[str, dict[str, Any]]:
    done = bench_gpu("--dry-run", stage, "--out", str(out), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())["stages"][stage]
    assert found
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", ["check", "kernels", "engine"])
def test_a_dry_run_of_each_stage(stage: str, tmp_path: Path) -> None:
    assert all("error" not in result for result in dry_run(stage, tmp_path / "gpu.json").values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_of_the_peers(tmp_path: Path) -> None:
    found = dry_run("peers", tmp_path / "gpu.json")
    assert found["transformers tiny: 2 x 8/3"]["output tokens"] == 6


def test_without_a_gpu_it_says_what_works() -> None:
    done = bench_gpu(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
    done = bench_gpu("--dry-run", TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr
    assert "no stage speed; there are check" in bench_gpu("speed").stderr


def test_a_record_goes_on_where_it_ended(tmp_path: Path) -> None:
    path, ran = tmp_path / "gpu.json", []

    def case(name: str, fails: bool = False) -> Case:
        def run() -> dict[str, Any]:
            ran.append(name)
            if fails:
                raise ValueError("no such kernel")
            return {"us": 1.5}

        return Case(name, run)

    cases = [case("a"), case("b", fails=True), case("c")]
    first = Record.open(path, {"gpu": "X"})
    first.run("kernels", cases[:2], only="", again=False, budget=60)
    again = Record.open(path, {"gpu": "X"})
    again.run("kernels", cases, only="", again=False, budget=60)
    assert ran == ["a", "b", "c"]
    assert again.failures(["kernels"]) == ["kernels b"]
    assert "FAILED b: ValueError: no such kernel" in again.table(["kernels"])
    again.run("kernels", cases, only="a", again=True, budget=60)
    assert ran == ["a", "b", "c", "a"]
    again.run("kernels", cases, only="", again=True, budget=-1)
    assert ran == ["a", "b", "c", "a"]


def test_a_record_of_another_machine_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    Record.open(path, {"gpu": "X"}).run(
        "kernels", [Case("a", lambda: {"us": 1.0})], only="", again=False, budget=60
    )
    assert Record.open(path, {"gpu": "Y"}).results("kernels") == {}
    (kept,) = tmp_path.glob("gpu.*.json")
    assert json.loads(kept.read_text())["machine"] == {"gpu": "X"}
