"""Finds stop strings in a text that arrives in pieces, wherever the pieces are cut.

The first of the stream transforms; it knows text only.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches a text for the first stop string to be completed.

    Text that may still turn out to be the beginning of a stop string is held back: at most the
    longest stop string less one character. What is found does not depend on how the text was cut.
    Each character costs a constant time per stop string (Knuth, Morris and Pratt, 1977).
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the stop string itself is part of the output."""
        # Of two that end at the same character the longer one begins first, so it wins.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._fallbacks = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """The text that is now certain to be output. After a match everything else is dropped."""
        if self.found is not None:
            return ""
        held = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            stop = self._step(character)
            if stop is not None:
                self.found, self._held = stop, ""
                return held[:position] if self._include else held[: position - len(stop)]
        keep = len(held) - max(self._matched, default=0)
        self._held = held[keep:]
        return held[:keep]

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        for index, stop in enumerate(self._stops):
            borders = self._fallbacks[index]
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            if stop[matched] == character:
                matched += 1
            self._matched[index] = matched
            if matched == len(stop):
                return stop
        return None


def _borders(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper border."""
    borders = [0] * len(pattern)
    matched = 0
    for index in range(1, len(pattern)):
        while matched and pattern[index] != pattern[matched]:
            matched = borders[matched - 1]
        if pattern[index] == pattern[matched]:
            matched += 1
        borders[index] = matched
    return borders
