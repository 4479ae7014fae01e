"""Bounds on what a body holds, kept before its values are looked at.

pydantic collects an error for each wrong value, about 10 us of work with nothing else running: a
million of them would stop every stream for 10 s.
"""

from __future__ import annotations

from typing import Any

from pydantic import BeforeValidator, Field

MAX_TOOLS = 512

FIRST_ERROR: Any = Field(fail_fast=True)
"""For arrays of typed values: the first wrong one ends it."""


def at_most(entries: int) -> BeforeValidator:
    """For objects of typed values."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise ValueError(f"must have at most {entries} item(s)")
        return value

    return BeforeValidator(check)
