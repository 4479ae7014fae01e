"""The grammar of a Python call whose keyword arguments a JSON schema allows.

Python's spelling is used where a schema says plainly what a value is. Where it says more, values
are JSON, which differs in true, false and null only, and which the reader of calls takes, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.errors import InvalidRequestError
from headrace.text.grammar import GrammarRules, json_value, quoted

Schema = Mapping[str, Any]

_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$comment", "$schema", "$id"}
)
# What an object's schema may say beside them for its properties to be all there is to know.
_OBJECT = frozenset(
    {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
    | {"patternProperties"}
)
_STRINGS = r"""/'([^'\\\x00-\x1f]|\\['"\\nrt])*'/ | /"([^"\\\x00-\x1f]|\\['"\\nrt])*"/"""
_NAMES = {True: "True", False: "False", None: "None"}
_VALUES = frozenset({"const", "enum", "default", "examples"})  # keywords with no schema in them
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_ROOT = "arguments"  # where the whole schema stands in those of single arguments


def python_call(rules: GrammarRules, name: str, schema: Schema, *, strict: bool) -> str:
    """`name(argument=value, ...)`, in the order of the schema's properties.

    Raises InvalidRequestError if `strict` and the schema says what keyword arguments cannot show.
    """
    if strict:
        _check(name, schema)
    properties = dict(schema.get("properties") or {})
    required = [key for key in schema.get("required") or () if key.isidentifier()]
    for key in required:
        properties.setdefault(key, schema.get("additionalProperties", True))
    values = _Values(rules, schema, lenient=not strict)
    arguments = [
        (f"{quoted(f'{key}=')} {values.of(value, f'properties/{_pointer(key)}')}", key in required)
        for key, value in properties.items()
        if key.isidentifier() and value is not False
    ]
    return f"{quoted(f'{name}(')} {_arguments(rules, arguments)} {quoted(')')}"


def _check(name: str, schema: Schema) -> None:
    unknown = set(schema) - _OBJECT - _ANNOTATIONS
    spelled = [key for key in schema.get("required") or () if not key.isidentifier()]
    if unknown or spelled:
        what = f"the keyword {min(unknown)!r}" if unknown else f"an argument {spelled[0]!r}"
        raise InvalidRequestError(
            f"The strict function {name!r} has {what} in its parameters, which this model's calls, "
            "that are Python, cannot be held to. Leave it or strict out.",
            param="tools",
        )


def _arguments(rules: GrammarRules, arguments: Sequence[tuple[str, bool]]) -> str:
    """A rule of arguments in their order, separated by commas; some must be there."""
    first = after = rules.rule('""')
    for argument, must in reversed(arguments):
        more = f'", " {argument} {after}'
        begin = f"{argument} {after}"
        first = rules.rule(begin if must else f"{begin} | {first}")
        after = rules.rule(more if must else f"{more} | {after}")
    return first


class _Values:
    """Rules of values. `root`: the schema that references point into."""

    def __init__(self, rules: GrammarRules, root: Schema, *, lenient: bool) -> None:
        self._rules = rules
        self._root = root
        self._lenient = lenient
        self._refers = '"$ref"' in json.dumps(root)

    def of(self, schema: Any, path: str) -> str:
        """`path`: where the schema stands in the root's."""
        options = self._plain(schema) if isinstance(schema, Mapping) else None
        return self._rules.rule(" | ".join(options or [self._json(schema, path)]))

    def _plain(self, schema: Schema) -> list[str] | None:
        """Python's spellings; None if the schema says more than is understood here."""
        keywords = set(schema) - _ANNOTATIONS
        if keywords == {"anyOf"} and isinstance(schema["anyOf"], list):
            found = [self._plain(s) if isinstance(s, Mapping) else None for s in schema["anyOf"]]
            return [o for options in found for o in options or ()] if all(found) else None
        if keywords <= {"type", "enum"} and isinstance(values := schema.get("enum"), list):
            spelled = [_spelled(value) for value in values if _is_a(value, schema.get("type"))]
            return [o for options in spelled for o in options] if all(spelled) else None
        if keywords == {"const"}:
            return _spelled(schema["const"]) or None
        if keywords != {"type"}:
            return None
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not all(isinstance(kind, str) and kind in _KINDS for kind in kinds):
            return None
        return [_KINDS[kind] for kind in kinds]

    def _json(self, schema: Any, path: str) -> str:
        if not isinstance(schema, Mapping):
            schema = {} if schema is True else {"not": {}}
        if self._refers:
            root = _moved(self._root)
            schema = {"$ref": f"#/$defs/{_ROOT}/{path}", "$defs": {_ROOT: root}}
        return json_value(schema, lenient=self._lenient)


_KINDS = {
    "string": _STRINGS,
    "boolean": '"True" | "False"',
    "null": '"None"',
    "integer": r"/-?(0|[1-9][0-9]*)/",
    "number": r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/",
}


_KINDS_OF: dict[type, tuple[str, ...]] = {
    bool: ("boolean",),
    str: ("string",),
    int: ("integer", "number"),
    float: ("number",),
    type(None): ("null",),
}


def _is_a(value: Any, kinds: Any) -> bool:
    """Whether an enum's value has the type that is asked for beside it."""
    if kinds is None:
        return True
    kind = {bool: "boolean", str: "string", int: "integer", float: "number"}.get(
        type(value), "null"
    )
    names = {kind, "number"} if kind == "integer" else {kind}
    return bool(names.intersection([kinds] if isinstance(kinds, str) else kinds))


def _spelled(value: Any) -> list[str]:
    """Literals of a value; none of one that is an array or object."""
    if value is None or isinstance(value, bool):
        return [quoted(_NAMES[value])]
    if isinstance(value, int | float):
        return [quoted(json.dumps(value))]
    if not isinstance(value, str):
        return []
    double = json.dumps(value, ensure_ascii=False)
    single = "'" + double[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"
    return [quoted(double), quoted(single)]


def _moved(schema: Any) -> Any:
    """The same schema for a place inside another one: its references point there."""
    if isinstance(schema, list):
        return [_moved(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            moved[key] = {name: _moved(item) for name, item in value.items()}
        else:
            moved[key] = value if key in _VALUES else _moved(value)
    if isinstance(reference := moved.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/{_ROOT}{reference[1:]}"
    return moved


def _pointer(key: str) -> str:
    """A key in a JSON pointer (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")
