"""Which HTTP requests are being answered: whoever takes something out of their reach can wait until
nobody holds it any more."""

from __future__ import annotations


class OpenRequests:
    """The requests that have begun and not ended, oldest first."""

    def __init__(self) -> None:
        self._open: dict[int, None] = {}
        self._next = 0

    def begin(self) -> int:
        """A request has come; what `end` is to be told."""
        number = self._next
        self._next += 1
        self._open[number] = None
        return number

    def end(self, number: int) -> None:
        del self._open[number]

    def mark(self) -> int:
        """This moment, for `passed`."""
        return self._next

    def passed(self, mark: int) -> bool:
        """Whether every request that had begun at that moment has ended."""
        return next(iter(self._open), mark) >= mark
