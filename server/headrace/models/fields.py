"""Typed reading of a checkpoint's configuration; errors name the key. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.errors import CheckpointError


class Fields:
    """A mapping whose values are read by type.

    A key that is missing, or null where no default is given, and a value of another type raise
    CheckpointError. A default stands in for a missing key and for null.
    """

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self._values = values
        self.source = source

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "an integer")
        if value < minimum:
            raise self._wrong(key, value, f"at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        if not value >= 0:
            raise self._wrong(key, value, "at least 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if key in self else None

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if key in self else None

    def sequence(
        self, key: str, length: int, kind: type | tuple[type, ...]
    ) -> Sequence[Any] | None:
        """A list of at least `length` values of a kind (the rest is left out); None if missing."""
        if key not in self:
            return None
        value = self._values[key]
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < length:
            raise self._wrong(key, value, f"a list of {length}")
        if not all(isinstance(item, kind) for item in value):
            raise self._wrong(key, value, "a list of one kind of value")
        return value[:length]

    def section(self, key: str) -> Fields | None:
        """A nested object; None if it is missing, null or empty."""
        value = self._values.get(key)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return Fields(value, f"{self.source}, {key}")

    def has_key(self, key: str) -> bool:
        """Whether the key is there, if only with null."""
        return key in self._values

    def raw(self, key: str) -> object:
        return self._values.get(key)

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(
                f"{self.source} has no {key!r}. Is the file complete, and of a language model?"
            )
        return default

    def _wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        shown = repr(value)
        if len(shown) > 60:
            shown = f"{shown[:60]}..."
        return CheckpointError(f"{self.source}: {key!r} must be {wanted}, not {shown}.")
