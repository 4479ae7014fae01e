"""Grammars under which every call is one that tool_calls_reader.py reads, with arguments that its
function's schema allows. They are written the way the format's prompts show them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.text.grammar import TEXT, GrammarRules, json_value, quoted
from headrace.text.tool_calls import ARGS, ToolCallFormat
from headrace.text.tool_calls_python import python_call

# A text that does not begin with a call; \x1c-\x1f are white space to Python only.
_NO_BARE_CALL = r"/(?s:\s*([^\s\x1c-\x1f{\[].*)?)/"
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Function:
    """What may be called."""

    name: str
    parameters: dict[str, Any] | None
    """The JSON schema of the arguments, an object. None: there are no arguments."""
    strict: bool
    """Keywords of the schema that cannot be kept to are refused, instead of left out of account."""

    @property
    def schema(self) -> dict[str, Any]:
        return _NO_PARAMETERS if self.parameters is None else {**self.parameters, "type": "object"}


class CallRules:
    """The rules of calls of `functions`. `several`: there may be more than one call."""

    def __init__(
        self,
        rules: GrammarRules,
        form: ToolCallFormat,
        functions: Sequence[Function],
        *,
        several: bool,
    ) -> None:
        self._rules = rules
        self._form = form
        self._functions = functions
        self._several = several

    def alone(self) -> str:
        """An answer that is nothing but calls, at least one."""
        form = self._form
        with_marker = (
            self._rules.is_special(form.begin[0]) if form.is_python else not form.separator
        )
        if form.bare and not with_marker:
            return self._group("")
        return self.marked()

    def marked(self) -> str:
        """The same, behind the format's marker."""
        begin = self._form.begin[0]
        group = f"{self._rules.marker(begin)} {self._group(begin)}"
        if not self._repeats(begin):
            return self._rules.rule(group)
        return self._rules.rule(self._row(self._rules.rule(group), self._between(begin)))

    def in_text(self) -> str:
        """A text in which calls may come. It is free up to the marker that announces one."""
        form, rules = self._form, self._rules
        before = _NO_BARE_CALL if form.bare else TEXT
        again = [
            f"{rules.up_to(begin)} {self._group(begin)}"
            for begin in form.begin
            if self._several and self._repeats(begin)
        ]
        after = rules.rule(f"({' | '.join(again)})* {TEXT}") if again else ""
        options = [before]
        for begin in form.begin:
            rest = after if self._repeats(begin) else ""
            options.append(f"{rules.up_to(begin, before)} {self._group(begin)} {rest}")
        if form.bare:
            options.append(self._group(""))
        return rules.rule(" | ".join(options))

    def _repeats(self, begin: str) -> bool:
        """Whether there is a marker before each call, and not before all of them."""
        named = self._form.bare_names and self._rules.is_special(ARGS)
        return named or bool(self._end(begin) and not self._form.is_python)

    def _between(self, begin: str) -> str:
        return quoted("\n") if self._end(begin) else ""

    def _end(self, begin: str) -> str:
        """What closes the calls behind the marker `begin`; empty if nothing must."""
        form = self._form
        if begin not in form.begin or (form.array and begin == form.begin[0]):
            return ""
        position = form.begin.index(begin)
        return form.end[position] if position < len(form.end) else ""

    def _group(self, begin: str) -> str:
        """What stands behind the marker `begin`, or without one, through its end."""
        form, end = self._form, self._end(begin)
        if form.is_python:
            body = f'"[" {self._row(self._each(self._python), quoted(", "))} "]"'
            return self._rules.rule(f"{body} {self._rules.marker(end)}" if end else body)
        if form.bare_names and self._rules.is_special(ARGS):
            return self._each(self._named)
        call = self._each(self._object)
        if form.array and begin == form.begin[0]:
            return self._rules.rule(f'"[" {self._row(call, quoted(", "))} "]"')
        if end:
            return self._rules.rule(f'"\\n" {call} "\\n" {self._rules.marker(end)}')
        return self._rules.rule(self._row(call, quoted(f"{form.separator} ")))

    def _row(self, call: str, between: str) -> str:
        return f"{call} ({between} {call})*" if self._several else call

    def _each(self, call: Callable[[Function], str]) -> str:
        return self._rules.rule(" | ".join(map(call, self._functions)))

    def _object(self, function: Function) -> str:
        begin = f'{{"name": "{function.name}", "{self._form.arguments_key}": '
        return f'{quoted(begin)} {self._arguments(function)} "}}"'

    def _named(self, function: Function) -> str:
        return f"{quoted(function.name)} {self._rules.marker(ARGS)} {self._arguments(function)}"

    def _arguments(self, function: Function) -> str:
        return self._rules.rule(json_value(function.schema, lenient=not function.strict))

    def _python(self, function: Function) -> str:
        return python_call(self._rules, function.name, function.schema, strict=function.strict)
