"""oneOf in JSON schemas, which grammars cannot say: anyOf instead where that is the same.

It is where no value fits two of the branches: they have different types, or are objects that a
required property tells apart (what pydantic writes for a tagged union).
"""

from __future__ import annotations

from typing import Any

_VALUES = frozenset({"const", "enum", "default", "examples"})  # of instances: no schemas in there
_MAX_REFERENCES = 16


def without_one_of(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with anyOf for each oneOf whose branches exclude each other."""
    rewritten: dict[str, Any] = _rewritten(schema, schema)
    return rewritten


def _rewritten(part: Any, root: dict[str, Any]) -> Any:
    if isinstance(part, list):
        return [_rewritten(item, root) for item in part]
    if not isinstance(part, dict):
        return part
    new = {
        name: value if name in _VALUES else _rewritten(value, root) for name, value in part.items()
    }
    branches = part.get("oneOf")
    if isinstance(branches, list) and branches and "anyOf" not in part:
        targets = [_target(branch, root) for branch in branches]
        if _exclude_each_other(targets):
            new["anyOf"] = new.pop("oneOf")
    return new


def _target(branch: Any, root: dict[str, Any]) -> dict[str, Any]:
    """What a branch refers to within the schema; {} if that cannot be told."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(branch, dict):
            return {}
        reference = branch.get("$ref")
        if not isinstance(reference, str):
            return branch
        branch = root if reference.startswith("#/") else {}
        for name in reference[2:].split("/"):
            branch = branch.get(name) if isinstance(branch, dict) else None
    return {}


def _exclude_each_other(branches: list[dict[str, Any]]) -> bool:
    if _are_disjoint([_types(branch) for branch in branches]):
        return True
    required = [set(_texts(branch.get("required"))) for branch in branches]
    return any(
        _are_disjoint([_tags(branch, name) for branch in branches])
        for name in set.intersection(*required)
    )


def _types(branch: dict[str, Any]) -> set[str]:
    kinds = branch.get("type")
    return {
        "number" if kind == "integer" else kind
        for kind in _texts([kinds] if isinstance(kinds, str) else kinds)
    }


def _tags(branch: dict[str, Any], name: str) -> set[str]:
    """The texts that an object's property may be; empty if it may be more."""
    properties = branch.get("properties")
    if branch.get("type") != "object" or not isinstance(properties, dict):
        return set()
    value = properties.get(name)
    if not isinstance(value, dict):
        return set()
    return set(_texts([value["const"]] if "const" in value else value.get("enum")))


def _texts(values: Any) -> list[str]:
    """The values if they are a list of strings; otherwise none."""
    is_list = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if is_list else []


def _are_disjoint(sets: list[set[str]]) -> bool:
    """Whether all are told, and no two have anything in common."""
    return bool(sets) and all(sets) and sum(map(len, sets)) == len(set().union(*sets))
