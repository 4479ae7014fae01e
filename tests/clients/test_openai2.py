"""Clients that want openai below 3: litellm, instructor, llama-index, and openai 2 itself.

They cannot be in one environment with openai 3, so the tests of openai2/ run in .venv/openai2.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.clients.conftest import Scripted, Target

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

FOLDER = Path(__file__).parent / "openai2"
PYTHON = Path(
    os.environ.get("OPENAI2_PYTHON", Path(__file__).parents[2] / ".venv/openai2/bin/python")
)


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_with_openai2(file: str, target: Target, scripted: Scripted) -> None:
    if not PYTHON.exists():
        pytest.skip("the clients for openai 2 are not installed: make .venv/.clients")
    run = subprocess.run(
        [PYTHON, "-m", "pytest", "-q", "-c", "pytest.ini", "--rootdir", ".", file],
        cwd=FOLDER,
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "REAL_URL": target.url,
            "REAL_MODEL": target.model,
            "SCRIPTED_URL": scripted.url,
            "SCRIPTED_MODEL": scripted.model,
        },
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"^\d+ passed(, \d+ warnings?)? in", run.stdout, re.MULTILINE)
    assert passed, run.stdout  # and none skipped
