"""JSON values, and Python literals as JSON, read from text that arrives in pieces.

What is written is valid JSON (RFC 8259) as far as it goes, character by character: it can be handed
on before the value ends. Two mistakes that models make are mended: control characters inside
strings are escaped, and a backslash that escapes nothing stands for itself.
"""

from __future__ import annotations

import json
import re
from typing import Final

from headrace.text.incoming import IncomingText, Reading

MAX_DEPTH: Final = 64
_MAX_SCALAR = 512  # characters of a number or name

_STRING_RUN = re.compile(r'[^"\'\\\x00-\x1f]*')
_SPACES = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r"[-+.\w]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII)
_HEX = re.compile(r"[0-9a-fA-F]+")
_PYTHON_CODES = {"x": 2, "u": 4, "U": 8}
_PYTHON_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}
_CLOSING = {"{": "}", "[": "]", "(": ")"}


class MalformedError(Exception):
    """The text is not what the parser reads; it stands before what it could not read."""


class ValueReader:
    """Reads values from `incoming` and appends JSON to `written`.

    `python`: Python's literals instead of JSON's values (single quotes, tuples, True, trailing
    commas), without prefixes and triple quotes.
    """

    def __init__(self, incoming: IncomingText, *, python: bool = False) -> None:
        self._in = incoming
        self._python = python
        self.written: list[str] = []

    def take_written(self) -> str:
        text = "".join(self.written)
        self.written.clear()
        return text

    def value(self, depth: int = 0) -> Reading[None]:
        """One value. Raises MalformedError."""
        first = yield from self._in.ahead(1)
        if first in ("{", "[") or (first == "(" and self._python):
            yield from self._container(first, depth)
        elif first == '"' or (first == "'" and self._python):
            yield from self.string()
        else:
            yield from self._scalar()

    def space(self) -> Reading[str]:
        """White space, taken and not written."""
        space = ""
        while True:
            space += self._in.take_run(_SPACES)
            following = yield from self._in.ahead(1)
            if not following or following not in " \t\r\n":
                return space

    def expect(self, characters: str) -> Reading[str]:
        """The next character, which must be one of these. Raises MalformedError."""
        following = yield from self._in.ahead(1)
        if not following or following not in characters:
            raise MalformedError
        return self._in.take()

    def string(self) -> Reading[None]:
        """One string. Raises MalformedError."""
        quote = yield from self.expect("\"'" if self._python else '"')
        self.written.append('"')
        while True:
            self.written.append(self._in.take_run(_STRING_RUN))
            following = yield from self._in.ahead(1)
            if not following:
                raise MalformedError
            if following == "\\":
                yield from self._escape()
            elif following == quote:
                self._in.take()
                self.written.append('"')
                return
            elif following == '"' or following < " ":
                self.written.append(json.dumps(self._in.take())[1:-1])
            else:
                self.written.append(self._in.take())

    def _container(self, opening: str, depth: int) -> Reading[None]:
        if depth >= MAX_DEPTH:
            raise MalformedError
        closing = _CLOSING[self._in.take()]
        self.written.append("{" if opening == "{" else "[")
        comma = ""
        while True:
            yield from self._inner_space()
            following = yield from self._in.ahead(1)
            if following == closing and (self._python or not comma):
                break
            if self._python:
                self.written.append(comma)
            if opening == "{":
                yield from self.string()
                yield from self._inner_space()
                yield from self.expect(":")
                self.written.append(": " if self._python else ":")
                yield from self._inner_space()
            yield from self.value(depth + 1)
            yield from self._inner_space()
            if (yield from self._in.ahead(1)) != ",":
                break
            comma = self._in.take()
            if self._python:  # it may be the last thing before the end
                comma = ", "
            else:
                self.written.append(comma)
        yield from self.expect(closing)
        self.written.append("}" if opening == "{" else "]")

    def _inner_space(self) -> Reading[None]:
        """White space; JSON keeps its own, so that arguments read as the model wrote them."""
        space = yield from self.space()
        if not self._python:
            self.written.append(space)

    def _scalar(self) -> Reading[None]:
        word = yield from self._in.word(_SCALAR, _MAX_SCALAR)
        json_text = _python_scalar(word) if self._python else _json_scalar(word)
        if json_text is None:
            raise MalformedError
        self._in.take(len(word))
        self.written.append(json_text)

    def _escape(self) -> Reading[None]:
        """A backslash and what it escapes."""
        pair = yield from self._in.ahead(2)
        if len(pair) < 2:
            raise MalformedError
        code = pair[1]
        digits = _PYTHON_CODES.get(code, 0) if self._python else 4 if code == "u" else 0
        if digits:
            whole = yield from self._in.ahead(2 + digits)
            if len(whole) < 2 + digits and _HEX.fullmatch(whole[2:] or "0"):
                raise MalformedError
            if _HEX.fullmatch(whole[2:]) and (number := int(whole[2:], 16)) <= 0x10FFFF:
                self._in.take(len(whole))
                self.written.append(whole if code == "u" else json.dumps(chr(number))[1:-1])
                return
        elif code in '"/\\' or (code in "bfnrt" and not self._python):
            self._in.take(2)
            self.written.append(pair)
            return
        elif code == "'" or (self._python and code in _PYTHON_ESCAPES):
            self._in.take(2)
            self.written.append(json.dumps(_PYTHON_ESCAPES.get(code, code))[1:-1])
            return
        self._in.take()
        self.written.append("\\\\")


def _json_scalar(word: str) -> str | None:
    if word in ("true", "false", "null") or _NUMBER.fullmatch(word):
        return word
    return None


def _python_scalar(word: str) -> str | None:
    if word in _PYTHON_NAMES:
        return _PYTHON_NAMES[word]
    if (plain := _json_scalar(word)) is not None:
        return plain
    try:
        return str(int(word, 0))
    except ValueError:
        pass
    try:
        number = float(word)
    except ValueError:
        return None
    return repr(number) if abs(number) < float("inf") else None
