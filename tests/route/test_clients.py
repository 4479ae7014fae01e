"""The suite of clients that others wrote passes through the door, with two replicas behind it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.conftest import Server

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
SUITE = (
    *("test_openai_python", "test_openai_responses", "test_openai_structured"),
    *("test_anthropic", "test_langchain", "test_llm_command", "test_pydantic_ai"),
)


@pytest.mark.timeout(600)
def test_the_client_suite_passes_through_the_door(door: Server, replicas: list[Server]) -> None:
    files = [f"tests/clients/{name}.py" for name in SUITE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "--base-url", door.url, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    answered = [server.metrics()["headrace_requests_accepted_total"] for server in replicas]
    assert min(answered) > 0, "both had a part in it"
