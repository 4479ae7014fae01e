"""`headrace chat` as a person runs it: in a terminal of its own, with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0


class Terminal:
    """`headrace chat` at one end of a pseudo-terminal, the test at the other."""

    def __init__(self, *arguments: str) -> None:
        self._own, theirs = pty.openpty()
        sources = os.pathsep.join([str(ROOT / "server"), str(ROOT / "kernels")])
        # A session whose terminal this is, so that a Ctrl-C typed here becomes a signal there; and
        # one that is heard, though what a shell starts in the background inherits a deaf ear.
        adopt = (
            "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "signal.signal(signal.SIGINT, signal.SIG_DFL); "
            "os.execv(sys.executable, [sys.executable, '-P', '-m', 'headrace.cli', *sys.argv[1:]])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", adopt, "chat", *arguments],
            env={**os.environ, "PYTHONPATH": sources, "HF_HUB_OFFLINE": "1", "TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def wait_for(self, pattern: str) -> str:
        """The first match behind the last one."""
        deadline = time.monotonic() + PATIENCE
        while not (match := re.compile(pattern).search(self.shown, self._seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.shown}"
            assert self._read(0.1), f"it ended without {pattern!r}:\n{self.shown}"
        self._seen = match.end()
        return match[0]

    def shows(self, text: str) -> bool:
        """Whether `text` is to be seen, or comes soon."""
        self._read(0.5)
        return text in self.shown

    def _read(self, seconds: float) -> bool:
        """False at the end of the output."""
        if select.select([self._own], [], [], seconds)[0]:
            try:
                self.shown += os.read(self._own, 1 << 16).decode(errors="replace")
            except OSError:  # EIO: nobody has the other end open
                return False
        return True

    def end(self) -> int:
        """The exit status, once it has left by itself."""
        deadline = time.monotonic() + PATIENCE
        while self._read(0.1) and self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end:\n{self.shown}"
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)


@pytest.fixture
def chat() -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        terminals.append(Terminal(*arguments))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    server: Server, chat: Callable[..., Terminal]
) -> None:
    terminal = chat("--url", server.url)
    terminal.wait_for("/help lists commands")
    terminal.wait_for("> ")
    terminal.type("/set ignore_eos true\n/set max_tokens 1500\n")
    terminal.wait_for("max_tokens = 1500")
    terminal.wait_for("> ")  # what is typed before is echoed twice
    terminal.type("Tell a story about a river.\n")
    terminal.wait_for(r"(?s)river\..*?(\b\w+ ){4}")
    terminal.type("\x03")
    terminal.wait_for(r"tokens, [\d.]+ tokens/s, first after [\d.]+ s, stopped")
    metrics = server.wait_idle()
    assert metrics["headrace_requests_finished_total{abort}"] >= 1
    terminal.type("/set max_tokens 5\nAgain\n")
    terminal.wait_for("5 tokens, ")
    terminal.type("/set temperature -1\nAgain\n")
    terminal.wait_for(r"\(400, .*temperature\)")
    terminal.wait_for("> ")
    # A signal that comes just before readline waits for a key is seen with the next key.
    while not terminal.shows("Ctrl-D or /exit leaves"):
        terminal.type("\x03")
    terminal.type("/set\n")
    terminal.wait_for("temperature = -1")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_lines_from_a_pipe(server: Server) -> None:
    sources = os.pathsep.join([str(ROOT / "server"), str(ROOT / "kernels")])
    result = subprocess.run(
        [sys.executable, "-m", "headrace.cli", "chat", "--url", server.url + "/v1"],
        input="/set max_tokens 3\n/set ignore_eos true\nHello\n",
        env={**os.environ, "PYTHONPATH": sources},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "3 tokens, " in result.stdout
    assert ">" not in result.stdout.splitlines()[0] and result.stderr == ""


def test_no_server_is_one_line(chat: Callable[..., Terminal]) -> None:
    terminal = chat("--url", "http://127.0.0.1:9")
    assert terminal.end() == 1
    assert terminal.shown.startswith("headrace: http://127.0.0.1:9/v1: no server answers")
    assert terminal.shown.count("\n") == 1


@pytest.mark.slow
def test_it_starts_the_default_model_itself(chat: Callable[..., Terminal]) -> None:
    terminal = chat("--kv-cache-memory-bytes", "256MiB", "--max-model-len", "2048")
    terminal.wait_for("SmolLM2-135M-Instruct at http://127.0.0.1:")
    engines = psutil.Process(terminal.process.pid).children(recursive=True)
    assert engines
    terminal.type("/set temperature 0\nWhat is the capital of France?\n")
    terminal.wait_for("Paris")
    terminal.wait_for("tokens/s")
    terminal.wait_for("> ")
    terminal.type("Tell a very long story about a river.\n")
    terminal.wait_for(r"(?s)river\..*?(\b\w+ ){4}")
    terminal.type("\x03")
    terminal.wait_for("stopped")
    terminal.type("/clear\nWhat is the capital of France?\n")
    terminal.wait_for("Paris")
    terminal.wait_for("tokens/s")
    terminal.type("/exit\n")
    assert terminal.end() == 0
    assert not any(engine.is_running() for engine in engines)
    assert "Traceback" not in terminal.shown and " WARNING " not in terminal.shown
