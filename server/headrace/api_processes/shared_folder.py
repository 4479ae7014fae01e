"""Where a server's processes find what they share: names within one private folder."""

from __future__ import annotations

import socket
from pathlib import Path

from headrace.engine.queue_board import QueueBoard
from headrace.errors import ConfigError


class SharedFolder:
    """The folder exists, and nobody else may enter it."""

    def __init__(self, path: Path, num_processes: int) -> None:
        self.path = path
        """Metrics are here, in files named by prometheus_client."""
        self._num_processes = num_processes

    @property
    def engine_path(self) -> Path:
        """Of the socket at which engines accept."""
        return self.path / "engine.socket"

    def board(self, index: int | None = None) -> QueueBoard:
        """`index`: of the process whose row is to be written."""
        return QueueBoard(self.path / "queue", self._num_processes, index)

    def listen_for_engines(self) -> socket.socket:
        """What engines inherit, one after another: connections wait while there is none."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self.engine_path))
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"No socket can be made in {self.path}: {error}. Let TMPDIR name another folder, "
                "with a shorter path."
            ) from None
        listener.listen(128)
        return listener
