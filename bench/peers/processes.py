"""Child processes that never outlive the benchmark, whatever ends it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from bench.peers import worker

LOG_LINES = 6  # of a child that failed, in the message


class PeerError(Exception):
    """A contender is not there, or failed. The message says why, and the remedy if there is one."""


def start(command: Sequence[str | Path], log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Run `command` in a process group of its own, standard error into `log`."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [str(part) for part in command], stderr=stream, start_new_session=True, **options
        )


def kill(process: subprocess.Popen[Any], grace: float = 0.0) -> None:
    """End the process and all of its group; `grace` seconds to do it itself, after SIGTERM."""
    if grace and process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):  # a group lives as long as one of its members
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def run(
    command: Sequence[str | Path], log: Path, env: Mapping[str, str], timeout: float = 600.0
) -> str:
    """What `command` prints. Raises PeerError when it fails or takes longer than `timeout` s."""
    process = start(command, log, env=dict(env), stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise PeerError(f"{Path(command[0]).name} took longer than {timeout:.0f} s") from None
    finally:
        kill(process)
    if process.returncode != 0:
        raise PeerError(f"{Path(command[0]).name} {_ending(process.returncode, log)}")
    return output.decode(errors="replace")


def _ending(code: int, log: Path) -> str:
    how = f"exited {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{how}: {' | '.join(lines[-LOG_LINES:])}" if lines else how


class Worker:
    """A process that keeps a model loaded and answers questions, one at a time: see worker.serve.

    Between questions it is stopped (SIGSTOP), so that it cannot take time from another contender.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        env: Mapping[str, str],
        log: Path,
        load_timeout: float,
    ) -> None:
        self._name = name
        self._log = log
        self._process = start(
            command, log, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        try:
            self.hello = self._answer(load_timeout)
            """What the worker says of itself once its model is loaded."""
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, question: Mapping[str, Any], timeout: float = 600.0) -> Any:
        """The answer. Raises PeerError when the worker fails, which may only be this question's
        fault, or dies."""
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(worker.encode(question))
            return self._answer(timeout)
        except BrokenPipeError:
            raise PeerError(self._death()) from None
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        kill(self._process)

    def _answer(self, timeout: float) -> Any:
        pipe = self._process.stdout
        assert pipe is not None
        end = time.monotonic() + timeout
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise PeerError(f"{self._name} gave no answer within {timeout:.0f} s")
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                raise PeerError(self._death())
            line += part
        answer = worker.decode(line)
        if "error" in answer:
            raise PeerError(f"{self._name}: {answer['error']}")
        return answer

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        kill(self._process)
        return f"{self._name} {_ending(self._process.returncode, self._log)}"

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def progress(text: str) -> None:
    """A line on standard error: some measurements take minutes."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that every `finally` runs."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
