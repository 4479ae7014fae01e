"""Several processes of one door on one port: a parent that keeps them running.

Run as a module it is one of them: what it is to do is the first line of standard input, which then
stays open as a lifeline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import uvloop

from headrace.config import api_process_environment
from headrace.listening import reserve, url_of
from headrace.observability.logging import configure_logging
from headrace.route.config import RouteConfig
from headrace.route.run import EXIT_INTERRUPTED, EXIT_OK, run

logger = logging.getLogger(__name__)

MIN_DELAY, MAX_DELAY = 0.5, 10.0
"""Between the end of a process and the start of its successor."""
LOOK_SECONDS = 0.1
GRACE_SECONDS = 2.0
"""Beyond shutdown_timeout, until processes that drain are killed."""

_Reread = Callable[[], RouteConfig | None]


class Startup(msgspec.Struct, frozen=True):
    """The first line of a process's standard input, as JSON; later ones change it."""

    config: RouteConfig
    metrics_folder: str


class Keeper:
    """One process after another in the same place."""

    def __init__(self, startup: Startup) -> None:
        self.startup = startup
        self._delay = 0.0
        self._begun = 0.0
        self._due = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def look(self) -> None:
        """Start it where it is not running, later each time it ends soon."""
        now = time.monotonic()
        if self.process is not None and (status := self.process.poll()) is not None:
            self._delay = min(max(2 * self._delay, MIN_DELAY), MAX_DELAY)
            if now - self._begun > 2 * MAX_DELAY:
                self._delay = MIN_DELAY
            logger.error("A door ended with %d; another in %.1f s", status, self._delay)
            self.process, self._due = None, now + self._delay
        if self.process is None and now >= self._due:
            self._begun = now
            self._start()

    def _start(self) -> None:
        folder = self.startup.metrics_folder
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "headrace.route.processes"],
            stdin=subprocess.PIPE,
            bufsize=0,
            env=api_process_environment(Path(folder)),
        )
        self.tell(self.startup)

    def tell(self, startup: Startup) -> None:
        self.startup = startup
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):  # it has just died
                self.process.stdin.write(msgspec.json.encode(startup) + b"\n")

    def signal(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def wait(self, deadline: float) -> bool:
        """Whether it ended well before that; else it is killed."""
        if self.process is None:
            return True
        try:
            status = self.process.wait(max(0.0, deadline - time.monotonic()))
            if status in (0, -signal.SIGTERM):  # the latter: it had not begun to listen
                return True
            logger.warning("A door ended with %d", status)
            return False
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return False


def run_several(config: RouteConfig, *, on_ready: Callable[[str], None], reread: _Reread) -> int:
    """As run.run, with `config.processes` processes on one port; the exit status. `on_ready` gets
    the URL. Raises ConfigError if the address cannot be had."""
    ended: list[int] = []
    rereads: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: ended.append(number))
    signal.signal(signal.SIGHUP, lambda number, frame: rereads.append(number))
    with (
        reserve(config.host, config.port) as holder,
        tempfile.TemporaryDirectory(prefix="headrace-door-", ignore_cleanup_errors=True) as folder,
    ):
        config = msgspec.structs.replace(config, port=holder.getsockname()[1])
        startup = Startup(config, folder)
        keepers = [Keeper(startup) for _ in range(config.processes)]
        for keeper in keepers:
            keeper.look()
        on_ready(url_of(holder))
        while not ended:
            if rereads:
                rereads.clear()
                _reread(keepers, startup, reread)
            for keeper in keepers:
                keeper.look()
            time.sleep(LOOK_SECONDS)
        return _end(keepers, config.shutdown_timeout, ended)


def _reread(keepers: list[Keeper], startup: Startup, reread: _Reread) -> None:
    changed = reread()
    if changed is None:
        return
    for keeper in keepers:
        same = {"host": startup.config.host, "port": startup.config.port}
        config = msgspec.structs.replace(changed, **same)
        keeper.tell(Startup(config, startup.metrics_folder))


def _end(keepers: list[Keeper], timeout: float, signals: list[int]) -> int:
    """The first signal drains, a second one ends."""
    for keeper in keepers:
        keeper.signal(signal.SIGTERM)
    deadline = time.monotonic() + timeout + GRACE_SECONDS
    while time.monotonic() < deadline and len(signals) < 2:
        if all(it.process is None or it.process.poll() is not None for it in keepers):
            break
        time.sleep(LOOK_SECONDS)
    if len(signals) > 1:
        deadline = 0.0
    well = [keeper.wait(deadline) for keeper in keepers]
    return EXIT_OK if all(well) and len(signals) < 2 else EXIT_INTERRUPTED


# --- one of them --------------------------------------------------------------------------------


class _Lifeline:
    """Reads what the parent says; ends this process with it."""

    def __init__(self) -> None:
        self.startup = msgspec.json.decode(sys.stdin.buffer.readline(), type=Startup)
        threading.Thread(target=self._read, name="lifeline", daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            for line in sys.stdin.buffer:
                self.startup = msgspec.json.decode(line, type=Startup)
                os.kill(os.getpid(), signal.SIGHUP)  # the event loop takes it up
        os._exit(1)

    def config(self) -> RouteConfig:
        return self.startup.config


def _ignore_group_signals() -> None:
    # Ctrl-C of a terminal reaches every process of the group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> NoReturn:
    lifeline = _Lifeline()
    startup = lifeline.startup
    configure_logging(startup.config.log_level, startup.config.log_format)
    options: dict[str, Any] = {"alone": False, "metrics_folder": startup.metrics_folder}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        serving = run(startup.config, reread=lifeline.config, **options)
        _ignore_group_signals()
        status = runner.run(serving)
    logging.shutdown()
    os._exit(status)  # the lifeline's thread is not worth waiting for


if __name__ == "__main__":
    main()
