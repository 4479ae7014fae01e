"""What each of several API processes has waiting, where the others read it: one small shared file.

A row of three integers a process, written by that process alone. The limits on the queue of an
engine hold for all of its API processes together.
"""

from __future__ import annotations

import mmap
from pathlib import Path

COLUMNS = 3
"""Requests that wait for their first token, their prompt tokens, requests that live."""
BYTES = 8


class QueueBoard:
    """`index`: the row that is ours; None for who only reads and clears."""

    def __init__(self, path: Path, num_rows: int, index: int | None = None) -> None:
        """Makes the file where it is not there yet."""
        size = num_rows * COLUMNS * BYTES
        with path.open("a+b") as file:
            file.truncate(size)
            self._cells = memoryview(mmap.mmap(file.fileno(), size)).cast("q")
        self._num_rows = num_rows
        self._index = index

    def publish(self, num_queued: int, queued_tokens: int, num_live: int) -> None:
        assert self._index is not None, "who only reads has no row"
        start = self._index * COLUMNS
        cells = self._cells
        cells[start], cells[start + 1], cells[start + 2] = num_queued, queued_tokens, num_live

    def others(self) -> tuple[int, int]:
        """(requests, prompt tokens) that wait in all other processes."""
        rows = [row for row in range(self._num_rows) if row != self._index]
        return (
            sum(self._cells[row * COLUMNS] for row in rows),
            sum(self._cells[row * COLUMNS + 1] for row in rows),
        )

    @property
    def num_live(self) -> int:
        """Requests that live, in all processes."""
        return sum(self._cells[row * COLUMNS + 2] for row in range(self._num_rows))

    def clear(self, index: int) -> None:
        """Empty the row of a process that has ended."""
        for column in range(COLUMNS):
            self._cells[index * COLUMNS + column] = 0
