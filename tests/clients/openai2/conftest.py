"""Where the servers are: ../test_openai2.py starts this with their addresses.

Runs in an environment of its own, without the server's packages.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Target:
    url: str
    model: str

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


@pytest.fixture(scope="session")
def target() -> Target:
    return Target(os.environ["REAL_URL"], os.environ["REAL_MODEL"])


@pytest.fixture(scope="session")
def scripted() -> Target:
    """Answers as the message says: see ScriptedEngine in ../conftest.py."""
    return Target(os.environ["SCRIPTED_URL"], os.environ["SCRIPTED_MODEL"])
