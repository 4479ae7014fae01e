"""Text that arrives in pieces, for parsers that are written as if all of it were there.

A parser is a generator that yields where it needs more text, so what it finds cannot depend on how
the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")

Reading = Generator[None, None, T]
"""A step of a parser: to be used with `yield from`."""


class IncomingText:
    """What has arrived and not been read. Text that was read is kept only while it is recorded."""

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._record: list[str] | None = None
        self._recorded_to = 0
        self.ended = False
        """No text follows."""

    def push(self, text: str) -> None:
        if self._record is not None:
            self._record.append(self._text[self._recorded_to : self._position])
        self._text = self._text[self._position :] + text
        self._position = self._recorded_to = 0

    def start_record(self) -> None:
        """Keep what is read from here on, for `recorded`."""
        self._record, self._recorded_to = [], self._position

    def recorded(self) -> str:
        """What was read since `start_record`; nothing is kept any more."""
        parts = [*(self._record or ()), self._text[self._recorded_to : self._position]]
        self._record = None
        return "".join(parts)

    def take(self, length: int = 1) -> str:
        """The next characters, which must have arrived."""
        start = self._position
        self._position = min(start + length, len(self._text))
        return self._text[start : self._position]

    def take_run(self, pattern: re.Pattern[str]) -> str:
        """What matches here of the text that has arrived. Waits for nothing."""
        match = pattern.match(self._text, self._position)
        return self.take(match.end() - self._position) if match else ""

    def take_rest(self) -> str:
        return self.take(len(self._text))

    def ahead(self, length: int) -> Reading[str]:
        """The next `length` characters without taking them; fewer only at the end of the text."""
        while len(self._text) - self._position < length and not self.ended:
            yield
        return self._text[self._position : self._position + length]

    def word(self, pattern: re.Pattern[str], limit: int) -> Reading[str]:
        """The longest match here without taking it, cut after `limit` characters. `pattern`
        describes any number of characters of one class."""
        while True:
            match = pattern.match(self._text, self._position, self._position + limit)
            length = match.end() - self._position if match else 0
            if length == limit or self._position + length < len(self._text) or self.ended:
                return self._text[self._position : self._position + length]
            yield

    def take_literal(self, options: Sequence[str]) -> Reading[str]:
        """The one of `options`, longest first, that stands here, taken; empty, and nothing is
        taken, if none does."""
        while True:
            here = self._text[self._position : self._position + len(options[0])] if options else ""
            for option in options:
                if here.startswith(option):
                    return self.take(len(option))
                if option.startswith(here) and not self.ended:
                    break
            else:
                return ""
            yield
