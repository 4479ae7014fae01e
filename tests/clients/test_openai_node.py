"""openai-node: the tests of node/*.test.mjs, run by node itself.

`make .venv/.node` brings what they need; without node, npm or that, they are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.clients.conftest import Scripted, Target

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).parent / "node"


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.test.mjs")))
def test_in_node(file: str, target: Target, scripted: Scripted) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (FOLDER / "node_modules").is_dir():
        pytest.skip("openai-node is not installed: make .venv/.node")
    environment = {
        **os.environ,
        "REAL_URL": target.url,
        "REAL_MODEL": target.model,
        "SCRIPTED_URL": scripted.url,
        "SCRIPTED_MODEL": scripted.model,
    }
    run = subprocess.run(
        [node, "--test", "--test-reporter=tap", file],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"^# pass (\d+)$", run.stdout, re.MULTILINE)
    assert passed and int(passed[1]) > 0, run.stdout
