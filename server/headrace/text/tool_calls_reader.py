"""Reads tool calls out of an answer that arrives in pieces.

Nothing is lost: what turns out to be no call is text again. A call names one of the request's
tools; its arguments are handed on as they arrive, as JSON that is valid so far. Only markers that
are not complete, white space beside calls and a call's text before its arguments are held back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from headrace.text.incoming import IncomingText, Reading
from headrace.text.tool_calls import (
    ARGS,
    ARGUMENTS_KEYS,
    CALL_ID,
    Arguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Piece,
    ToolCallFormat,
)
from headrace.text.tool_calls_values import MalformedError, ValueReader

MAX_HELD = 2**18  # characters of a value that has to be known before the call begins
MAX_HELD_SPACE = 64

_NAME = re.compile(r"[\w.\-/:]*")
_IDENTIFIER = re.compile(r"\w*")
_SURPLUS = re.compile(r"[\s}\]]*")
_BLANK = re.compile(r"\s*")
_MAX_NAME = 256
_KEYS = frozenset({"id", "type", "name", "function", *ARGUMENTS_KEYS})


class ToolCallReader:
    """Feed it the text of one answer. `names`: of the tools that may be called."""

    def __init__(self, form: ToolCallFormat, names: Collection[str]) -> None:
        self._form = form
        self._names = names
        self._in = IncomingText()
        self._values = ValueReader(self._in, python=form.syntax == "pythonic")
        self._pieces: list[Piece] = []
        self._space = ""
        self._after_call = False
        self._dropped = ""
        self._open = False
        self._streaming = False
        initials = "".join(sorted({re.escape(marker[0]) for marker in form.begin}))
        self._plain = re.compile(f"[^{initials}]*")
        self._steps = self._answer()

    def push(self, text: str) -> list[Piece]:
        self._in.push(text)
        return self._advance()

    def finish(self) -> list[Piece]:
        """What was held back, when no text follows."""
        self._in.ended = True
        return self._advance()

    def _advance(self) -> list[Piece]:
        next(self._steps, None)
        if self._streaming:
            self._hand_on()
        pieces, self._pieces = self._pieces, []
        return pieces

    # --- text ---------------------------------------------------------------------------------

    def _answer(self) -> Reading[None]:
        if self._form.bare:
            yield from self._bare_calls()
        while (yield from self._text_up_to_marker()):
            yield from self._calls(bare=False)
        self._end_text()

    def _text_up_to_marker(self) -> Reading[bool]:
        """False at the end of the text. The marker is taken and recorded."""
        while True:
            self._say(self._in.take_run(self._plain))
            if not (yield from self._in.ahead(1)):
                return False
            self._in.start_record()
            if (yield from self._in.take_literal(self._form.begin)):
                return True
            self._in.take()
            self._say(self._in.recorded())

    def _say(self, text: str) -> None:
        """Content. White space waits for what follows: beside a call it is dropped."""
        if self._after_call:
            text = text.lstrip()
        text = self._space + text
        self._space = ""
        if not text:
            return
        visible = len(text.rstrip())
        self._after_call = self._after_call and not visible
        keep = max(visible, len(text) - MAX_HELD_SPACE)
        self._space = text[keep:]
        if keep:
            self._add_content(text[:keep])

    def _end_text(self) -> None:
        if self._space:
            self._add_content(self._space)
            self._space = ""

    def _add_content(self, text: str) -> None:
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, Content):
            self._pieces[-1] = Content(last.text + text)
        else:
            self._pieces.append(Content(text))

    # --- where calls stand ----------------------------------------------------------------------

    def _bare_calls(self) -> Reading[None]:
        """Calls at the beginning of the text, where nothing need announce them."""
        self._in.start_record()
        space = yield from self._in.word(_BLANK, MAX_HELD_SPACE)
        self._in.take(len(space))
        if (yield from self._in.take_literal(self._form.fences)):
            yield from self._values.space()
        if (yield from self._in.take_literal(self._form.begin)):
            yield from self._calls(bare=False)
        elif (yield from self._in.ahead(1)) in ("{", "["):
            yield from self._calls(bare=True)
        else:
            self._say(self._in.recorded())

    def _calls(self, *, bare: bool) -> Reading[None]:
        """Calls after a marker, up to and including what closes them."""
        try:
            yield from self._values.space()
            if self._form.syntax == "pythonic":
                yield from self._python_calls()
            else:
                yield from self._json_calls(bare=bare)
            yield from self._close()
        except MalformedError:
            self._give_back()
        self._in.recorded()

    def _close(self) -> Reading[None]:
        """What closes calls, and braces too many before it."""
        self._in.start_record()
        surplus = yield from self._in.word(_SURPLUS, MAX_HELD_SPACE)
        self._in.take(len(surplus))
        if not (yield from self._in.take_literal(self._form.end)):
            self._say(self._in.recorded())

    def _json_calls(self, *, bare: bool) -> Reading[None]:
        following = yield from self._in.ahead(1)
        if following == "[":
            yield from self._array(bare=bare)
        elif following == "{" or not self._form.bare_names:
            yield from self._object(bare=bare)
        else:
            yield from self._named_call()
        if not self._form.separator:
            return
        while True:
            self._in.start_record()
            yield from self._values.space()
            if not (yield from self._in.take_literal((self._form.separator,))):
                return
            yield from self._values.space()
            yield from self._object(bare=True)

    def _array(self, *, bare: bool) -> Reading[None]:
        yield from self._values.expect("[")
        while True:
            yield from self._values.space()
            yield from self._object(bare=bare)
            yield from self._values.space()
            if (yield from self._values.expect(",]")) == "]":
                return

    # --- one call -------------------------------------------------------------------------------

    def _object(self, *, bare: bool) -> Reading[None]:
        """`{"name": ..., "arguments": {...}}` with its keys in any order; the last brace may be
        missing."""
        fields: dict[str, str] = {}
        yield from self._values.expect("{")
        while True:
            yield from self._values.space()
            key = json.loads((yield from self._held(self._values.string())))
            yield from self._values.space()
            yield from self._values.expect(":")
            yield from self._values.space()
            if key in fields or (bare and not self._open and key not in _KEYS):
                raise MalformedError
            following = yield from self._in.ahead(1)
            if following == "{" and key in ARGUMENTS_KEYS and "name" in fields and not self._open:
                self._begin(_text_of(fields["name"]))
                yield from self._values.value()
                self._hand_on()
                self._streaming = False
                fields[key] = ""
            else:
                fields[key] = yield from self._held(self._values.value())
                if key == "name":
                    self._check_name(_text_of(fields["name"]))
            yield from self._values.space()
            if self._open and (yield from self._in.ahead(1)) not in (",", "}"):
                break
            if (yield from self._values.expect(",}")) == "}":
                break
        if not self._open:
            name, arguments = _call_in(fields)
            self._begin(name)
            self._values.written.append(arguments)
        self._end_call()

    def _held(self, reading: Reading[None]) -> Reading[str]:
        """The JSON of a value that is needed as a whole."""
        size = seen = 0
        for _ in reading:
            size += sum(map(len, self._values.written[seen:]))
            seen = len(self._values.written)
            if size > MAX_HELD:
                raise MalformedError
            yield
        return self._values.take_written()

    def _named_call(self) -> Reading[None]:
        """Mistral's `name[CALL_ID]id[ARGS]{...}`, of which the markers may be missing."""
        name = yield from self._name()
        if (yield from self._in.take_literal((CALL_ID,))):
            yield from self._take_word(_NAME)
        yield from self._in.take_literal((ARGS,))
        yield from self._values.space()
        if (yield from self._in.ahead(1)) != "{":
            raise MalformedError
        self._begin(name)
        yield from self._values.value()
        self._end_call()

    def _python_calls(self) -> Reading[None]:
        yield from self._values.expect("[")
        while True:
            yield from self._values.space()
            name = yield from self._name()
            yield from self._values.expect("(")
            yield from self._python_arguments(name)
            self._end_call()
            yield from self._values.space()
            if (yield from self._values.expect(",]")) == "]":
                return

    def _python_arguments(self, name: str) -> Reading[None]:
        """`key=literal, ...)`. The call begins when the first key is known to be one."""
        written = self._values.written
        before = "{"
        while True:
            yield from self._values.space()
            if (yield from self._in.ahead(1)) == ")":
                break
            key = yield from self._take_word(_IDENTIFIER)
            yield from self._values.space()
            yield from self._values.expect("=")
            if not key.isidentifier():
                raise MalformedError
            if not self._open:
                self._begin(name)
            written.append(f"{before}{json.dumps(key)}: ")
            before = ", "
            yield from self._values.space()
            yield from self._values.value()
            yield from self._values.space()
            if (yield from self._in.ahead(1)) != ",":
                break
            self._in.take()
        yield from self._values.expect(")")
        if not self._open:
            self._begin(name)
            written.append("{")
        written.append("}")

    def _name(self) -> Reading[str]:
        name = yield from self._take_word(_NAME)
        self._check_name(name)
        return name

    def _take_word(self, pattern: re.Pattern[str]) -> Reading[str]:
        word = yield from self._in.word(pattern, _MAX_NAME)
        return self._in.take(len(word))

    def _check_name(self, name: str) -> None:
        if name not in self._names:
            raise MalformedError

    # --- what comes out of it -------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        self._check_name(name)
        self._dropped, self._space = self._space, ""
        self._pieces.append(CallStart(self._form.new_id(), name))
        self._open = self._streaming = True

    def _hand_on(self) -> None:
        if text := self._values.take_written():
            self._pieces.append(Arguments(text))

    def _end_call(self) -> None:
        self._hand_on()
        self._pieces.append(CallEnd())
        self._open = self._streaming = False
        self._after_call = True
        self._in.start_record()

    def _give_back(self) -> None:
        """What was read since the last call is text. Of a call that has begun the arguments were
        handed on as far as they are JSON; at the end of the text all of them are."""
        if not self._open:
            self._values.take_written()
            self._say(self._in.recorded())
            return
        if self._streaming:
            self._hand_on()
            if self._in.ended and (rest := self._in.take_rest()):
                self._pieces.append(Arguments(rest))
        self._values.take_written()
        self._open = self._streaming = False
        self._pieces.append(CallBroken(self._dropped + self._in.recorded()))


def _call_in(fields: dict[str, str]) -> tuple[str, str]:
    """Name and arguments of an object that did not have them in that order; also of
    `{"function": {"name": ..., "arguments": ...}}` and `{"function": name, ...}`."""
    parsed = {key: json.loads(text) for key, text in fields.items()}
    function = parsed.get("function")
    if isinstance(function, dict):
        parsed = function
        fields = {key: json.dumps(value) for key, value in function.items()}
    name = parsed.get("name", function)
    if not isinstance(name, str):
        raise MalformedError
    key = next((key for key in ARGUMENTS_KEYS if key in parsed), None)
    if key is None or parsed[key] is None:
        return name, "{}"
    if isinstance(parsed[key], str):
        return name, _inner_object(parsed[key])
    if not isinstance(parsed[key], dict):
        raise MalformedError
    return name, fields[key]


def _inner_object(text: str) -> str:
    """Arguments that were written as a string that holds JSON."""
    try:
        if isinstance(json.loads(text, parse_constant=_no_constant), dict):
            text.encode()
            return text
    except (ValueError, RecursionError):
        pass
    raise MalformedError


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _text_of(json_text: str) -> str:
    text = json.loads(json_text)
    if not isinstance(text, str):
        raise MalformedError
    return text
