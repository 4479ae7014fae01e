"""schemathesis reads /openapi.json and tries every route with good and bad requests.

Nothing may be a server's fault, and every answer must be one that the document describes. What it
draws depends on the seed alone. The answers are scripted: what is tried is the API.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.clients.conftest import Scripted

WHY = "the extra `clients` is not installed: make .venv/.clients"
pytest.importorskip("schemathesis", reason=WHY)
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_document_holds(scripted: Scripted, tmp_path: Path, mode: str) -> None:
    command = [sys.executable, "-P", "-m", "schemathesis.cli", "run"]
    command += [f"{scripted.url}/openapi.json", "--url", scripted.url, "--seed", "1"]
    command += ["--phases", "examples,coverage,fuzzing", "--mode", mode, "--max-examples", "10"]
    command += ["--checks", ",".join(CHECKS), "--request-timeout", "60", "--no-color"]
    command += ["--generation-database", "none", "--suppress-health-check", "all"]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]
    assert re.search(r"Operations: +\d+ selected", run.stdout), run.stdout[-3000:]
