"""Which prefixes doors have sent here of late, for the other doors: GET /load tells them on.

A door names a request's prefixes in the header headrace-prefix. To this process they are opaque; a
wrong one can only send requests to a worse replica.
"""

from __future__ import annotations

import re
import time
from collections import deque

HEADER = "headrace-prefix"
KEPT = 1024
"""Of the newest: a door that asks every second misses none below a thousand requests a second."""

_VALUE = re.compile(r"1( [0-9a-f]{1,16}:[0-9]{1,12}){1,16}", re.ASCII)


class PrefixNews:
    """The newest values of the header, numbered."""

    def __init__(self) -> None:
        self._newest: deque[str] = deque(maxlen=KEPT)
        # Rises over restarts, so that no door takes a new process's for what it has heard.
        self._count = time.time_ns() // 1_000_000

    def add(self, value: str) -> None:
        """Values in no form that is known are left out."""
        if _VALUE.fullmatch(value):
            self._newest.append(value)
            self._count += 1

    def since(self, number: int) -> tuple[int, list[str]]:
        """(the number to ask with next, what came after `number`, as far as it is kept)."""
        fresh = min(max(self._count - number, 0), len(self._newest))
        return self._count, list(self._newest)[len(self._newest) - fresh :]
