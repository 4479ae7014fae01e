"""The memory of this process, read seldom: that costs more than scheduling a step."""

from __future__ import annotations

import time

import psutil

PERIOD = 1.0
"""Seconds."""


class ResidentBytes:
    def __init__(self) -> None:
        self._process = psutil.Process()
        self._value = 0
        self._time = 0.0

    def __call__(self) -> int:
        """Bytes, at most PERIOD old."""
        now = time.monotonic()
        if now - self._time > PERIOD:
            self._value = self._process.memory_info().rss
            self._time = now
        return self._value
