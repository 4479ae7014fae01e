"""Children of the comparison with other engines: they answer, stand still, fail and end."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench.peers.processes import PeerError, Worker
from bench.peers.processes import run as run_process

ECHO = """
from bench.peers import worker
def answer(question):
    if question == "die": raise SystemExit(3)
    print("noise on standard output")
    return {"twice": 2 * question["number"]}
worker.serve(lambda: ({"hello": "there"}, answer))
"""


def make_worker(tmp_path: Path, program: str) -> Worker:
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program]
    return Worker("echo", command, env, tmp_path / "echo.log", load_timeout=60)


def state_of(process_id: int) -> str:
    """The letter of /proc/PID/stat; empty when there is no such process."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return ""
    return stat.rpartition(")")[2].split()[0]


def test_a_worker_answers_and_stands_still_in_between(tmp_path: Path) -> None:
    worker = make_worker(tmp_path, ECHO)
    process_id = worker._process.pid
    try:
        assert worker.hello == {"hello": "there"}
        assert worker.ask({"number": 21}) == {"twice": 42}
        deadline = time.monotonic() + 30
        while state_of(process_id) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state_of(process_id) == "T"
        with pytest.raises(PeerError, match="echo: KeyError: 'number'"):
            worker.ask({})
        assert worker.ask({"number": 1}) == {"twice": 2}  # a bad question is not its end
    finally:
        worker.close()
    assert state_of(process_id) == ""


def test_a_worker_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    program = "import sys; print('no model here', file=sys.stderr); sys.exit(4)"
    with pytest.raises(PeerError, match="echo exited 4: no model here"):
        make_worker(tmp_path, program)
    with pytest.raises(PeerError, match="echo: ZeroDivisionError"):
        make_worker(tmp_path, "from bench.peers import worker; worker.serve(lambda: 1 / 0)")


def test_a_program_that_fails_or_hangs(tmp_path: Path) -> None:
    program = [shutil.which("sh") or "sh", "-c"]
    log = tmp_path / "log"
    assert run_process([*program, "echo out"], log, {}) == "out\n"
    with pytest.raises(PeerError, match="sh exited 7: why"):
        run_process([*program, "echo why >&2; exit 7"], log, {})
    with pytest.raises(PeerError, match="longer than 0 s"):
        run_process([*program, "sleep 60 & sleep 60"], log, {}, timeout=0.2)


def test_sigterm_ends_the_children_too(tmp_path: Path) -> None:
    program = f"""
import subprocess, sys, time
from pathlib import Path
from bench.peers.processes import kill, sigterm_as_interrupt, start
with sigterm_as_interrupt():
    child = start(["sleep", "60"], Path({str(tmp_path / "log")!r}))
    try:
        print(child.pid, flush=True)
        time.sleep(60)
    finally:
        kill(child)
"""
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    with parent:
        child = int(parent.stdout.readline())
        assert state_of(child)
        parent.send_signal(signal.SIGTERM)
    assert state_of(child) == ""
